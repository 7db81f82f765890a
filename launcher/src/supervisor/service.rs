//! The supervisor as a service of the user's systemd: what it is given (sd_listen_fds(3)), and what it tells (sd_notify(3)).

use super::launch::{Launch, run};
use super::state::{State, engine_settled};
use crate::autostart::Autostart;
use crate::autostart::begin::Commission;
use crate::client;
use crate::error::{Code, Context, Error, Result, say};
use crate::lock::Lock;
use crate::logs::{Source, open_append};
use crate::name::Name;
use crate::paths::{Paths, VmPaths};
use crate::vm::Vm;
use lighter_protocol::supervisor::{Phase, Status};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

/// The first descriptor that systemd hands over.
const FIRST_FD: RawFd = 3;

/// More than a unit of ours has.
const MOST_FDS: RawFd = 16;

/// What the supervisor of a service has besides.
#[derive(Debug)]
pub struct Service {
    /// Held until others find the supervisor's sockets.
    pub edit: Lock,
    /// The engine's socket, if it is systemd's.
    pub engine: Option<UnixListener>,
    /// Where systemd hears of the VM.
    pub notifier: Notifier,
}

/// Runs the supervisor of the VM `name` for systemd. Nothing else has opened a descriptor in this process before.
///
/// # Errors
/// [`Code::NotRunning`] when the VM does not start, [`Code::Failure`] when it does and crashes.
pub fn serve(paths: &Paths, name: &Name) -> Result<()> {
    let handed = handed_over(|name| std::env::var(name).ok(), std::process::id())
        .context(|| "cannot take the sockets that systemd hands over".into())?;
    let files = paths.vm(name);
    paths.create_vms()?;
    let edit = Lock::acquire(&files.edit_lock)?;
    let vm = Vm::load(paths, name)?;
    if client::is_running(&vm) {
        let error = format!("VM {name} is running already, and was not started by systemd");
        return Err(
            Error::new(Code::NotRunning, error).hint(format!("lighter stop {name}, then start it again"))
        );
    }
    let engine = engine_of(handed, &files)?;
    let (commission, starter) = Commission::fetch(&vm).unzip();
    // Whoever held the life lock is gone, and what it left is stale.
    vm.remove_runtime();
    paths.create_runtime(&files)?;
    log_to(&vm)?;
    let commission = commission.unwrap_or_default();
    let service = Service {
        edit,
        engine,
        notifier: Notifier::from_environment(),
    };
    let end = run(
        paths,
        name,
        Launch {
            begin: commission.begin(),
            starter,
            service: Some(service),
        },
    )?;
    match (end.end.is_clean(), end.was_ready) {
        (true, _) => Ok(()),
        (false, true) => Err(Error::failure(end.end.sentence())),
        (false, false) => Err(Error::new(Code::NotRunning, end.end.sentence())),
    }
}

/// The listening socket of the engine, where it is systemd's to have.
fn engine_of(handed: Vec<OwnedFd>, files: &VmPaths) -> Result<Option<UnixListener>> {
    let wanted = files.docker_socket();
    let is_it = |socket: &OwnedFd| {
        let is_listening = sockopt::socket_acceptconn(socket).unwrap_or(false);
        let address = rustix::net::getsockname(socket).ok();
        let address = address.and_then(|address| rustix::net::SocketAddrUnix::try_from(address).ok());
        let path = address.as_ref().and_then(rustix::net::SocketAddrUnix::path_bytes);
        is_listening && path == Some(wanted.as_os_str().as_bytes())
    };
    match handed.into_iter().find(is_it) {
        Some(socket) => Ok(Some(socket.into())),
        None if Autostart::on_demand(files) => {
            let error = format!("systemd does not hand over the socket {}", wanted.display());
            Err(Error::new(Code::NotRunning, error)
                .hint("lighter autostart enable --on-demand writes its units anew"))
        }
        None => Ok(None),
    }
}

/// What this process, `pid`, has inherited for itself.
fn handed_over(variable: impl Fn(&str) -> Option<String>, pid: u32) -> io::Result<Vec<OwnedFd>> {
    let number = |name| variable(name).and_then(|value| value.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(pid) {
        return Ok(vec![]);
    }
    let count = RawFd::try_from(number("LISTEN_FDS").unwrap_or(0)).unwrap_or(RawFd::MAX);
    if count > MOST_FDS {
        return Err(io::Error::other(format!("{count} are too many")));
    }
    let take = |fd: RawFd| {
        if !std::fs::exists(format!("/proc/self/fd/{fd}"))? {
            return Err(io::Error::other(format!("descriptor {fd} is not open")));
        }
        // SAFETY: it is open, and by the protocol it is this process's to own; nothing here has opened or taken one before.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
        Ok(owned)
    };
    (FIRST_FD..FIRST_FD + count).map(take).collect()
}

/// What this process says goes where that of any supervisor does.
fn log_to(vm: &Vm) -> Result<()> {
    let what = || "cannot write the supervisor's log".into();
    let log = open_append(&vm.paths.log(Source::Monitor)).context(what)?;
    rustix::stdio::dup2_stderr(log.as_fd()).context(what)
}

/// Tells systemd of the VM.
#[derive(Debug)]
pub struct Notifier(Option<(UnixDatagram, SocketAddr)>);

impl Notifier {
    fn from_environment() -> Self {
        Self(std::env::var_os("NOTIFY_SOCKET").and_then(|path| Self::open(&path)))
    }

    fn open(path: &OsStr) -> Option<(UnixDatagram, SocketAddr)> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(path),
        };
        Some((UnixDatagram::unbound().ok()?, address.ok()?))
    }

    /// Tells until the VM is over.
    pub async fn follow(self, state: State) {
        let mut watch = state.watch();
        let mut last = None;
        loop {
            let words = {
                let status = watch.borrow_and_update();
                (words(&status), status.phase == Phase::Ended)
            };
            if last.as_ref() != Some(&words.0) {
                self.tell(&words.0);
            }
            last = Some(words.0);
            if words.1 || watch.changed().await.is_err() {
                return;
            }
        }
    }

    fn tell(&self, words: &str) {
        if let Some((socket, address)) = &self.0
            && let Err(error) = socket.send_to_addr(words.as_bytes(), address)
        {
            say(format_args!("lighter: systemd is not told of the VM: {error}"));
        }
    }
}

