//! CLI and supervisor: JSON lines on the VM's `control.sock`.
//!
//! A client sends one [`Request`] on a line. [`Request::Status`] is answered with one [`Status`] line,
//! [`Request::Ports`] with one line of all published ports, [`Request::Watch`] with a [`Status`] now and another at every
//! change until the VM is over, [`Request::Stop`] likewise. The connection's end is the supervisor's: a client that waits
//! for it needs no polling. [`Request::Snapshot`] is answered with one [`SnapshotAnswer`] when it is over, [`Request::Suspend`]
//! with that and then as [`Request::Watch`], [`Request::StandDown`] with `true` or `false`.

use crate::activity::{Activity, Use};
use crate::agent::{EngineState, GuestMemory, Step};
use crate::monitor::{Cage, StopReason};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The longest line either end accepts, bytes.
pub const MAX_LINE: usize = 1 << 20;

/// From a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// One [`Status`].
    Status,
    /// The published ports: a list of [`crate::publish::PublishedPort`].
    Ports,
    /// A [`Status`] now and at every change.
    Watch,
    /// As [`Request::Watch`], and the VM is in use until the client ends the connection. One that is suspended goes on, if that is
    /// what it is used for; then the first [`Status`] comes when it does. [`Phase::StandingBy`] says that it does not.
    Use {
        /// For what.
        purpose: Use,
    },
    /// End the supervisor of a VM that is suspended, which stays so; `true`, and the end of the connection, when that is over. `false`
    /// when the VM is not suspended, which is then left alone.
    StandDown,
    /// End the VM, then as [`Request::Watch`].
    Stop {
        /// Pull the plug: nothing in the guest is asked.
        force: bool,
        /// How long the guest may take to power itself off before the plug is pulled, seconds.
        timeout_s: u64,
    },
    /// Save the VM, which goes on, into [`STATE_FILE`], [`MEMORY_FILE`] and [`DISK_FILE`] in `folder`, which has none of them. The
    /// disk's layers, if it has some, are beside it: `disk.1` and so on.
    /// Whether that lasts is the client's business: nothing is synced to the disk.
    Snapshot {
        /// An absolute path.
        folder: PathBuf,
    },
    /// Save the VM into its own folder and end it, so that it can go on from there. One [`SnapshotAnswer`]; if that is
    /// [`SnapshotAnswer::Taken`], then as [`Request::Watch`].
    Suspend,
}

/// CPUs and devices of a snapshot, in its folder.
pub const STATE_FILE: &str = "state";

/// Its guest memory.
pub const MEMORY_FILE: &str = "memory";

/// Its data disk, or the base of it.
pub const DISK_FILE: &str = "disk";

/// The answer to [`Request::Snapshot`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum SnapshotAnswer {
    /// The files are complete.
    Taken(Taken),
    /// They are not, and the VM goes on.
    Failed {
        /// Why, with the chain of causes.
        reason: String,
        /// What to do about it, if there is something.
        hint: Option<String>,
    },
}

/// A VM as it was saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// How long it stood still, nanoseconds.
    pub paused_ns: u64,
    /// Whether it has a network device.
    pub network: bool,
    /// Its shared folders, in the order of their devices, each as a path that `:ro` may follow.
    pub mounts: Vec<String>,
    /// The kernel that it was booted with.
    pub kernel: UsedFile,
    /// Its root file system.
    pub image: UsedFile,
}

/// A file, and what tells whether there is another in its place by now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsedFile {
    /// Where it was.
    pub path: PathBuf,
    /// In its file system; the number of that may change with a reboot.
    pub inode: u64,
    /// Its length.
    pub bytes: u64,
    /// When it was last written to, nanoseconds since 1970.
    pub modified_ns: i64,
}

