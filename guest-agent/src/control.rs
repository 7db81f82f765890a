//! The control connection to the supervisor ([`lighter_protocol::agent`]): made as soon as there is a vsock, made
//! again when it breaks, since a supervisor may be restarted while its VM runs on.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use lighter_protocol::{
    agent::{AgentMessage, EngineSettings, EngineState, Identity, SupervisorMessage, VERSION},
    causes::chain,
    frame::{Channel, FrameError, encode_message},
    ports::HOST_CONTROL,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{Notify, mpsc, watch},
    task::spawn_blocking,
    time::sleep,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::{
    clock::Answer,
    file_events::FileEvents,
    frames::{self, FrameReader},
    identity,
    log::Log,
    outbox::Outbox,
    power::{Reason, Request},
    random_ports, shares, system,
    timeline::Running,
};

/// After the first failure to connect; doubled at each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Between tries at the longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// So long a clock is right enough that was set by the supervisor's message.
const CLOCK_CAN_WAIT: Duration = Duration::from_millis(250);

/// Why a control connection ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading.
    #[error("cannot read from the supervisor")]
    Read(#[source] frames::Error),
    /// Writing.
    #[error("cannot write to the supervisor")]
    Write(#[source] io::Error),
    /// A message of our own.
    #[error("cannot encode a message")]
    Encode(#[source] FrameError),
    /// It closed the connection.
    #[error("the supervisor closed the connection")]
    Closed,
    /// It is of another age.
    #[error("the supervisor speaks protocol {theirs}, this agent {VERSION}: build both from one checkout")]
    Version {
        /// The supervisor's.
        theirs: u32,
    },
}

/// What a control connection is joined to.
#[derive(Clone, Debug)]
pub struct Control {
    /// Messages to send.
    pub outbox: Outbox,
    /// The agent's log.
    pub log: Log,
    /// Told anew on each connection.
    pub engine: watch::Receiver<EngineState>,
    /// What the engine is to be started with, once it is known.
    pub settings: watch::Sender<Option<EngineSettings>>,
    /// Answers to the clock's questions.
    pub answers: mpsc::Sender<Answer>,
    /// What of shared folders is watched.
    pub file_events: FileEvents,
    /// Wakes the clock.
    pub check_clock: Arc<Notify>,
    /// Told when the VM goes on from a snapshot.
    pub went_on: Arc<Notify>,
    /// Asks for the shutdown.
    pub power: mpsc::Sender<Request>,
    /// dockerd's random ports, which a fork has others of.
    pub random_ports: random_ports::Given,
}

impl Control {
    /// Connects, and again when the connection breaks, for ever.
    pub async fn run(self) {
        let mut pause = Duration::ZERO;
        loop {
            sleep(pause).await;
            let mut welcomed = None;
            match VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOST_CONTROL)).await {
                Ok(stream) => {
                    let Err(error) = self.session(stream, &mut welcomed).await;
                    self.outbox.set_connected(false);
                    self.log
                        .warn(format!("the control connection ended: {}", chain(&error)));
                }
                Err(error) if pause.is_zero() => {
                    // There is no supervisor; the engine is of use all the same.
                    self.settle(EngineSettings::default());
                    self.log.warn(format!(
                        "cannot connect to the supervisor (will try again): {error}"
                    ));
                }
                // Said once.
                Err(_) => {}
            }
            pause = next_pause(pause, welcomed.map(|welcomed: Instant| welcomed.elapsed()));
        }
    }

    /// Speaks with the supervisor until the connection ends; notes when it was `welcomed`.
    async fn session<S: AsyncRead + AsyncWrite>(
        &self,
        stream: S,
        welcomed: &mut Option<Instant>,
    ) -> Result<std::convert::Infallible, Error> {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = FrameReader::new(reader);
        let hello = AgentMessage::Hello {
            protocol: VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        write(&mut writer, &hello).await?;
        let identity = self.await_welcome(&mut reader).await?;
        *welcomed = Some(Instant::now());
        let set_by_identity = identity.is_some();
        if let Some(identity) = identity {
            self.went_on.notify_one();
            let taking = Running::begin("identity");
            let taken = identity::take(identity, self.random_ports.clone(), &self.log).await;
            write(&mut writer, &taken).await?;
            taking.end(&self.outbox);
        }
        self.outbox.set_connected(true);
        let state = self.engine.borrow().clone();
        write(&mut writer, &AgentMessage::Engine(state)).await?;
        self.check_clock(set_by_identity);
        self.file_events.begin();
        let writing = async {
            loop {
                tokio::select! {
                    message = self.outbox.next() => {
                        write(&mut writer, &message).await?;
                        self.outbox.sent();
                    }
                    message = self.file_events.next() => write(&mut writer, &message).await?,
                }
            }
        };
        tokio::select! {
            ended = writing => ended,
            ended = self.read(&mut reader) => ended,
        }
    }

    /// Has the clock compared with the host's: soon, when it was set a moment ago, since the engine's clients come first.
    fn check_clock(&self, was_set: bool) {
        if !was_set {
            return self.check_clock.notify_one();
        }
        let check_clock = self.check_clock.clone();
        tokio::spawn(async move {
            sleep(CLOCK_CAN_WAIT).await;
            check_clock.notify_one();
        });
    }

    async fn await_welcome(
        &self,
        reader: &mut FrameReader<impl AsyncRead + Unpin>,
    ) -> Result<Option<Identity>, Error> {
        loop {
            match self.next(reader).await? {
                Some(SupervisorMessage::Welcome { protocol, .. }) if protocol != VERSION => {
                    return Err(Error::Version { theirs: protocol });
                }
                Some(SupervisorMessage::Welcome {
                    hostname,
                    engine,
                    identity,
                    ..
                }) => {
                    system::set_hostname(&hostname, &self.log);
                    self.settle(engine);
                    return Ok(identity);
                }
                Some(other) => self.handle(other),
                None => {}
            }
        }
    }

    /// The first word holds: the engine is started once.
    fn settle(&self, settings: EngineSettings) {
        self.settings.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(settings);
            first
        });
    }

    async fn read<R: AsyncRead + Unpin, Never>(&self, reader: &mut FrameReader<R>) -> Result<Never, Error> {
        loop {
            if let Some(message) = self.next(reader).await? {
                self.handle(message);
            }
        }
    }

    /// The next message; `None` for one that is not understood, which is from a newer supervisor.
    async fn next(
        &self,
        reader: &mut FrameReader<impl AsyncRead + Unpin>,
    ) -> Result<Option<SupervisorMessage>, Error> {
        let frame = reader.next().await.map_err(Error::Read)?.ok_or(Error::Closed)?;
        if frame.channel != Channel::Message {
            return Ok(None);
        }
        Ok(frame
            .message()
            .inspect_err(|error| self.log.warn(format!("ignored {}", chain(error))))
            .ok())
    }

    fn handle(&self, message: SupervisorMessage) {
        match message {
            SupervisorMessage::Welcome { .. } => {}
            SupervisorMessage::Time {
                id,
                unix_ns,
                monotonic_ns,
            } => {
                // Full only when nobody waits for so many answers.
                let _ = self.answers.try_send(Answer {
                    id,
                    unix_ns,
                    monotonic_ns,
                    received: Instant::now(),
                });
            }
            SupervisorMessage::CheckClock => self.check_clock.notify_one(),
            SupervisorMessage::ForgetFiles => {
                let log = self.log.clone();
                drop(spawn_blocking(move || {
                    if let Err(error) = shares::forget_files() {
                        log.warn(format!("cannot forget files of shared folders: {error}"));
                    }
                }));
            }
            SupervisorMessage::FileEvents { events, lost, round } => {
                self.file_events.take(events, lost, round)
            }
            SupervisorMessage::Shutdown { container_grace_s } => {
                let container_grace = container_grace_s.map(|seconds| Duration::from_secs(seconds.into()));
                // Full only when a shutdown is under way.
                let _ = self.power.try_send(Request {
                    reason: Reason::Supervisor,
                    container_grace,
                });
            }
        }
    }
}

