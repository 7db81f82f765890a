//! Why there can be no machine.

use super::devices::OTHER_DEVICES;
use crate::cage::CageError;
use crate::descriptors::DescriptorError;
use crate::memory::MemoryError;
use crate::snapshot::SnapshotError;
use crate::vcpu::registers::RegisterError;
use crate::vcpu::state::VcpuStateError;
use crate::virtio::block::BlockError;
use crate::virtio::fs::FsError;
use crate::virtio::mmio::RestoreError;
use crate::virtio::net::NetError;
use crate::virtio::vsock::VsockError;
use crate::{acpi, boot, layout};
use std::io;

/// As many CPUs as the guest kernel is built for.
pub const MAX_CPUS: u16 = 64;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An inherited descriptor is unusable.
    #[error("the supervisor's description is wrong")]
    Descriptor(#[from] DescriptorError),
    /// More CPUs than a guest can have.
    #[error("a VM has 1 to {max} CPUs, not {0}", max = MAX_CPUS)]
    Cpus(u16),
    /// More devices than there are interrupt lines for.
    #[error("a VM has at most {max} disks and shared folders, not {0}", max = layout::MAX_VIRTIO_DEVICES - OTHER_DEVICES)]
    Devices(usize),
    /// The KVM of this host is too old.
    #[error("this host's KVM lacks {0}")]
    Capability(&'static str),
    /// A KVM call failed.
    #[error("KVM: cannot {what}")]
    Kvm {
        /// What was asked for.
        what: &'static str,
        /// KVM's reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host's CPU has more features than KVM takes back.
    #[error("the host's CPUID has too many leaves")]
    Cpuid,
    /// The cage.
    #[error(transparent)]
    Cage(#[from] CageError),
    /// Guest memory.
    #[error("no guest memory")]
    Memory(#[from] MemoryError),
    /// A disk cannot be attached.
    #[error("cannot attach disk {id}")]
    Disk {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: BlockError,
    },
    /// A folder cannot be shared.
    #[error("cannot share the folder {path}")]
    Share {
        /// Its path.
        path: String,
        /// Why.
        #[source]
        source: FsError,
    },
    /// The network device.
    #[error("cannot make the network device")]
    Net(#[source] NetError),
    /// The socket device.
    #[error("cannot make the socket device")]
    Vsock(#[source] VsockError),
    /// An operating system resource is missing.
    #[error("cannot make the {0}")]
    Os(&'static str, #[source] io::Error),
    /// The kernel.
    #[error("cannot boot")]
    Boot(#[from] boot::BootError),
    /// ACPI tables.
    #[error("cannot describe the hardware")]
    Acpi(#[from] acpi::AcpiError),
    /// The snapshot's file.
    #[error("cannot use the snapshot")]
    Snapshot(#[from] SnapshotError),
    /// The snapshot is of a machine that was built otherwise.
    #[error("the snapshot is of a VM with {saved}, and this one has {here}")]
    Other {
        /// What there was.
        saved: String,
        /// What there is.
        here: String,
    },
    /// A device cannot go on.
    #[error("cannot restore the device {device}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        #[source]
        source: RestoreError,
    },
    /// A vCPU cannot go on.
    #[error("cannot restore a vCPU")]
    Vcpu(#[from] VcpuStateError),
    /// vCPU state.
    #[error("cannot set up a vCPU")]
    Registers(#[from] RegisterError),
    /// Boot data.
    #[error("cannot write to guest memory")]
    GuestMemory(#[source] vm_memory::GuestMemoryError),
}