/// What a VM is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM.
    pub name: String,
    /// Where it is in its life.
    pub phase: Phase,
    /// The supervisor's process id.
    pub supervisor_pid: u32,
    /// The monitor's process id, once it was started.
    pub monitor_pid: Option<u32>,
    /// The process id of passt, where it is the network and runs.
    #[serde(default)]
    pub network_pid: Option<u32>,
    /// vCPUs.
    pub cpus: u16,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Path of the engine's socket on the host.
    pub docker_socket: String,
    /// When the supervisor started it, milliseconds since 1970.
    pub started_unix_ms: u64,
    /// When which milestone was reached.
    pub timeline: Timeline,
    /// The agent's package version, once it has greeted.
    pub agent_version: Option<String>,
    /// The agent's start-up steps, oldest first, at most [`MAX_STEPS`].
    pub steps: Vec<Step>,
    /// What the engine last said, once the agent has greeted.
    pub engine: Option<EngineState>,
    /// How often the engine has failed since the VM started.
    pub engine_failures: u32,
    /// The last comparison of the guest's clock with the host's: guest minus host, nanoseconds.
    pub clock_offset_ns: Option<i64>,
    /// The host's clock has jumped, and the guest's has not been compared with it since.
    #[serde(default)]
    pub clock_awaited: bool,
    /// How the times of the steps relate to those of the timeline, by the quickest comparison of clocks so far.
    pub boot_clock: Option<BootClock>,
    /// How the guest used its memory a few seconds ago.
    #[serde(default)]
    pub memory: Option<GuestMemory>,
    /// Whether the guest of a snapshot is itself by now; `None` for a VM that was booted.
    #[serde(default)]
    pub identity: Option<IdentityState>,
    /// What keeps the monitor from the rest of the host, once it is in its cage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cage: Option<Cage>,
    /// What it began with.
    #[serde(default)]
    pub origin: Origin,
    /// How far the template is that is made of it; `None` when none is.
    #[serde(default)]
    pub template: Option<TemplateState>,
    /// The last trouble that a device had with the host, or why the VM did not go on when it was used.
    pub trouble: Option<Trouble>,
    /// How often it did not go on when it was used, since the supervisor started.
    #[serde(default)]
    pub wake_failures: u32,
    /// Whether it is in use; in answers to [`Request::Status`] alone, for it changes all the time.
    #[serde(default)]
    pub activity: Option<Activity>,
    /// Why the VM is over, in [`Phase::Ended`].
    pub end: Option<End>,
}

/// How far the guest of a snapshot is with its identity ([`crate::agent::Identity`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdentityState {
    /// It has not answered yet; whoever wants something of it waits.
    Pending,
    /// It is itself.
    Taken,
    /// It is not, and serves nobody; the trouble says why.
    Refused,
}

/// What a VM began with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Its kernel was booted.
    #[default]
    Boot,
    /// It had been suspended.
    Suspension,
    /// A snapshot, or another VM that it was forked from.
    Snapshot,
    /// A template, of this name.
    Template(String),
}

/// How far a template is that is made of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateState {
    /// It is made when the engine is ready, before that serves anybody.
    Awaited,
    /// It is being written, while the VM goes on.
    Writing,
    /// It is there.
    Made,
    /// There is none; the trouble says why.
    Failed,
}

/// A device had trouble with the host: its disk is full, say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// The device.
    pub device: String,
    /// What happened and what that means for the guest.
    pub reason: String,
    /// When, milliseconds since 1970.
    pub unix_ms: u64,
}

/// The most steps a [`Status`] holds.
pub const MAX_STEPS: usize = 64;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It is suspended; the supervisor stands by, and has it go on when it is used.
    StandingBy,
    /// The monitor builds the machine.
    Starting,
    /// The guest's kernel runs.
    Booting,
    /// The agent runs, the engine does not answer yet (or no longer).
    EngineStarting,
    /// The engine answers.
    Ready,
    /// The VM was asked to end.
    Stopping,
    /// The VM is over.
    Ended,
}

/// Milestones of a start: host's CLOCK_MONOTONIC, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// The supervisor process runs.
    pub supervisor_started_ns: Option<u64>,
    /// The monitor process runs.
    pub monitor_started_ns: Option<u64>,
    /// The machine is built.
    pub monitor_ready_ns: Option<u64>,
    /// The first guest instruction.
    pub guest_entered_ns: Option<u64>,
    /// The agent's greeting arrived.
    pub agent_running_ns: Option<u64>,
    /// The agent said that the engine answers.
    pub engine_ready_ns: Option<u64>,
}

