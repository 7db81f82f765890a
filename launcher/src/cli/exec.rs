//! `lighter exec` and `lighter shell`: a command in the guest, over a connection of its own to the agent.

use super::Target;
use crate::client::{self, Client, Update};
use crate::error::{Code, Context, Error, Result};
use crate::name::Name;
use crate::paths::Paths;
use crate::supervisor::docker::connect;
use crate::vm::Vm;
use clap::Args;
use lighter_protocol::exec::{Command, ExecReply, ExecRequest, WindowSize};
use lighter_protocol::frame::{Channel, Decoder, encode, encode_message};
use lighter_protocol::ports::GUEST_EXEC;
use lighter_protocol::supervisor::{IdentityState, Phase, Status};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// Arguments.
#[derive(Debug, Args)]
pub struct Exec {
    /// The VM's name
    name: Name,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable in the command's environment; without a value, to the one it has here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Run it in this folder of the guest
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Shell {
    #[command(flatten)]
    target: Target,
}

impl Exec {
    /// Runs the command. Returns its exit code.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(self, paths: &Paths) -> Result<u8> {
        let vm = Vm::load(paths, &self.name)?;
        let terminal = match self.tty {
            true => Some(window_size().ok_or_else(|| {
                Error::new(Code::Command(125), "--tty needs a terminal as standard input")
                    .hint("leave --tty out when standard input is a pipe or a file")
            })?),
            false => None,
        };
        let command = Command {
            argv: self.command,
            env: self.env.iter().filter_map(|text| variable(text)).collect(),
            working_dir: self.workdir,
            terminal,
        };
        run(&vm, command, self.interactive)
    }
}

impl Shell {
    /// Opens the shell. Returns its exit code.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(self, paths: &Paths) -> Result<u8> {
        let vm = Vm::load(paths, &self.target.name)?;
        let command = Command {
            argv: vec!["/bin/sh".into()],
            env: std::env::var("TERM")
                .map(|term| ("TERM".into(), term))
                .into_iter()
                .collect(),
            working_dir: None,
            terminal: window_size(),
        };
        run(&vm, command, true)
    }
}

/// `NAME=VALUE`, or `NAME` with the value it has here.
fn variable(text: &str) -> Option<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) => Some((name.into(), value.into())),
        None => Some((text.into(), std::env::var(text).ok()?)),
    }
}

