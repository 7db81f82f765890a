//! Commands for `lighter exec` and `lighter shell` ([`lighter_protocol::exec`]): one connection, one command.
//!
//! Output is read only as fast as the client takes it, and input is taken only as fast as the command reads it. When
//! the command has ended, what it had written is sent and the session ends, even if a process it left behind still
//! holds the pipe.

mod command;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc, time::Duration};

use lighter_protocol::{
    exec::{ExecReply, ExecRequest},
    frame::{Channel, Frame, FrameError, encode, encode_message},
};
use nix::{sys::signal::kill, unistd::Pid};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{Mutex, mpsc, watch},
    time::timeout,
};

use crate::{
    fd::AsyncFile,
    frames::{self, FrameReader},
};
use command::Running;

/// Frames of input that wait for the command to read them.
const WAITING_INPUT: usize = 4;

/// Bytes of output in one frame.
const PIECE: usize = 32 * 1024;

/// The most that is read after the command has ended: more than a pipe or terminal holds, so that only a process
/// left behind that goes on writing is cut off.
const LAST_OUTPUT: usize = 2 << 20;

/// How long the client may take to close the connection after the last reply.
const FAREWELL: Duration = Duration::from_secs(30);

/// The end of input on a terminal: control-D.
const END_OF_TRANSMISSION: &[u8] = &[4];

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client's side.
    #[error("cannot read from the client of a command")]
    Read(#[source] frames::Error),
    /// It sent something else than the protocol says.
    #[error("the client of a command sent what is not a request")]
    Request(#[source] FrameError),
    /// It must start a command first.
    #[error("the client did not start a command first")]
    NotStarted,
    /// It is gone.
    #[error("cannot send to the client of a command")]
    Send(#[source] io::Error),
    /// A reply cannot be encoded.
    #[error("cannot encode a reply")]
    Encode(#[source] FrameError),
    /// The command's end is lost.
    #[error("cannot wait for a command")]
    Wait(#[source] io::Error),
}

type Reader<S> = FrameReader<ReadHalf<S>>;
type Writer<S> = Mutex<WriteHalf<S>>;

/// Serves one client.
///
/// # Errors
/// When the client breaks the protocol or goes away; its command has got SIGHUP then.
pub async fn serve<S: AsyncRead + AsyncWrite>(stream: S) -> Result<(), Error> {
    let (reader, writer) = tokio::io::split(stream);
    let (mut reader, writer) = (FrameReader::new(reader), Mutex::new(writer));
    let Some(first) = reader.next().await.map_err(Error::Read)? else {
        return Ok(());
    };
    let ExecRequest::Start(request) = first.message().map_err(Error::Request)? else {
        return Err(Error::NotStarted);
    };
    let last = match command::start(&request) {
        Ok(running) => {
            send_message(&writer, &ExecReply::Started { pid: running.pid })
                .await
                .inspect_err(|_| {
                    hang_up(running.pid);
                })?;
            conduct(running, &mut reader, &writer).await?
        }
        Err(failure) => Some(ExecReply::Failed {
            kind: failure.kind(),
            message: failure.message(),
        }),
    };
    if let Some(reply) = last {
        send_message(&writer, &reply).await?;
        writer.lock().await.shutdown().await.map_err(Error::Send)?;
        // Closing with input unread would reset the connection, and the client might lose the reply.
        let rest = async { while let Ok(Some(_)) = reader.next().await {} };
        // A client that stays does not hold the session either.
        let _ = timeout(FAREWELL, rest).await;
    }
    Ok(())
}

/// Runs the session of a started command until it has ended, `None` when the client has gone before.
async fn conduct<S: AsyncRead + AsyncWrite>(
    mut running: Running,
    reader: &mut Reader<S>,
    writer: &Writer<S>,
) -> Result<Option<ExecReply>, Error> {
    let pid = running.pid;
    let terminal = running.terminal.clone();
    let (exited, exit_seen) = watch::channel(false);
    let (input, waiting) = mpsc::channel(WAITING_INPUT);
    let ended = async {
        let status = running.child.wait().await.map_err(Error::Wait);
        exited.send_replace(true);
        status
    };
    let outputs = async {
        tokio::try_join!(
            output(
                running.stdout.as_ref(),
                Channel::Stdout,
                exit_seen.clone(),
                writer
            ),
            output(
                running.stderr.as_ref(),
                Channel::Stderr,
                exit_seen.clone(),
                writer
            ),
        )
    };
    let requests = async {
        let feeding = async {
            feed(running.input, terminal.is_some(), waiting).await;
            std::future::pending().await
        };
        tokio::select! {
            result = follow_requests(reader, pid, terminal.as_deref(), &exit_seen, &input) => result,
            () = feeding => Ok(()),
        }
    };
    let result = tokio::select! {
        both = async { tokio::try_join!(ended, outputs) } => both.map(|(status, _)| Some(status)),
        gone = requests => gone.map(|()| None),
    };
    if !*exit_seen.borrow() {
        hang_up(pid);
    }
    Ok(result?.map(|status| ExecReply::Exited(command::exit_status(status))))
}

/// Handles the client's frames until it goes away.
async fn follow_requests<S: AsyncRead + AsyncWrite>(
    reader: &mut Reader<S>,
    pid: u32,
    terminal: Option<&AsyncFile>,
    exited: &watch::Receiver<bool>,
    input: &mpsc::Sender<Vec<u8>>,
) -> Result<(), Error> {
    while let Some(frame) = reader.next().await.map_err(Error::Read)? {
        match frame {
            // An error means that the command does not read any more.
            Frame {
                channel: Channel::Stdin,
                payload,
            } => drop(input.send(payload).await),
            frame => match frame.message().map_err(Error::Request)? {
                ExecRequest::Start(_) => return Err(Error::NotStarted),
                ExecRequest::Resize(size) => {
                    if let Some(terminal) = terminal {
                        // Fails only when the command is gone.
                        drop(command::resize(terminal, size));
                    }
                }
                // After its end, the number may belong to another process.
                ExecRequest::Signal { number } if !*exited.borrow() => signal(pid, number),
                ExecRequest::Signal { .. } => {}
            },
        }
    }
    Ok(())
}

/// Hands input to the command until it ends, or the command does not take any more.
async fn feed(command: Option<Arc<AsyncFile>>, is_terminal: bool, mut waiting: mpsc::Receiver<Vec<u8>>) {
    let Some(command) = command else { return };
    while let Some(bytes) = waiting.recv().await {
        let is_end = bytes.is_empty();
        let bytes = if is_end && is_terminal {
            END_OF_TRANSMISSION
        } else {
            &bytes
        };
        if command.write_all(bytes).await.is_err() || (is_end && !is_terminal) {
            return;
        }
    }
}

/// Sends what the command writes until its end.
async fn output<W: AsyncWrite>(
    file: Option<&Arc<AsyncFile>>,
    channel: Channel,
    mut exited: watch::Receiver<bool>,
    writer: &Mutex<WriteHalf<W>>,
) -> Result<(), Error> {
    let Some(file) = file else { return Ok(()) };
    let mut buffer = vec![0; PIECE];
    loop {
        let read = tokio::select! {
            read = file.read(&mut buffer) => read,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        match read {
            Ok(length) if length > 0 => send(writer, channel, &buffer[..length]).await?,
            // EIO from a terminal's master: nobody has the other side open.
            _ => return Ok(()),
        }
    }
    let mut left = LAST_OUTPUT;
    while left > 0 {
        match file.read_now(&mut buffer) {
            Ok(Some(length)) if length > 0 => {
                left = left.saturating_sub(length);
                send(writer, channel, &buffer[..length]).await?;
            }
            _ => break,
        }
    }
    Ok(())
}

async fn send<W: AsyncWrite>(
    writer: &Mutex<WriteHalf<W>>,
    channel: Channel,
    bytes: &[u8],
) -> Result<(), Error> {
    let frame = encode(channel, bytes).map_err(Error::Encode)?;
    writer.lock().await.write_all(&frame).await.map_err(Error::Send)
}

async fn send_message<W: AsyncWrite>(writer: &Mutex<WriteHalf<W>>, reply: &ExecReply) -> Result<(), Error> {
    let frame = encode_message(reply).map_err(Error::Encode)?;
    writer.lock().await.write_all(&frame).await.map_err(Error::Send)
}

/// Sends a signal to the command's process group; not a signal's number, or nobody left, is nobody's loss.
fn signal(pid: u32, number: i32) {
    let Ok(pid) = i32::try_from(pid) else { return };
    if (1..=64).contains(&number) {
        // SAFETY: kill touches no memory. Not nix's, which knows no real-time signals.
        unsafe { libc::kill(-pid, number) };
    }
}

fn hang_up(pid: u32) {
    if let Ok(pid) = i32::try_from(pid) {
        // Fails only when nobody is left.
        let _ = kill(Pid::from_raw(-pid), nix::sys::signal::Signal::SIGHUP);
    }
}
