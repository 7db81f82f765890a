//! Starting a VM: running its supervisor, and following it until the engine answers.

use crate::autostart::{self, Autostart};
use crate::client::{Client, Ended, Update, did_not_go_on, wait_until_gone};
use crate::error::{Code, Context, Error, Result};
use crate::lock::{Lock, is_held};
use crate::logs::{Source, last_lines, open_append, printable};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::vm::Vm;
use lighter_protocol::activity::Use;
use lighter_protocol::agent::EngineState;
use lighter_protocol::supervisor::{End, IdentityState, Phase, Request, Status};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How long a start may take when nobody says otherwise: emulated machines are slow.
pub const START_TIMEOUT: Duration = Duration::from_secs(600);

/// How often the engine may fail before a start gives up on it.
const ENGINE_TRIES: u32 = 3;

/// How a VM begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin<'a> {
    /// It boots, or goes on if it was suspended.
    Boot,
    /// It boots for the first time, and leaves a template behind.
    BootForTemplate,
    /// It has never run, and goes on where the VM stood whose snapshot is in that folder; its data disk is as that one's was then.
    From(&'a Path),
}

/// Runs the supervisor of `vm`, or has systemd run it, or joins the one that runs, which has a suspended VM go on. Returns a connection that watches it, and
/// by which the VM is in use.
///
/// The caller holds `edit`, the VM's edit lock, which is released when the supervisor can be found by others.
///
/// # Errors
/// When it cannot be started, or the time is over.
pub fn launch(
    paths: &Paths,
    vm: &Vm,
    mut edit: Lock,
    begin: Begin<'_>,
    deadline: Instant,
) -> Result<(Client, Box<Status>)> {
    loop {
        if let Some(mut client) = Client::connect(vm) {
            // One that is suspended goes on.
            let purpose = Use::Session;
            client.send(&Request::Use { purpose })?;
            match client.next(Some(deadline))? {
                Update::Status(status) if status.phase < Phase::Stopping => {
                    drop(edit);
                    return Ok((client, status));
                }
                Update::TimedOut => return Err(timed_out(vm)),
                Update::Closed => {}
                // It is being stopped.
                Update::Status(_) => match client.wait_for_end(Some(deadline))? {
                    Ended::TimedOut(_) => return Err(timed_out(vm)),
                    Ended::Gone(_) => wait_until_gone(vm),
                },
            }
        }
        if is_held(&vm.paths.life_lock()) {
            // One that has removed its sockets and is about to end.
            wait_until_gone(vm);
            continue;
        }
        let (mut client, held) = if Autostart::of(&vm.paths).is_some() {
            match autostart::begin::start(paths, vm, edit, begin, deadline)? {
                Some(stream) => (Client::over(stream), None),
                None if Instant::now() >= deadline => return Err(timed_out(vm)),
                None => {
                    edit = Lock::acquire(&vm.paths.edit_lock)?;
                    continue;
                }
            }
        } else {
            (spawn(paths, vm, begin)?, Some(edit))
        };
        let first = client.next(Some(deadline))?;
        drop(held);
        return match first {
            Update::Status(status) => Ok((client, status)),
            Update::TimedOut => Err(timed_out(vm)),
            Update::Closed => Err(supervisor_died(vm)),
        };
    }
}

fn spawn(paths: &Paths, vm: &Vm, begin: Begin<'_>) -> Result<Client> {
    let failed = || format!("cannot start the supervisor of VM {}", vm.name);
    vm.paths.check_socket_paths()?;
    // Whoever held the life lock is gone, and what it left is stale.
    vm.remove_runtime();
    paths.create_runtime(&vm.paths)?;
    let (ours, theirs) = UnixStream::pair().context(failed)?;
    let log = open_append(&vm.paths.log(Source::Monitor)).context(failed)?;
    let program = std::env::current_exe().context(failed)?;
    let mut command = std::process::Command::new(program);
    command.args(["supervise", vm.name.as_str()]);
    match begin {
        Begin::Boot => {}
        Begin::BootForTemplate => drop(command.arg("--template")),
        Begin::From(folder) => drop(command.arg("--from").arg(folder)),
    }
    command
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context(failed)?;
    Ok(Client::over(ours))
}

