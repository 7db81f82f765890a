//! The monitor process: starting it, its standard error, its control socket.

use super::lines::Lines;
use super::process::Process;
use crate::die_with_parent::die_with_parent;
use crate::error::{Context, Error, Result};
use crate::logs::{LogFile, printable};
use command_fds::{CommandFdExt, FdMapping};
use lighter_protocol::monitor::{Machine, Request, Response};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Pid;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{ChildStderr, ChildStdout};
use tokio::time::timeout;

/// How long the monitor may take to answer a request.
const ANSWER: Duration = Duration::from_secs(60);

/// Lines of standard error that are kept for an error message.
const LAST_LINES: usize = 10;

/// Longest line from the monitor, bytes.
pub const MAX_LINE: usize = 64 << 10;

/// Finds the program: `LIGHTER_VMM`, else beside this one, else in `PATH`.
///
/// # Errors
/// When it is nowhere.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("LIGHTER_VMM").filter(|v| !v.is_empty()) {
        return Ok(path.into());
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|path| path.with_file_name("lighter-vmm"));
    beside
        .filter(|path| path.is_file())
        .or_else(|| crate::doctor::find_program("lighter-vmm"))
        .ok_or_else(|| {
            Error::failure("cannot find the program lighter-vmm beside lighter, nor in PATH")
                .hint("install both together, or set LIGHTER_VMM to its path")
        })
}

/// Starts the monitor and tells it what to build; returns the process that it goes on in, and its standard error. Call it from the
/// main thread: the monitor dies with the thread that started it.
///
/// # Errors
/// When the program cannot be started, or does not say where it goes on.
pub async fn start(machine: &Machine, inherited: Vec<FdMapping>) -> Result<(Process, Option<ChildStderr>)> {
    let program = program()?;
    let failed = || format!("cannot start the monitor {}", program.display());
    let mut command = std::process::Command::new(&program);
    command
        .arg("run")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.fd_mappings(inherited).context(failed)?;
    die_with_parent(&mut command);
    let mut started = command.spawn().context(failed)?;
    let json = serde_json::to_vec(machine).context(failed)?;
    if let Some(mut stdin) = started.stdin.take() {
        // A monitor that ends before it has read this says why on its standard error.
        let _ = stdin.write_all(&json);
    }
    let process = goes_on(&mut started).await;
    if process.is_err() {
        let _ = started.kill();
    }
    let stderr = started.stderr.map(ChildStderr::from_std).transpose();
    Ok((
        process.and_then(Process::new).context(failed)?,
        stderr.context(failed)?,
    ))
}

/// Which process it is that the monitor, as it was `started`, goes on in, to be in a namespace of processes: it prints its number. One
/// that ends before is itself.
async fn goes_on(started: &mut Child) -> io::Result<Pid> {
    let itself = Pid::from_child(started);
    let Some(stdout) = started.stdout.take() else {
        return Ok(itself);
    };
    let line = timeout(
        ANSWER,
        Lines::new(ChildStdout::from_std(stdout)?, MAX_LINE).next(),
    )
    .await;
    let line = line.map_err(|_| io::Error::other("it does not say which process it is"))??;
    let process = line.and_then(|line| Pid::from_raw(line.trim().parse().ok()?));
    match process {
        Some(process) if process != itself => {
            // It has nothing more to do.
            started.wait()?;
            Ok(process)
        }
        _ => Ok(itself),
    }
}

/// Copies the monitor's standard error, which is a pipe, to the log until it ends; returns the last lines.
pub async fn log_stderr(stderr: Option<impl AsyncRead + Unpin>, mut log: LogFile) -> Vec<String> {
    let Some(stderr) = stderr else { return vec![] };
    let mut lines = Lines::new(stderr, 8 << 10);
    let mut last = VecDeque::new();
    while let Ok(Some(line)) = lines.next().await {
        log.line(&line);
        if last.len() == LAST_LINES {
            last.pop_front();
        }
        last.push_back(printable(&line));
    }
    last.into()
}

/// Asks the monitor for something.
///
/// # Errors
/// When it does not answer, or refuses.
pub async fn request(socket: &Path, request: &Request) -> Result<Response> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        let answer = Lines::new(stream, MAX_LINE).next().await?.unwrap_or_default();
        Ok::<_, io::Error>(serde_json::from_str(&answer)?)
    };
    let exchange = timeout(ANSWER, exchange).await;
    answered(
        socket,
        request,
        exchange.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
    )
}

/// Asks the monitor for something that takes descriptors along, or that no other task may come between: this waits, and is not
/// for the runtime's threads.
///
/// # Errors
/// When it does not answer, or refuses.
pub fn ask(socket: &Path, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<Response> {
    let exchange = || {
        let mut stream = std::os::unix::net::UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other("too many descriptors"));
        }
        let sent = sendmsg(&stream, &[IoSlice::new(&line)], &mut control, SendFlags::NOSIGNAL)?;
        stream.write_all(&line[sent..])?;
        let mut answer = String::new();
        BufReader::new(stream)
            .take(MAX_LINE as u64)
            .read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    };
    answered(socket, request, exchange())
}

fn answered(socket: &Path, request: &Request, exchange: io::Result<Response>) -> Result<Response> {
    let what = || format!("cannot ask the monitor for {request:?} at {}", socket.display());
    match exchange {
        Ok(Response::Error { message }) => Err(Error::failure(format!("{}: {message}", what()))),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Err(
            Error::failure(format!("{}: no answer within {} s", what(), ANSWER.as_secs())),
        ),
        result => result.context(what),
    }
}
