//! Supervisor and monitor.
//!
//! The supervisor starts `lighter-vmm run` with a [`Machine`] as JSON on its standard input (read to the end) and
//! with the file descriptors it names inherited: the monitor opens nothing itself. [`Event`]s come as JSON lines on
//! [`Machine::events`]; the control socket takes one [`Request`] and gives one [`Response`] a line.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::RawFd;

/// A microVM to build. Every `RawFd` is an open descriptor inherited from the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Shown in messages and thread names.
    pub name: String,
    /// Virtual CPUs, at least 1.
    pub cpus: u16,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// `/dev/kvm`.
    pub kvm: RawFd,
    /// What the guest begins with.
    pub start: Start,
    /// In the order of the guest's /dev/vda, /dev/vdb, ….
    pub disks: Vec<Disk>,
    /// The network device, if there is one.
    pub net: Option<Net>,
    /// Shared folders, each a file system device.
    pub shares: Vec<Share>,
    /// The socket device.
    pub vsock: Vsock,
    /// Where the guest's serial console goes.
    pub console: Option<Console>,
    /// A listening Unix stream socket for [`Request`]s.
    pub control: RawFd,
    /// A pipe or socket for [`Event`]s.
    pub events: RawFd,
    /// Refuse to run the VM when a layer of the monitor's [`Cage`] is missing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
}

/// What keeps a monitor that its guest has taken over from the rest of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cage {
    /// An empty root, no network and nobody's processes, by namespaces of its own.
    pub namespaces: Layer,
    /// Nothing can be opened but what is below shared folders, by their threads.
    pub landlock: Layer,
    /// Each thread asks the kernel for nothing but what it is for.
    pub seccomp: Layer,
}

impl Cage {
    /// The layers that are missing, by name, and why each is.
    pub fn missing(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let layers = [
            ("namespaces", &self.namespaces),
            ("landlock", &self.landlock),
            ("seccomp", &self.seccomp),
        ];
        layers.into_iter().filter_map(|(name, layer)| match layer {
            Layer::On => None,
            Layer::Missing { why } => Some((name, why.as_str())),
        })
    }

    /// The same in words, each such as `landlock (the kernel has none)`.
    pub fn holes(&self) -> Vec<String> {
        self.missing()
            .map(|(layer, why)| format!("{layer} ({why})"))
            .collect()
    }
}

/// One layer of a [`Cage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Layer {
    /// It is there.
    On,
    /// It is not.
    Missing {
        /// The host's reason.
        why: String,
    },
}

/// What a guest begins with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Start {
    /// A boot.
    Kernel(Kernel),
    /// Where a snapshot's guest was. CPUs, memory, disks, folders and whether there is a network are as they were then.
    Snapshot(Snapshot),
}

/// A VM that [`Request::Save`] saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// CPUs and devices.
    pub state: RawFd,
    /// Guest memory, mapped privately: the file is read as long as the VM runs, and must never change.
    pub memory: RawFd,
    /// What [`Request::WorkingSet`] noted of another VM of the same snapshot: it is had ready while the guest starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set: Option<RawFd>,
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// An ELF `vmlinux` with a PVH note, or a bzImage.
    pub image: RawFd,
    /// Kernel command line, at most 2,047 bytes of ASCII.
    pub command_line: String,
}

/// A virtio block device over a raw file, or over one with layers above it (`lighter-disk`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Shown in messages, and the guest's serial number (at most 20 bytes of ASCII).
    pub id: String,
    /// A regular file or block device, its length a multiple of 512 bytes.
    pub file: RawFd,
    /// Layers above it, the lowest first: all but the last are only read then, and locked as if they were `read_only`.
    pub layers: Vec<RawFd>,
    /// Whether writes are refused. A shared lock is taken if so, an exclusive one otherwise.
    pub read_only: bool,
}

/// A virtio network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// Largest packet, bytes after the Ethernet header.
    pub mtu: u16,
    /// What its link is, of which the guest's driver is told what it offers.
    pub kind: NetKind,
    /// Where that begins; without, the link is down until [`Request::Plug`].
    pub plug: Option<RawFd>,
}

/// What a network device's link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetKind {
    /// A connected Unix stream socket of Ethernet frames, each behind its length as 32 bits big endian (passt's protocol).
    Stream,
    /// A descriptor of `/dev/net/tun` to which a tap is attached, with a virtio header of 12 bytes before each packet.
    Tap,
}

/// A virtio file system device: a folder of the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// What the guest mounts it by, 1 to 36 bytes.
    pub tag: String,
    /// The folder's path, for messages; nothing is opened by it.
    pub path: String,
    /// The folder, opened with `O_PATH` or for reading.
    pub folder: RawFd,
    /// Whether changes are refused.
    pub read_only: bool,
}

/// The virtio socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's CID, 3 or more.
    pub guest_cid: u64,
    /// Host to guest: a listening Unix stream socket; a client writes `CONNECT <port>\n` and reads `OK <port>\n`,
    /// or the connection is closed when nobody listens on that port in the guest.
    pub muxer: RawFd,
    /// Guest to host: the ports that may be connected to. Others are refused.
    pub host_ports: Vec<HostPort>,
}

/// A host port that the guest may connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPort {
    /// vsock port on CID 2.
    pub port: u32,
    /// One end of a `SOCK_SEQPACKET` pair: for each guest connection the monitor sends one byte with the descriptor of a
    /// connected Unix stream socket.
    pub connections: RawFd,
}