/// Follows a start until the engine answers on the host's socket. Returns the status, and when (CLOCK_MONOTONIC,
/// nanoseconds) it answered.
///
/// # Errors
/// Why the VM or its engine did not start, or [`Code::Timeout`].
pub fn follow(
    vm: &Vm,
    client: &mut Client,
    first: Box<Status>,
    deadline: Instant,
    progress: &Progress,
) -> Result<(Box<Status>, u64)> {
    let mut status = first;
    let mut failures = status.engine_failures;
    loop {
        progress.show(&status);
        match status.phase {
            Phase::Ready => {
                if let Some(trouble) = &status.trouble {
                    progress.note(&format!("{}: {}", trouble.device, trouble.reason));
                }
                ping(&vm.paths.docker_socket(), deadline).map_err(|error| match error.code {
                    Code::Timeout => timed_out(vm),
                    _ => error,
                })?;
                return Ok((status, crate::clock::monotonic_ns()));
            }
            Phase::Ended => {
                // The next command is to find nothing of it.
                client.wait_for_end(Some(deadline))?;
                wait_until_gone(vm);
                return Err(ended(vm, status.end.as_ref()));
            }
            Phase::Stopping => progress.note(&format!("VM {} is being stopped", vm.name)),
            _ => {}
        }
        if status.phase == Phase::StandingBy {
            return Err(did_not_go_on(vm, &status));
        }
        if let Some(EngineState::Failed {
            reason,
            last_lines,
            retry_in_ms,
        }) = &status.engine
        {
            let tries = status.engine_failures;
            if retry_in_ms.is_none() || tries >= ENGINE_TRIES {
                // A device that is in trouble is why, most likely.
                let trouble = status.trouble.as_ref().map_or(String::new(), |trouble| {
                    format!(" ({}: {})", trouble.device, trouble.reason)
                });
                return Err(Error::failure(format!(
                    "the engine of VM {} does not start ({tries} times): {reason}{trouble}",
                    vm.name
                ))
                .lines(last_lines.clone())
                .hint(format!(
                    "the VM still runs: lighter logs --source engine {0} has more, lighter stop {0} ends it",
                    vm.name
                )));
            }
            if tries > failures {
                progress.note(&format!("the engine failed and is started again: {reason}"));
            }
        }
        if status.identity == Some(IdentityState::Refused) {
            let why = status.trouble.map_or(String::new(), |trouble| trouble.reason);
            return Err(Error::failure(format!(
                "VM {} goes on from a snapshot and has no identity of its own: {why}",
                vm.name
            ))
            .hint(format!(
                "the VM still runs: lighter logs --source agent {0} has more, lighter stop {0} ends it",
                vm.name
            )));
        }
        failures = status.engine_failures;
        status = match client.next(Some(deadline))? {
            Update::Status(status) => status,
            Update::TimedOut => return Err(timed_out(vm)),
            Update::Closed => return Err(supervisor_died(vm)),
        };
    }
}

fn ended(vm: &Vm, end: Option<&End>) -> Error {
    let Some(end) = end else {
        return supervisor_died(vm);
    };
    if end.requested {
        return Error::failure(format!("VM {} was stopped while it was starting", vm.name))
            .hint(format!("lighter start {}", vm.name));
    }
    let hint = end.hint.clone();
    let hint = hint.unwrap_or_else(|| {
        format!(
            "lighter logs --source console {} and --source monitor tell more",
            vm.name
        )
    });
    Error::failure(format!("VM {} did not start: {}", vm.name, end.sentence()))
        .lines(end.last_lines.clone())
        .hint(hint)
}

fn supervisor_died(vm: &Vm) -> Error {
    let lines = last_lines(&vm.paths.log(Source::Monitor), 5).unwrap_or_default();
    Error::failure(format!("the supervisor of VM {} ended without a word", vm.name))
        .lines(lines)
        .hint(format!("start it again: lighter start {}", vm.name))
}

fn timed_out(vm: &Vm) -> Error {
    Error::new(Code::Timeout, format!("VM {} is not ready in time", vm.name)).hint(format!(
        "it goes on in the background: lighter status {0} shows how far it is, lighter stop {0} ends it; \
         --wait-timeout waits longer",
        vm.name
    ))
}

/// Asks an engine whether it answers, which it does by a line that begins with [`PONG`].
pub const PING: &[u8] = b"GET /_ping HTTP/1.1\r\nHost: lighter\r\nConnection: close\r\n\r\n";

/// How the answer to [`PING`] begins.
pub const PONG: &str = "HTTP/1.1 200 ";

/// Asks the engine whether it answers.
///
/// # Errors
/// When it does not, or the time is over.
pub fn ping(socket: &Path, deadline: Instant) -> Result<()> {
    let what = || format!("the engine does not answer on {}", socket.display());
    let late = || Error::new(Code::Timeout, what());
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(late());
    }
    let exchange = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(left))?;
        stream.write_all(PING)?;
        let mut line = String::new();
        BufReader::new(stream).take(1024).read_line(&mut line)?;
        Ok::<_, io::Error>(line)
    };
    match exchange() {
        Ok(line) if line.starts_with(PONG) => Ok(()),
        Ok(line) => Err(Error::failure(format!(
            "{}: it said {:?}",
            what(),
            printable(line.trim())
        ))),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Err(late())
        }
        Err(error) => Err(error).context(what),
    }
}
