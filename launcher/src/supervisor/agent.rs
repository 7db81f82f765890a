//! The guest's agent: its connections arrive from the monitor as descriptors, and each speaks
//! [`lighter_protocol::agent`]. The guest is hostile: what it sends is bounded, and blocks nobody but itself.

use super::Lasting;
use super::file_events::Watcher;
use crate::logs::{LogFile, Source, cut, printable};
use lighter_protocol::agent::{
    AgentMessage, EngineState, LogLevel, LogLine, LogSource, SupervisorMessage, VERSION,
};
use lighter_protocol::frame::{Channel, Decoder, FrameError, encode_message};
use lighter_protocol::supervisor::BootClock;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixDatagram, UnixStream};
use tokio::sync::mpsc;

/// Longest name of a step or a version, bytes.
const MAX_NAME: usize = 128;
/// Longest line of a log that is kept, bytes.
const MAX_TEXT: usize = 8 << 10;
/// Most lines of a failed engine, or of what is wrong with an identity, that are kept.
const MAX_LAST_LINES: usize = 50;

/// Why an agent's connection ended.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The connection broke.
    #[error("the agent's connection broke")]
    Io(#[from] io::Error),
    /// What it sent is no frame or no greeting.
    #[error("the agent sent what is not understood")]
    Frame(#[from] FrameError),
    /// It speaks another version.
    #[error(
        "the agent {version} speaks protocol {theirs}, this supervisor speaks {VERSION}: image and program are of different ages"
    )]
    Version {
        /// The agent's.
        theirs: u32,
        /// The agent's package version.
        version: String,
    },
}

/// The socket on which the monitor passes connections. It is a sequenced-packet socket, which tokio has no type for; nothing
/// but waiting for it is done through this one.
#[derive(Debug)]
pub struct Connections(UnixDatagram);

impl Connections {
    /// Takes the supervisor's end of the pair.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = std::os::unix::net::UnixDatagram::from(socket);
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket).map(Self)
    }

    /// The next connection, or `None` when the monitor is gone. May be cancelled. One that comes when this process has no descriptor
    /// left is lost, which its guest sees as its end; those after it are not.
    ///
    /// # Errors
    /// When the socket fails, or the monitor sends something else.
    pub async fn accept(&self) -> io::Result<Option<UnixStream>> {
        let descriptor = loop {
            match self.0.async_io(Interest::READABLE, || receive(&self.0)).await? {
                Received::Connection(descriptor) => break descriptor,
                Received::Lost => {}
                Received::End => return Ok(None),
            }
        };
        let stream = std::os::unix::net::UnixStream::from(descriptor);
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream).map(Some)
    }
}

/// What came from the monitor.
enum Received {
    Connection(OwnedFd),
    /// A connection for which there was no descriptor.
    Lost,
    End,
}

fn receive(socket: impl AsFd) -> io::Result<Received> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match descriptor {
        Some(descriptor) => Ok(Received::Connection(descriptor)),
        None if message.flags.contains(ReturnFlags::CTRUNC) => Ok(Received::Lost),
        None if message.bytes == 0 => Ok(Received::End),
        None => Err(io::Error::other(
            "the monitor passed no descriptor with a connection",
        )),
    }
}

/// The logs that come from inside the guest.
#[derive(Debug)]
pub struct GuestLogs {
    agent: LogFile,
    engine: LogFile,
}

impl GuestLogs {
    /// Opens both.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn open(paths: &crate::paths::VmPaths) -> io::Result<Self> {
        Ok(Self {
            agent: LogFile::open(paths.log(Source::Agent))?,
            engine: LogFile::open(paths.log(Source::Engine))?,
        })
    }

    fn line(&mut self, line: &LogLine) {
        let level = match line.level {
            LogLevel::Debug => "DEBUG",
            LogLevel::Info => "INFO",
            LogLevel::Warn => "WARN",
            LogLevel::Error => "ERROR",
        };
        let (log, name) = match line.source {
            LogSource::Agent => (&mut self.agent, "agent"),
            LogSource::Dockerd => (&mut self.engine, "dockerd"),
            LogSource::Containerd => (&mut self.engine, "containerd"),
        };
        // One entry is one line, whatever the guest put into it.
        let text = cut(&line.text, MAX_TEXT).replace('\n', "\\n");
        log.line(&format!(
            "{} {level} {name}: {text}",
            crate::clock::rfc3339(line.time_ms)
        ));
    }
}