/// The serial console's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// A regular file, appended to.
    pub log: RawFd,
    /// The file never grows beyond this, bytes; the oldest half is dropped when it is full.
    pub max_bytes: u64,
}

/// What happened to the VM, with when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Host's CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened to the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The monitor process runs: stamped as early as possible.
    ProcessStarted,
    /// It is in its cage.
    Caged {
        /// What of it this host has.
        cage: Cage,
    },
    /// The machine is built; vCPUs are about to run.
    Ready,
    /// vCPU 0 enters the guest for the first time.
    GuestEntered,
    /// vCPUs and devices are stopped by request.
    Paused,
    /// They run again.
    Resumed,
    /// Both files of the snapshot that [`Request::Save`] began are written. Syncing them to the disk is the supervisor's or its
    /// client's.
    Saved,
    /// It is not, and never will be.
    SaveFailed {
        /// Why, with the chain of causes.
        reason: String,
    },
    /// The guest broke a device's rules; the device is dead until the guest resets it.
    DeviceFailed {
        /// Device, such as `block data`.
        device: String,
        /// What it did.
        reason: String,
    },
    /// The host cannot do what a device asks of it, such as writing to a full disk. The guest sees errors; the device goes on.
    DeviceTrouble {
        /// Device, such as `block data`.
        device: String,
        /// What the host could not do, and what to do about it.
        reason: String,
    },
    /// The guest remembers so many files of a shared folder that the host runs out of descriptors for them if it does not
    /// forget some.
    DeviceCrowded {
        /// Device, such as `fs /home/me`.
        device: String,
    },
    /// The VM is over; the monitor exits next.
    Stopped {
        /// Why.
        #[serde(flatten)]
        reason: StopReason,
    },
}

/// Why a VM is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum StopReason {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset (reboot or panic).
    Reset,
    /// [`Request::Stop`].
    Requested,
    /// A triple fault or another shutdown of a vCPU.
    GuestCrashed {
        /// Which vCPU, and where its instruction pointer stood.
        detail: String,
    },
    /// The machine could not be built or run.
    Failed {
        /// The whole chain of causes, one line.
        detail: String,
    },
}

/// A request on the control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What state the VM is in.
    Status,
    /// Stop vCPUs and devices, keep everything.
    Pause,
    /// Undo [`Request::Pause`].
    Resume,
    /// Save the paused VM into two empty regular files, whose descriptors come with this line (`SCM_RIGHTS`): CPUs and
    /// devices, then memory. Answered when the VM may go on; memory is written behind its back, and the end of that is an
    /// event, [`EventKind::Saved`] or [`EventKind::SaveFailed`]. Disks are the caller's, to be copied before the VM goes on.
    Save,
    /// Note into an empty regular file, whose descriptor comes with this line, which pages of its memory a VM has touched that
    /// goes on from a snapshot: for [`Snapshot::working_set`].
    WorkingSet,
    /// Freeze what a disk of the paused VM was written to until now, and write to a new and empty layer from here on, whose
    /// descriptor comes with this line. The frozen file is complete and synced when this is answered.
    AddLayer {
        /// [`Disk::id`].
        disk: String,
        /// The descriptor of another layer comes before that one: it takes the place of all that were frozen before, but for the
        /// base.
        merged: bool,
    },
    /// Have the network device's link begin at the descriptor that comes with this line, of the kind that it is.
    Plug,
    /// Have it begin nowhere: the guest sees its cable pulled.
    Unplug,
    /// Press the power button: the guest decides what to do.
    PowerButton,
    /// End the VM now, as pulling the plug would; disks are flushed.
    Stop,
    /// Counters.
    Statistics,
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// Done.
    Done,
    /// To [`Request::Status`].
    Status {
        /// Running or paused.
        state: RunState,
        /// vCPUs.
        cpus: u16,
        /// Guest memory, MiB.
        memory_mib: u64,
    },
    /// To [`Request::Statistics`].
    Statistics(Statistics),
    /// The request was not carried out.
    Error {
        /// Why, with the chain of causes.
        message: String,
    },
}

/// Whether vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They do.
    Running,
    /// They were paused.
    Paused,
}

/// Counters since the VM started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// VM exits that reached the monitor, by kind.
    pub exits: BTreeMap<String, u64>,
    /// By device.
    pub devices: BTreeMap<String, Vec<QueueStatistics>>,
    /// Bytes of guest memory given back to the host by the balloon and by free page reporting.
    pub returned_bytes: u64,
}

/// Counters of one virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatistics {
    /// Notifications from the guest.
    pub kicks: u64,
    /// Descriptor chains taken.
    pub chains: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Bytes that the device wrote into the guest's buffers, such as those read from a disk.
    pub written_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_and_stop_reasons_are_flat_json() {
        let event = Event {
            monotonic_ns: 7,
            kind: EventKind::Stopped {
                reason: StopReason::GuestCrashed {
                    detail: "vCPU 0".into(),
                },
            },
        };
        let json = serde_json::to_string(&event).unwrap();
        assert_eq!(
            json,
            r#"{"monotonic_ns":7,"event":"stopped","reason":"guest-crashed","detail":"vCPU 0"}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&json).unwrap(), event);
    }

    #[test]
    fn an_unknown_request_is_refused() {
        assert!(serde_json::from_str::<Request>(r#"{"command":"explode"}"#).is_err());
        assert_eq!(
            serde_json::from_str::<Request>(r#"{"command":"power-button"}"#).unwrap(),
            Request::PowerButton
        );
    }
}
