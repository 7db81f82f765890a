//! The control connection: the agent connects to [`crate::ports::HOST_CONTROL`] when it starts and keeps it open.
//!
//! The agent speaks first ([`AgentMessage::Hello`]), the supervisor answers [`SupervisorMessage::Welcome`]; after
//! that either end sends at any time. A message with an unknown `type` is ignored, so that the two may differ in age.

use crate::file_events::{FileEvent, WatchChange};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of this protocol; the supervisor refuses an agent of another one.
pub const VERSION: u32 = 1;

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum AgentMessage {
    /// The first message.
    Hello {
        /// [`VERSION`] of the agent.
        protocol: u32,
        /// The agent's package version.
        version: String,
    },
    /// A start-up step has ended.
    Step(Step),
    /// A line of a log.
    Log(LogLine),
    /// The engine changed state.
    Engine(EngineState),
    /// The agent asks for the host's time, to be answered at once with [`SupervisorMessage::Time`].
    TimeRequest {
        /// Returned in the answer.
        id: u64,
    },
    /// The guest's clock was compared with the host's.
    Clock {
        /// Guest minus host, nanoseconds, before it was corrected.
        offset_ns: i64,
        /// Round trip of the question, nanoseconds: the offset is uncertain by half of it.
        round_trip_ns: u64,
        /// Whether the clock was stepped (a large offset) rather than slewed.
        stepped: bool,
        /// Guest's CLOCK_BOOTTIME minus host's CLOCK_MONOTONIC, nanoseconds, as uncertain: it turns the times of a
        /// [`Step`] into the host's. `None` when the host did not tell.
        #[serde(default)]
        boot_offset_ns: Option<i64>,
    },
    /// The guest's memory, every few seconds.
    Memory(GuestMemory),
    /// What containers have done until now, every few seconds.
    Containers(ContainersLoad),
    /// The guest of a snapshot is who [`SupervisorMessage::Welcome`] said it is.
    IdentityTaken {
        /// Whether its random numbers are its own. If not, nothing of it may be served.
        seeded: bool,
        /// What is not as it should be, and what that means, a line each.
        troubles: Vec<String>,
    },
    /// Who watches files of shared folders in the guest has changed its mind; all of it on a new connection.
    FileWatches {
        /// At most [`crate::file_events::MOST_IN_MESSAGE`].
        changes: Vec<WatchChange>,
        /// To be returned when everything has been told that happened until now.
        round: Option<u64>,
    },
    /// The shutdown that was asked for is over but for the power-off itself: file systems are synced and unmounted.
    PoweringOff,
}

/// How the guest uses its memory, KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// What the kernel has.
    pub total_kib: u64,
    /// What programs can still have.
    pub available_kib: u64,
    /// What is held of files.
    pub cache_kib: u64,
}

/// The processor time of all containers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainersLoad {
    /// What they took since the guest was booted, microseconds.
    pub cpu_us: u64,
    /// When: guest's CLOCK_BOOTTIME, microseconds. It stands still while the VM is suspended.
    pub clock_us: u64,
}

/// One step of the agent's start-up, for the boot timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What was done, such as `data-disk` or `dockerd`.
    pub name: String,
    /// When it began: guest's CLOCK_BOOTTIME, nanoseconds. Zero is early in the start of the guest's kernel, of which the
    /// beginning is before it.
    pub began_ns: i64,
    /// When it ended, same clock.
    pub ended_ns: i64,
}

/// One line of a log from inside the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Who wrote it.
    pub source: LogSource,
    /// How much it matters.
    pub level: LogLevel,
    /// Guest's wall clock, milliseconds since 1970.
    pub time_ms: u64,
    /// Without a line break; the agent cuts lines longer than 8 KiB.
    pub text: String,
}

/// Who wrote a [`LogLine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogSource {
    /// The agent itself.
    Agent,
    /// dockerd.
    Dockerd,
    /// containerd.
    Containerd,
}

/// How much a [`LogLine`] matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogLevel {
    /// Details.
    Debug,
    /// Normal events.
    Info,
    /// Something is off but the engine works.
    Warn,
    /// Something failed.
    Error,
}

