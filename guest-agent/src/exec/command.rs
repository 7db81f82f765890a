//! Starting one command, with pipes or a terminal.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process,
    sync::Arc,
};

use lighter_protocol::exec::{Command, ExitStatus, FailureKind, WindowSize};
use nix::{
    fcntl::OFlag,
    pty::{grantpt, posix_openpt, ptsname_r, unlockpt},
    unistd::pipe2,
};

use crate::{
    fd::AsyncFile,
    process::{PATH, write_kernel_file},
};

/// A started command. With a terminal, `input`, `stdout` and `terminal` are the terminal's master.
#[derive(Debug)]
pub struct Running {
    pub child: tokio::process::Child,
    pub pid: u32,
    pub input: Option<Arc<AsyncFile>>,
    pub stdout: Option<Arc<AsyncFile>>,
    pub stderr: Option<Arc<AsyncFile>>,
    pub terminal: Option<Arc<AsyncFile>>,
}

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is nothing to run.
    #[error("no command was given")]
    Empty,
    /// A variable that no environment can hold.
    #[error("{0:?} is not a name of an environment variable")]
    Variable(String),
    /// The folder to run it in.
    #[error("cannot use {} as the working folder", path.display())]
    WorkingDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its pipes or terminal.
    #[error("cannot make the command's {what}")]
    Streams {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program.
    #[error("cannot run {program}")]
    Program {
        /// As it was given.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Failure {
    /// For the exit code.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Program { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT) => FailureKind::NotFound,
                Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ENOTDIR) => {
                    FailureKind::NotExecutable
                }
                _ => FailureKind::Other,
            },
            _ => FailureKind::Other,
        }
    }

    /// With its cause.
    pub fn message(&self) -> String {
        lighter_protocol::causes::chain(self)
    }
}

/// Starts `request` in a session of its own.
///
/// # Errors
/// When it cannot be; nothing is left of it then.
pub fn start(request: &Command) -> Result<Running, Failure> {
    let Some((program, arguments)) = request.argv.split_first() else {
        return Err(Failure::Empty);
    };
    let working_dir = Path::new(request.working_dir.as_deref().unwrap_or("/"));
    check_folder(working_dir)?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .current_dir(working_dir)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root");
    if request.terminal.is_some() {
        command.env("TERM", "xterm");
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(Failure::Variable(name.clone()));
        }
        command.env(name, value);
    }
    let has_terminal = request.terminal.is_some();
    // SAFETY: the closure only makes system calls that are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::setsid()?;
            // What whoever started the agent ignores (nohup's hang-up) is none of the command's business.
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
                libc::signal(signal, libc::SIG_DFL);
            }
            if has_terminal && libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            // A command is no part of what keeps the VM usable. Not worth failing for.
            drop(write_kernel_file(c"/proc/self/oom_score_adj", b"0"));
            Ok(())
        });
    }
    match request.terminal {
        Some(size) => spawn_on_terminal(command, program, size),
        None => spawn_on_pipes(command, program),
    }
}

/// Looked at on its own, since its failure and a missing program's cannot be told apart afterwards.
fn check_folder(path: &Path) -> Result<(), Failure> {
    let failure = |source| Failure::WorkingDir {
        path: path.into(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(failure)?;
    if metadata.is_dir() {
        Ok(())
    } else {
        Err(failure(io::ErrorKind::NotADirectory.into()))
    }
}

fn spawn_on_pipes(mut command: tokio::process::Command, program: &str) -> Result<Running, Failure> {
    let failure = |source| Failure::Streams {
        what: "pipes",
        source,
    };
    let pipe = || pipe2(OFlag::O_CLOEXEC).map_err(|errno| failure(errno.into()));
    let ((stdin, input), (stdout, stdout_end), (stderr, stderr_end)) = (pipe()?, pipe()?, pipe()?);
    let ours = |fd| {
        AsyncFile::new(fd)
            .map(|file| Some(Arc::new(file)))
            .map_err(failure)
    };
    let (input, stdout, stderr) = (ours(input)?, ours(stdout)?, ours(stderr)?);
    command.stdin(stdin).stdout(stdout_end).stderr(stderr_end);
    let (child, pid) = spawn(command, program)?;
    Ok(Running {
        child,
        pid,
        input,
        stdout,
        stderr,
        terminal: None,
    })
}

fn spawn_on_terminal(
    mut command: tokio::process::Command,
    program: &str,
    size: WindowSize,
) -> Result<Running, Failure> {
    let failure = |source| Failure::Streams {
        what: "terminal",
        source,
    };
    let (master, slave) = open_terminal().map_err(failure)?;
    let master = Arc::new(AsyncFile::new(master).map_err(failure)?);
    resize(&master, size).map_err(failure)?;
    command
        .stdin(slave.try_clone().map_err(failure)?)
        .stdout(slave.try_clone().map_err(failure)?)
        .stderr(slave);
    let (child, pid) = spawn(command, program)?;
    Ok(Running {
        child,
        pid,
        input: Some(master.clone()),
        stdout: Some(master.clone()),
        stderr: None,
        terminal: Some(master),
    })
}

fn open_terminal() -> io::Result<(OwnedFd, File)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let path = ptsname_r(&master)?;
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)?;
    Ok((master.as_fd().try_clone_to_owned()?, slave))
}

fn spawn(
    mut command: tokio::process::Command,
    program: &str,
) -> Result<(tokio::process::Child, u32), Failure> {
    let failure = |source| Failure::Program {
        program: program.to_owned(),
        source,
    };
    let child = command.spawn().map_err(failure)?;
    let pid = child
        .id()
        .ok_or_else(|| failure(io::Error::other("it ended before it began")))?;
    Ok((child, pid))
}

/// Tells the terminal its size; the kernel sends SIGWINCH.
///
/// # Errors
/// From the system.
pub fn resize(terminal: &AsyncFile, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize, which `size` is.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// In the protocol's terms.
pub fn exit_status(status: process::ExitStatus) -> ExitStatus {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, signal) => ExitStatus::Signal(signal.unwrap_or(0)),
    }
}