/// The size of the terminal that is standard input, if it is one.
fn window_size() -> Option<WindowSize> {
    if !std::io::stdin().is_terminal() {
        return None;
    }
    let size = tcgetwinsize(std::io::stdin()).ok()?;
    Some(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

fn run(vm: &Vm, command: Command, interactive: bool) -> Result<u8> {
    // As long as this is open, the VM does not suspend by itself.
    let _in_use = wait_for_agent(vm)?;
    let failed = || format!("cannot run {:?} in VM {}", command.argv[0], vm.name);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(failed)?;
    let raw = command
        .terminal
        .map(|_| RawTerminal::enter())
        .transpose()
        .context(failed)?;
    let mut write = |channel, bytes: &[u8]| match channel {
        Channel::Stdout => write(std::io::stdout().lock(), bytes),
        _ => write(std::io::stderr().lock(), bytes),
    };
    let with_signals = async {
        let signals = Signals::new(command.terminal.is_some())?;
        session(
            vm.paths.vsock_socket(),
            &command,
            interactive,
            Some(signals),
            &mut write,
        )
        .await
    };
    let result = runtime.block_on(with_signals);
    drop(raw);
    // The thread that reads standard input may never return.
    runtime.shutdown_background();
    result.map_err(|error| match error.code {
        Code::Failure => Error {
            code: Code::Command(125),
            message: format!("{}: {}", failed(), error.message),
            ..error
        },
        _ => error,
    })
}

/// What a command that was run for this program's own use has said.
#[derive(Debug, Default)]
pub struct Output {
    /// Its exit code.
    pub code: u8,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// Runs a command in a VM whose agent runs, and returns what it says: at most `limit` bytes, and no more is awaited.
/// Signals are not passed on.
///
/// # Errors
/// When it cannot be run, or says more.
pub fn collect(vm: &Vm, argv: Vec<String>, limit: usize) -> Result<Output> {
    let failed = || format!("cannot run {:?} in VM {}", argv[0], vm.name);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(failed)?;
    let command = Command {
        argv: argv.clone(),
        env: vec![],
        working_dir: None,
        terminal: None,
    };
    let mut output = Output::default();
    let mut keep = |channel, bytes: &[u8]| {
        if output.stdout.len() + output.stderr.len() + bytes.len() > limit {
            return Err(Error::failure(format!("it says more than {limit} bytes")));
        }
        match channel {
            Channel::Stdout => output.stdout.extend_from_slice(bytes),
            _ => output.stderr.extend_from_slice(bytes),
        }
        Ok(())
    };
    let session = session(vm.paths.vsock_socket(), &command, false, None, &mut keep);
    let code = runtime.block_on(session).map_err(|error| Error {
        code: Code::Failure,
        message: format!("{}: {}", failed(), error.message),
        ..error
    })?;
    output.code = code;
    Ok(output)
}

/// Waits until the agent of a VM that is starting runs, or that of one that goes on.
fn wait_for_agent(vm: &Vm) -> Result<Client> {
    let mut client = client::session(vm)?;
    loop {
        match client.next(None)? {
            Update::Status(status) if status.phase >= Phase::Stopping => return Err(client::not_running(vm)),
            Update::Status(status) if is_itself(&status) => return Ok(client),
            Update::Status(status) if status.phase == Phase::StandingBy => {
                return Err(client::did_not_go_on(vm, &status));
            }
            Update::Status(_) | Update::TimedOut => {}
            Update::Closed => return Err(client::not_running(vm)),
        }
    }
}

/// Whether commands can be run: the agent is there, and that of a guest that goes on is not in the middle of its return.
fn is_itself(status: &Status) -> bool {
    status.agent_version.is_some() && status.identity != Some(IdentityState::Pending)
}

/// Runs `command` over a connection of its own, and hands what it writes to `write`. Returns its exit code.
async fn session(
    muxer: PathBuf,
    command: &Command,
    interactive: bool,
    mut signals: Option<Signals>,
    write: &mut dyn FnMut(Channel, &[u8]) -> Result<()>,
) -> Result<u8> {
    let lost = || "the connection to the guest is lost".to_owned();
    let (mut stream, early) = connect(&muxer, GUEST_EXEC)
        .await
        .context(|| "the guest's agent does not answer".into())?;
    let mut decoder = Decoder::new();
    decoder.push(&early);
    send(&mut stream, &ExecRequest::Start(command.clone())).await?;
    let mut input = None;
    if interactive {
        input = Some(read_stdin());
    } else {
        stream.write_all(&end_of_input()?).await.context(lost)?;
    }
    let mut buffer = vec![0; 64 << 10];
    loop {
        while let Some(frame) = decoder
            .next_frame()
            .context(|| "the guest's agent is not understood".into())?
        {
            match frame.channel {
                Channel::Stdout | Channel::Stderr => write(frame.channel, &frame.payload)?,
                Channel::Stdin => {}
                Channel::Message => {
                    let reply = frame.message::<ExecReply>();
                    match reply.context(|| "the guest's agent is not understood".into())? {
                        ExecReply::Started { .. } => {}
                        ExecReply::Exited(status) => {
                            return Ok(u8::try_from(status.code() & 0xff).unwrap_or(255));
                        }
                        ExecReply::Failed { kind, message } => {
                            let code = u8::try_from(kind.exit_code()).unwrap_or(125);
                            let message = crate::logs::printable(&message);
                            return Err(Error::new(Code::Command(code), message));
                        }
                    }
                }
            }
        }
        tokio::select! {
            read = stream.read(&mut buffer) => match read.context(lost)? {
                0 => return Err(Error::failure("the guest closed the connection before the command ended")),
                length => decoder.push(&buffer[..length]),
            },
            piece = next_input(&mut input) => {
                let frame = match piece {
                    Some(piece) => encode(Channel::Stdin, &piece).context(lost)?,
                    None => {
                        input = None;
                        end_of_input()?
                    }
                };
                stream.write_all(&frame).await.context(lost)?;
            }
            request = next_signal(&mut signals) => send(&mut stream, &request).await?,
        }
    }
}

fn end_of_input() -> Result<Vec<u8>> {
    encode(Channel::Stdin, &[]).context(|| "cannot encode the end of input".into())
}

async fn send(stream: &mut UnixStream, request: &ExecRequest) -> Result<()> {
    let what = || "cannot speak with the guest's agent".to_owned();
    let frame = encode_message(request).context(what)?;
    stream.write_all(&frame).await.context(what)
}

/// Standard input in pieces; a thread reads it, since terminals and files cannot be watched alike.
fn read_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = stdin.read(&mut buffer) {
            if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn next_input(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

async fn next_signal(signals: &mut Option<Signals>) -> ExecRequest {
    match signals {
        Some(signals) => signals.next().await,
        None => std::future::pending().await,
    }
}

fn write(mut out: impl Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .context(|| "cannot write the command's output".into())
}

/// The signals that are passed on.
struct Signals {
    resized: Option<tokio::signal::unix::Signal>,
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    quit: tokio::signal::unix::Signal,
}

impl Signals {
    fn new(terminal: bool) -> Result<Self> {
        let watch = |kind| signal(kind).context(|| "cannot watch signals".into());
        Ok(Self {
            resized: terminal.then(|| watch(SignalKind::window_change())).transpose()?,
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            quit: watch(SignalKind::quit())?,
        })
    }

    async fn next(&mut self) -> ExecRequest {
        let number = |kind: SignalKind| ExecRequest::Signal {
            number: kind.as_raw_value(),
        };
        loop {
            let resized = async {
                match &mut self.resized {
                    Some(resized) => resized.recv().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = resized => if let Some(size) = window_size() {
                    return ExecRequest::Resize(size);
                },
                _ = self.interrupt.recv() => return number(SignalKind::interrupt()),
                _ = self.terminate.recv() => return number(SignalKind::terminate()),
                _ = self.quit.recv() => return number(SignalKind::quit()),
            }
        }
    }
}

/// The terminal passes every key on, until this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> rustix::io::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_without_a_value_is_taken_from_here() {
        assert_eq!(variable("A=b=c"), Some(("A".into(), "b=c".into())));
        assert_eq!(variable("A="), Some(("A".into(), String::new())));
        assert_eq!(
            variable("PATH"),
            Some(("PATH".into(), std::env::var("PATH").unwrap()))
        );
        assert_eq!(variable("LIGHTER_TEST_NOT_SET"), None);
    }
}