/// What the engine is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum EngineState {
    /// containerd and dockerd were started and have not said that they are ready.
    Starting,
    /// dockerd said READY=1: the API answers.
    Ready,
    /// It died and will be started again after `retry_in_ms`.
    Failed {
        /// What happened, with the name of the daemon and how it ended.
        reason: String,
        /// The daemon's last lines, oldest first, at most 50.
        last_lines: Vec<String>,
        /// Milliseconds until the next try; `None` when the agent gave up.
        retry_in_ms: Option<u64>,
    },
    /// It was stopped because the VM is going down.
    Stopped,
}

/// What the engine is started with. It holds for as long as the VM runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct EngineSettings {
    /// `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY`, as far as the host has them.
    pub proxies: BTreeMap<String, String>,
    /// Whom the host trusts, PEM; empty when that is not known, and the image's own certificates hold.
    pub certificates: String,
    /// URLs of mirrors of Docker's registry.
    pub registry_mirrors: Vec<String>,
    /// Registries (`HOST[:PORT]` or a network) that are spoken to without TLS, or whose certificate is not checked.
    pub insecure_registries: Vec<String>,
}

/// Who the guest of a snapshot is: others may have been started from the same, or the one that was saved lives on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Random bytes of the host's, for the kernel's generator. They count as entropy.
    pub seed: [u8; 32],
    /// Host's wall clock when this was sent, nanoseconds since 1970.
    pub unix_ns: u64,
    /// What the command line would say to the kernel of this VM if it were booted: the words for
    /// [`crate::publish::RandomPorts`] and for the engine's socket ([`crate::shares::socket_word`]) hold from now on.
    pub words: String,
    /// What it may share with no other VM; `None` for the VM that was saved itself, which is only continued.
    pub fork: Option<Fork>,
}

/// A VM started from the snapshot of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fork {
    /// The Ethernet address of its network device, if it has one.
    pub mac: [u8; 6],
}

/// From the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SupervisorMessage {
    /// The answer to [`AgentMessage::Hello`].
    Welcome {
        /// [`VERSION`] of the supervisor.
        protocol: u32,
        /// The guest's hostname.
        hostname: String,
        /// What the engine is to be started with.
        engine: EngineSettings,
        /// To the guest of a snapshot, until it has answered with [`AgentMessage::IdentityTaken`].
        #[serde(default)]
        identity: Option<Identity>,
    },
    /// The answer to [`AgentMessage::TimeRequest`].
    Time {
        /// Of the question.
        id: u64,
        /// Host's wall clock, nanoseconds since 1970.
        unix_ns: u64,
        /// Host's CLOCK_MONOTONIC at the same moment, nanoseconds.
        #[serde(default)]
        monotonic_ns: Option<u64>,
    },
    /// Compare the clock now: the host may have slept, or the VM was paused.
    CheckClock,
    /// Forget files of shared folders that are not in use: each takes a descriptor on the host.
    ForgetFiles,
    /// What happened on the host to files that are watched in the guest, in its order.
    FileEvents {
        /// At most [`crate::file_events::MOST_IN_MESSAGE`].
        events: Vec<FileEvent>,
        /// More happened than the host could tell.
        lost: bool,
        /// Everything is told that had happened when the agent said this number.
        round: Option<u64>,
    },
    /// Stop containers, then the engine, sync, unmount, power off.
    Shutdown {
        /// The longest that containers get between SIGTERM and SIGKILL, seconds. Each gets the time that it was
        /// created with (10 s by default) if that is less; `None` sets no limit.
        container_grace_s: Option<u32>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_welcome_is_understood_with_an_identity_and_without() {
        let welcome = SupervisorMessage::Welcome {
            protocol: VERSION,
            hostname: "vm-1".into(),
            engine: EngineSettings::default(),
            identity: Some(Identity {
                seed: [7; 32],
                unix_ns: 9,
                words: "lighter.random-ports=1-2".into(),
                fork: Some(Fork {
                    mac: [2, 0, 0, 0, 0, 1],
                }),
            }),
        };
        let json = serde_json::to_string(&welcome).unwrap();
        assert_eq!(serde_json::from_str::<SupervisorMessage>(&json).unwrap(), welcome);
        let old = r#"{"type":"welcome","protocol":1,"hostname":"vm","engine":{}}"#;
        let SupervisorMessage::Welcome { identity, .. } = serde_json::from_str(old).unwrap() else {
            panic!("a welcome");
        };
        assert_eq!(identity, None);
    }
}