/// The guest's CLOCK_BOOTTIME, which [`Step`]s are stamped by, beside the host's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootClock {
    /// Guest's minus host's, nanoseconds.
    pub offset_ns: i64,
    /// How long the question for the host's time was on its way, nanoseconds: the offset is uncertain by half of it.
    pub round_trip_ns: u64,
}

impl BootClock {
    /// A guest's time on the host's clock. The guest may say anything: what no clock shows becomes the nearest that one does.
    pub fn to_host_ns(self, guest_ns: i64) -> u64 {
        let host = i128::from(guest_ns) - i128::from(self.offset_ns);
        u64::try_from(host.max(0)).unwrap_or(u64::MAX)
    }

    /// How far a converted time may be off, nanoseconds.
    pub fn error_ns(self) -> u64 {
        self.round_trip_ns / 2
    }
}

/// Why a VM is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// What ended it; failures before the monitor ran are [`StopReason::Failed`].
    pub reason: StopReason,
    /// Whether it was asked to end.
    pub requested: bool,
    /// When, milliseconds since 1970.
    pub unix_ms: u64,
    /// What to do about it, if there is something.
    pub hint: Option<String>,
    /// The last lines that tell why (console or monitor), oldest first.
    pub last_lines: Vec<String>,
}

impl End {
    /// Whether nothing went wrong.
    pub fn is_clean(&self) -> bool {
        match self.reason {
            StopReason::PowerOff | StopReason::Requested => true,
            StopReason::Reset => self.requested,
            StopReason::GuestCrashed { .. } | StopReason::Failed { .. } => false,
        }
    }

    /// One sentence without a full stop.
    pub fn sentence(&self) -> String {
        match &self.reason {
            StopReason::PowerOff if self.requested => "the guest shut down".into(),
            StopReason::PowerOff => "the guest powered itself off".into(),
            StopReason::Reset => "the guest reset itself (a kernel panic or a reboot)".into(),
            StopReason::Requested => "the VM was stopped hard".into(),
            StopReason::GuestCrashed { detail } => format!("the guest crashed: {detail}"),
            StopReason::Failed { detail } => detail.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(reason: StopReason, requested: bool) -> End {
        End {
            reason,
            requested,
            unix_ms: 0,
            hint: None,
            last_lines: vec![],
        }
    }

    #[test]
    fn a_guests_time_becomes_the_hosts_whatever_the_guest_says() {
        let clock = |offset_ns| BootClock {
            offset_ns,
            round_trip_ns: 7,
        };
        assert_eq!(clock(-500).to_host_ns(20), 520);
        assert_eq!(clock(500).to_host_ns(520), 20);
        assert_eq!(clock(500).to_host_ns(20), 0);
        assert_eq!(clock(-500).to_host_ns(-20), 480);
        assert_eq!(clock(i64::MIN).to_host_ns(i64::MAX), u64::MAX);
        assert_eq!(clock(i64::MAX).to_host_ns(i64::MIN), 0);
        assert_eq!(clock(0).error_ns(), 3);
    }

    #[test]
    fn a_reset_is_clean_only_when_it_was_asked_for() {
        assert!(end(StopReason::Reset, true).is_clean());
        assert!(!end(StopReason::Reset, false).is_clean());
        assert!(end(StopReason::PowerOff, false).is_clean());
    }

    #[test]
    fn requests_are_one_flat_object() {
        let stop = Request::Stop {
            force: true,
            timeout_s: 3,
        };
        let json = r#"{"command":"stop","force":true,"timeout_s":3}"#;
        assert_eq!(serde_json::to_string(&stop).unwrap(), json);
        assert_eq!(serde_json::from_str::<Request>(json).unwrap(), stop);
        let unknown = r#"{"command":"stop","force":true,"timeout_s":3,"x":1}"#;
        assert!(serde_json::from_str::<Request>(unknown).is_err());
    }
}