/// How long to wait before the next try to connect, after one before which there was `pause`, and which may have led to a welcome
/// that long ago. A session that was of use is followed by another at once: the guest goes on from a snapshot, whose
/// connections ended, and a supervisor whose clients wait is there.
fn next_pause(pause: Duration, welcomed: Option<Duration>) -> Duration {
    match welcomed {
        Some(lasted) if lasted >= FIRST_PAUSE => Duration::ZERO,
        _ => (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE),
    }
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), message: &AgentMessage) -> Result<(), Error> {
    let frame = encode_message(message).map_err(Error::Encode)?;
    writer.write_all(&frame).await.map_err(Error::Write)
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;

    struct Supervisor {
        reader: FrameReader<tokio::net::unix::OwnedReadHalf>,
        writer: tokio::net::unix::OwnedWriteHalf,
    }

    impl Supervisor {
        async fn read(&mut self) -> AgentMessage {
            self.reader.next().await.unwrap().unwrap().message().unwrap()
        }

        async fn write(&mut self, message: &SupervisorMessage) {
            self.writer
                .write_all(&encode_message(message).unwrap())
                .await
                .unwrap();
        }
    }

    struct Harness {
        control: Control,
        answers: mpsc::Receiver<Answer>,
        power: mpsc::Receiver<Request>,
        _engine: watch::Sender<EngineState>,
    }

    fn harness() -> Harness {
        let outbox = Outbox::new();
        let (engine, engine_receiver) = watch::channel(EngineState::Ready);
        let (answers, answers_receiver) = mpsc::channel(8);
        let (power, power_receiver) = mpsc::channel(1);
        let control = Control {
            log: Log::new(outbox.clone()),
            outbox,
            engine: engine_receiver,
            settings: watch::Sender::new(None),
            answers,
            file_events: FileEvents::default(),
            check_clock: Arc::default(),
            went_on: Arc::default(),
            power,
            random_ports: random_ports::Given::default(),
        };
        Harness {
            control,
            answers: answers_receiver,
            power: power_receiver,
            _engine: engine,
        }
    }

    fn connect(control: &Control) -> (Supervisor, tokio::task::JoinHandle<Error>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = control.clone();
        let session = tokio::spawn(async move {
            let Err(error) = control.session(ours, &mut None).await;
            error
        });
        let (reader, writer) = theirs.into_split();
        (
            Supervisor {
                reader: FrameReader::new(reader),
                writer,
            },
            session,
        )
    }

    /// Not a valid hostname, so that a test never renames the machine it runs on.
    fn welcome(protocol: u32) -> SupervisorMessage {
        SupervisorMessage::Welcome {
            protocol,
            hostname: "not a hostname".into(),
            engine: EngineSettings {
                registry_mirrors: vec!["http://mirror".into()],
                ..EngineSettings::default()
            },
            identity: None,
        }
    }

    #[tokio::test]
    async fn the_agent_greets_tells_the_engines_state_and_obeys() {
        let mut harness = harness();
        harness.control.outbox.push(AgentMessage::PoweringOff);
        let (mut supervisor, session) = connect(&harness.control);
        assert!(matches!(
            supervisor.read().await,
            AgentMessage::Hello {
                protocol: VERSION,
                ..
            }
        ));
        supervisor.write(&welcome(VERSION)).await;
        assert_eq!(supervisor.read().await, AgentMessage::Engine(EngineState::Ready));
        let settings = harness.control.settings.borrow().clone();
        assert_eq!(settings.unwrap().registry_mirrors, ["http://mirror"]);
        assert_eq!(supervisor.read().await, AgentMessage::PoweringOff);
        harness.control.check_clock.notified().await;

        let unknown = encode_message(&serde_json::json!({"type": "from-the-future", "x": 1})).unwrap();
        supervisor.writer.write_all(&unknown).await.unwrap();
        supervisor
            .write(&SupervisorMessage::Time {
                id: 7,
                unix_ns: 9,
                monotonic_ns: Some(11),
            })
            .await;
        let answer = harness.answers.recv().await.unwrap();
        assert_eq!((answer.id, answer.unix_ns, answer.monotonic_ns), (7, 9, Some(11)));
        supervisor.write(&SupervisorMessage::CheckClock).await;
        harness.control.check_clock.notified().await;
        supervisor
            .write(&SupervisorMessage::Shutdown {
                container_grace_s: Some(3),
            })
            .await;
        let request = harness.power.recv().await.unwrap();
        assert_eq!(request.container_grace, Some(Duration::from_secs(3)));
        drop(supervisor);
        assert!(matches!(
            session.await.unwrap(),
            Error::Closed | Error::Write(_) | Error::Read(_)
        ));
    }

    #[tokio::test]
    async fn messages_wait_for_the_next_connection() {
        let harness = harness();
        let (supervisor, session) = connect(&harness.control);
        drop(supervisor);
        session.await.unwrap();
        harness.control.outbox.push(AgentMessage::PoweringOff);
        let (mut supervisor, _session) = connect(&harness.control);
        supervisor.write(&welcome(VERSION)).await;
        while supervisor.read().await != AgentMessage::PoweringOff {}
        harness.control.outbox.flushed().await;
    }

    #[tokio::test]
    async fn a_supervisor_of_another_protocol_is_refused() {
        let harness = harness();
        let (mut supervisor, session) = connect(&harness.control);
        supervisor.write(&welcome(VERSION + 1)).await;
        assert!(matches!(session.await.unwrap(), Error::Version { theirs } if theirs == VERSION + 1));
    }

    #[test]
    fn what_was_of_use_is_connected_again_at_once_and_what_fails_less_and_less_often() {
        let pauses = |first, welcomes: &[Option<Duration>]| {
            let mut pause = first;
            let next = |welcomed: &Option<Duration>| {
                pause = next_pause(pause, *welcomed);
                pause.as_millis()
            };
            welcomes.iter().map(next).collect::<Vec<_>>()
        };
        let hour = Some(Duration::from_secs(3600));
        assert_eq!(pauses(LONGEST_PAUSE, &[hour, None, None, hour]), [0, 100, 200, 0]);
        let short = Some(Duration::from_millis(99));
        assert_eq!(
            pauses(Duration::ZERO, &[short; 6]),
            [100, 200, 400, 800, 1000, 1000]
        );
    }
}