/// Speaks with one agent until its connection ends; answers its greeting by what `welcome` makes, and sends what arrives on
/// `orders` and what happens to files that `watcher` is told of.
///
/// # Errors
/// Why it ended, unless the agent closed it.
pub async fn serve(
    mut stream: UnixStream,
    lasting: &Lasting,
    logs: Arc<Mutex<GuestLogs>>,
    welcome: impl Fn() -> SupervisorMessage,
    mut orders: mpsc::Receiver<SupervisorMessage>,
    mut watcher: Watcher,
) -> Result<(), AgentError> {
    let Lasting { state, usage, .. } = lasting;
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 64 << 10];
    let mut greeted = false;
    loop {
        tokio::select! {
            read = stream.read(&mut buffer) => match read? {
                0 => return Ok(()),
                length => decoder.push(&buffer[..length]),
            },
            Some(order) = orders.recv(), if greeted => {
                stream.write_all(&encode_message(&order)?).await?;
                continue;
            }
            events = watcher.next(), if greeted => {
                stream.write_all(&encode_message(&events?)?).await?;
                continue;
            }
        }
        while let Some(frame) = decoder.next_frame()? {
            if frame.channel != Channel::Message {
                return Err(FrameError::NotAMessage(frame.channel).into());
            }
            // A message of a newer agent is not understood, and skipped.
            let Ok(message) = frame.message::<AgentMessage>() else {
                continue;
            };
            match message {
                AgentMessage::Hello { protocol, version } => {
                    let version = name(&version);
                    if protocol != VERSION {
                        return Err(AgentError::Version {
                            theirs: protocol,
                            version,
                        });
                    }
                    greeted = true;
                    state.agent_running(&version);
                    stream.write_all(&encode_message(&welcome())?).await?;
                }
                _ if !greeted => return Err(io::Error::other("it did not greet first").into()),
                AgentMessage::TimeRequest { id } => {
                    let time = SupervisorMessage::Time {
                        id,
                        unix_ns: crate::clock::unix_ns(),
                        monotonic_ns: Some(crate::clock::monotonic_ns()),
                    };
                    stream.write_all(&encode_message(&time)?).await?;
                }
                AgentMessage::Step(mut step) => {
                    step.name = name(&step.name);
                    state.step(step);
                }
                AgentMessage::Log(line) => logs.lock().unwrap_or_else(PoisonError::into_inner).line(&line),
                AgentMessage::Engine(engine) => state.engine(bounded(engine)),
                AgentMessage::Clock {
                    offset_ns,
                    round_trip_ns,
                    boot_offset_ns,
                    ..
                } => {
                    let boot_clock = boot_offset_ns.map(|offset_ns| BootClock {
                        offset_ns,
                        round_trip_ns,
                    });
                    state.clock(offset_ns, boot_clock);
                }
                AgentMessage::Memory(memory) => state.memory(memory),
                AgentMessage::Containers(load) => usage.containers(load),
                AgentMessage::IdentityTaken { seeded, troubles } => {
                    state.identity_taken(seeded, &bounded_lines(&troubles).join("; "));
                }
                AgentMessage::FileWatches { changes, round } => {
                    // A network file system may take its time.
                    let trouble = tokio::task::block_in_place(|| watcher.change(changes));
                    if let Some(trouble) = trouble {
                        state.trouble("shared folders", &trouble);
                    }
                    for message in round.map_or_else(|| Ok(vec![]), |round| watcher.all(round))? {
                        stream.write_all(&encode_message(&message)?).await?;
                    }
                }
                AgentMessage::PoweringOff => state.stopping(),
            }
        }
    }
}

fn name(text: &str) -> String {
    printable(cut(text, MAX_NAME))
}

fn bounded(engine: EngineState) -> EngineState {
    match engine {
        EngineState::Failed {
            reason,
            last_lines,
            retry_in_ms,
        } => EngineState::Failed {
            reason: printable(cut(&reason, MAX_TEXT)),
            last_lines: bounded_lines(&last_lines),
            retry_in_ms,
        },
        other => other,
    }
}

/// The last lines of the guest's.
fn bounded_lines(lines: &[String]) -> Vec<String> {
    let first = lines.len().saturating_sub(MAX_LAST_LINES);
    lines[first..]
        .iter()
        .map(|line| printable(cut(line, MAX_TEXT)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_arrive_as_descriptors_until_the_monitor_is_gone() {
        use rustix::net::{
            AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
        };
        let (ours, monitor) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let connections = Connections::new(ours).unwrap();
        let (guest, mut agent) = UnixStream::pair().unwrap();
        let descriptors = [guest.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        rustix::net::sendmsg(
            &monitor,
            &[io::IoSlice::new(&[0])],
            &mut control,
            SendFlags::empty(),
        )
        .unwrap();
        let mut accepted = connections.accept().await.unwrap().unwrap();
        accepted.write_all(b"x").await.unwrap();
        assert_eq!(agent.read_u8().await.unwrap(), b'x');
        drop(monitor);
        assert!(connections.accept().await.unwrap().is_none());
    }

    #[test]
    fn a_hostile_failure_report_is_cut_and_made_printable() {
        let engine = bounded(EngineState::Failed {
            reason: "\x1b]0;x".into(),
            last_lines: vec!["y".repeat(20_000); 1000],
            retry_in_ms: None,
        });
        let EngineState::Failed {
            reason, last_lines, ..
        } = engine
        else {
            panic!("the state is kept");
        };
        assert_eq!(reason, "\\u{1b}]0;x");
        assert_eq!(last_lines.len(), MAX_LAST_LINES);
        assert_eq!(last_lines[0].len(), MAX_TEXT);
    }
}