/// What systemd is told at `status`. A VM whose engine was given up has started, too: it can be looked at.
fn words(status: &Status) -> String {
    let (state, words) = match status.phase {
        Phase::Ended => {
            let end = status.end.as_ref().map(|end| end.sentence());
            ("STOPPING=1\n", end.unwrap_or_else(|| "ended".into()))
        }
        Phase::Stopping => ("STOPPING=1\n", "shutting down".into()),
        Phase::StandingBy => ("READY=1\n", "suspended; goes on when it is used".into()),
        Phase::Ready => ("READY=1\n", "the engine answers".into()),
        _ if engine_settled(status) => (
            "READY=1\n",
            "the engine does not start: lighter logs --source engine".into(),
        ),
        Phase::EngineStarting => ("", "the engine is starting".into()),
        Phase::Starting | Phase::Booting => ("", "booting".into()),
    };
    format!("{state}STATUS={}", words.replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::super::state::testing::vm_and_state;
    use super::*;
    use lighter_protocol::agent::EngineState;
    use lighter_protocol::monitor::StopReason;
    use lighter_protocol::supervisor::End;

    #[test]
    fn descriptors_are_taken_by_whom_they_are_for() {
        let environment = |pid: &'static str, count: &'static str| {
            move |name: &str| match name {
                "LISTEN_PID" => Some(pid.to_owned()),
                "LISTEN_FDS" => Some(count.to_owned()),
                _ => None,
            }
        };
        assert!(handed_over(|_| None, 7).unwrap().is_empty());
        assert!(handed_over(environment("8", "1"), 7).unwrap().is_empty());
        assert!(handed_over(environment("7", "0"), 7).unwrap().is_empty());
        assert!(handed_over(environment("7", "17"), 7).is_err());
        assert!(
            handed_over(environment("7", "99999999999"), 7)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn the_engines_socket_is_known_by_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let files = Paths::at(folder.path()).vm(&"a".parse().unwrap());
        std::fs::create_dir_all(&files.runtime).unwrap();
        let other = UnixListener::bind(files.runtime.join("other")).unwrap();
        let ours = UnixListener::bind(files.docker_socket()).unwrap();
        let found = engine_of(vec![other.into(), ours.into()], &files)
            .unwrap()
            .unwrap();
        assert_eq!(
            found.local_addr().unwrap().as_pathname(),
            Some(&*files.docker_socket())
        );
        assert!(engine_of(vec![], &files).unwrap().is_none());
        std::fs::create_dir_all(&files.data).unwrap();
        std::fs::write(files.autostart(), r#"{"when":"demand","folder":"/u"}"#).unwrap();
        assert_eq!(engine_of(vec![], &files).unwrap_err().code, Code::NotRunning);
    }

    #[tokio::test]
    async fn systemd_hears_when_the_engine_answers_and_when_the_vm_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let systemd = tokio::net::UnixDatagram::bind(&path).unwrap();
        let (_, state) = vm_and_state();
        let notifier = Notifier(Notifier::open(path.as_os_str()));
        let telling = tokio::spawn(notifier.follow(state.clone()));
        let mut heard = vec![];
        let mut hear = async || {
            let mut buffer = [0; 256];
            let length = systemd.recv(&mut buffer).await.unwrap();
            heard.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
            heard.last().unwrap().clone()
        };
        assert_eq!(hear().await, "STATUS=booting");
        state.agent_running("1");
        assert_eq!(hear().await, "STATUS=the engine is starting");
        state.engine(EngineState::Ready);
        assert_eq!(hear().await, "READY=1\nSTATUS=the engine answers");
        state.stopping();
        assert_eq!(hear().await, "STOPPING=1\nSTATUS=shutting down");
        state.ended(End {
            reason: StopReason::PowerOff,
            requested: true,
            unix_ms: 0,
            hint: None,
            last_lines: vec![],
        });
        assert_eq!(hear().await, "STOPPING=1\nSTATUS=the guest shut down");
        telling.await.unwrap();
    }
}
