//! `lighter bench fs`: what a shared folder costs.
//!
//! The same is done to the same folder by this process, by Lighter's guest, and by that of another monitor, which has it from a
//! `virtiofsd`. They take turns, each in folders of its own.

use super::environment::Environment;
use super::peer::{Guest, Peer, Running};
use super::peer_settings::doubled_commas;
use super::session::Session;
use super::tasks::in_guest;
use super::ways::{Figure, Report, Table, Way};
use crate::boot::START_TIMEOUT;
use crate::cli::Json;
use crate::cli::options::MachineOptions;
use crate::config::Config;
use crate::doctor::find_program;
use crate::error::{Code, Context, Error, Result};
use crate::logs::printable;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use command_fds::{CommandFdExt, FdMapping};
use lighter_measure::files::{Plan, Samples, measure};
use lighter_measure::task::{Task, WORD};
use lighter_protocol::shares::GuestShare;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// How the name of the VM begins.
const NAME: &str = "bench-fs";

/// The most that a guest's samples may be, bytes.
const MAX_SAMPLES: usize = 64 << 10;

/// The listening socket's number in virtiofsd.
const LISTENER_FD: i32 = 3;

/// Of what virtiofsd says, when QEMU does not start.
const SHOWN_LINES: usize = 20;

/// The tag of the folder in the peer.
const TAG: &str = "share0";

/// Arguments.
#[derive(Debug, Args)]
pub struct Fs {
    /// How many rounds, after one that is not counted
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many small files
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    files: u32,
    /// Size of each, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(0..=1 << 20))]
    file_bytes: u32,
    /// Size of the large file, MiB
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    large_mib: u32,
    /// How many random reads of it
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    reads: u32,
    /// Compare with this monitor: qemu (its microvm) with virtiofsd
    #[arg(long, value_name = "NAME[=PATH]")]
    peer: Option<Peer>,
    /// The virtiofsd of the other monitor [default: the one in PATH]
    #[arg(long, value_name = "PATH", requires = "peer")]
    virtiofsd: Option<PathBuf>,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

impl Fs {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot, or a file cannot be used.
    pub fn run(self, paths: &Paths) -> Result<()> {
        if !self.options.mounts.is_empty() || self.options.no_mounts {
            return Err(Error::new(Code::Usage, "bench fs shares a folder of its own")
                .hint("leave --mount and --no-mounts out; set LIGHTER_HOME to measure another file system"));
        }
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let environment = Environment::of(paths, &config, &settings, false)?;
        let progress = Progress::new(!self.output.json);
        // What is missing is told before anything boots.
        let virtiofsd = self.peer.as_ref().map(|_| self.virtiofsd()).transpose()?;
        self.peer.as_ref().map_or(Ok(()), Peer::check_devices)?;
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::boot_with_folder(paths, NAME, settings.clone(), deadline, &progress)?;
        let folder = ThrowAway::shared(paths, NAME)?;
        let mut about = vec![format!(
            "{} files of {} bytes, a file of {} MiB, {} random reads, in {}. Before reading, guests drop what they have cached; the \
             host has all in its own cache.",
            self.files,
            self.file_bytes,
            self.large_mib,
            self.reads,
            folder.display()
        )];
        let mut peer = match (&self.peer, virtiofsd) {
            (Some(peer), Some(virtiofsd)) => {
                progress.say(&format!("booting {}", peer.name()));
                Some(Other::start(
                    peer,
                    virtiofsd,
                    &environment,
                    &settings,
                    &engine,
                    &folder,
                    &mut about,
                )?)
            }
            _ => None,
        };
        let mut ways = [Way::new("lighter"), Way::new("host")];
        let mut of_peer = Way::new(peer.as_ref().map_or("", |other| other.name));
        for round in 0..=self.runs {
            let say = |what: &str| match round {
                0 => progress.say(&format!("warming up, {what}")),
                _ => progress.say(&format!("round {round} of {}, {what}", self.runs)),
            };
            let plan = |who: &str| self.plan(folder.join(format!("{who}{round}")), who != "host");
            say("on the host");
            let on_host = measure(&plan("host")).map_err(|error| Error::of(Code::Failure, &error))?;
            say("in the guest");
            let ours = in_guest(&engine.vm, &Task::Files(plan("lighter")), MAX_SAMPLES)?;
            let others = peer.as_mut().map(|other| {
                say(&format!("in the guest of {}", other.name));
                other.session.measure::<Samples>(&Task::Files(plan("peer")))
            });
            let others = others.transpose()?;
            let counted = round > 0;
            ways[0].add_if(counted, figures(&ours));
            ways[1].add_if(counted, figures(&on_host));
            of_peer.add_if(counted, others.map_or(vec![], |samples| figures(&samples)));
        }
        let has_peer = peer.is_some();
        drop((peer, engine, progress));
        let [lighter, host] = &ways;
        let all = [host, &of_peer];
        let beside = if has_peer { &all[..] } else { &all[..1] };
        let report = Report {
            environment,
            rounds: self.runs,
            about,
            tables: vec![Table::new("shared folder", lighter, beside)?],
        };
        report.tell(self.output.json)
    }

    fn plan(&self, folder: PathBuf, drop_caches: bool) -> Plan {
        Plan {
            folder,
            files: self.files,
            file_bytes: self.file_bytes,
            large_mib: self.large_mib,
            reads: self.reads,
            drop_caches,
        }
    }

    fn virtiofsd(&self) -> Result<PathBuf> {
        let missing = |error: Error| {
            error.hint("install it (Debian: virtiofsd; or cargo install virtiofsd), or name its path: --virtiofsd PATH")
        };
        match &self.virtiofsd {
            Some(path) if path.is_file() => {
                std::path::absolute(path).context(|| format!("cannot use {}", path.display()))
            }
            Some(path) => Err(missing(Error::failure(format!(
                "there is no program {}",
                path.display()
            )))),
            // Debian has it outside of PATH.
            None => find_program("virtiofsd")
                .or_else(|| Some(PathBuf::from("/usr/libexec/virtiofsd")).filter(|path| path.is_file()))
                .ok_or_else(|| missing(Error::failure("cannot find virtiofsd in PATH"))),
        }
    }
}

fn figures(samples: &Samples) -> Vec<Figure> {
    vec![
        Figure::rate("files made and written per second", samples.create.per_second()),
        Figure::rate("files listed and looked at per second", samples.walk.per_second()),
        Figure::rate("the same again at once", samples.walk_again.per_second()),
        Figure::rate("files of a git status per second", samples.status.per_second()),
        Figure::rate("files read per second", samples.read.per_second()),
        Figure::rate("files removed per second", samples.remove.per_second()),
        Figure::rate(
            "large file written with fsync, MiB/s",
            samples.write.mib_per_second(),
        ),
        Figure::rate("large file read, MiB/s", samples.sequential.mib_per_second()),
        Figure::rate("random reads of 4 KiB per second", samples.random.per_second()),
    ]
}

/// The other monitor, and its file system's daemon.
struct Other {
    name: &'static str,
    session: Session,
    _daemon: Running,
}

impl Other {
    fn start(
        peer: &Peer,
        virtiofsd: PathBuf,
        environment: &Environment,
        settings: &Settings,
        engine: &ThrowAway,
        folder: &Path,
        about: &mut Vec<String>,
    ) -> Result<Self> {
        // It goes with the VM's folder.
        let socket = engine.vm.paths.data.join("virtiofsd.sock");
        let daemon = start_daemon(&virtiofsd, &socket, folder)?;
        let share = GuestShare {
            tag: TAG.into(),
            path: folder.to_owned(),
            read_only: false,
        };
        let guest = Guest {
            kernel: environment.kernel.clone(),
            image: environment.image.clone(),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
            words: format!("{share} {WORD} "),
            qemu_options: options(&socket, settings),
        };
        let contender = peer.prepare(&guest, &engine.vm.paths.data)?;
        about.push(contender.version.clone());
        about.push(contender.settings());
        about.push(format!(
            "{} --fd=… --sandbox none --shared-dir {}",
            virtiofsd.display(),
            folder.display()
        ));
        let session = Session::start(&contender, vec![], Instant::now() + START_TIMEOUT);
        Ok(Self {
            name: contender.name,
            session: session.map_err(|error| with_words(error, &log_of(&socket)))?,
            _daemon: daemon,
        })
    }
}

/// virtiofsd reads and writes the guest's memory, which is a file for that.
fn options(socket: &Path, settings: &Settings) -> Vec<OsString> {
    let memory = format!(
        "memory-backend-memfd,id=memory,size={}M,share=on",
        settings.memory.mib()
    );
    let mut path = OsString::from("socket,id=fs,path=");
    path.push(doubled_commas(socket));
    let options: [(&str, OsString); 4] = [
        ("-object", memory.into()),
        ("-machine", "memory-backend=memory".into()),
        ("-chardev", path),
        (
            "-device",
            format!("vhost-user-fs-device,chardev=fs,tag={TAG},queue-size=1024").into(),
        ),
    ];
    options
        .into_iter()
        .flat_map(|(option, value)| [option.into(), value])
        .collect()
}

/// What virtiofsd says goes there.
fn log_of(socket: &Path) -> PathBuf {
    socket.with_extension("log")
}

/// The error, with what virtiofsd has said.
fn with_words(mut error: Error, log: &Path) -> Error {
    let said = std::fs::read_to_string(log).unwrap_or_default();
    let lines = said.lines().map(|line| format!("virtiofsd: {}", printable(line)));
    error.lines.extend(lines.take(SHOWN_LINES));
    error
}

/// With the settings that are its own defaults but for its sandbox. It ends with the connection of its one client.
fn start_daemon(program: &Path, socket: &Path, folder: &Path) -> Result<Running> {
    let listener = UnixListener::bind(socket).context(|| format!("cannot listen on {}", socket.display()))?;
    let failed = || format!("cannot start {}", program.display());
    let mut command = Command::new(program);
    let log = std::fs::File::create(log_of(socket)).context(failed)?;
    command
        .arg(format!("--fd={LISTENER_FD}"))
        // In one it would be two processes, of which only the first is killed with this one.
        .args(["--sandbox", "none", "--shared-dir"])
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context(failed)?)
        .stderr(log);
    let mapping = FdMapping {
        parent_fd: OwnedFd::from(listener),
        child_fd: LISTENER_FD,
    };
    command.fd_mappings(vec![mapping]).context(failed)?;
    Running::start(&mut command, None).context(failed)
}
