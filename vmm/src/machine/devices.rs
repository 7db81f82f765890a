//! The devices, from the description, and their wires.

use super::error::MachineError;
use super::kvm::{irq_line, kvm_error};
use crate::bus::Bus;
use crate::cage::Cage;
use crate::descriptors::Inherited;
use crate::layout;
use crate::memory::GuestMemory;
use crate::serial::{CappedLog, SerialConsole, SerialState};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockConfig};
use crate::virtio::fs::{Fs, FsConfig};
use crate::virtio::mmio::{MmioTransport, QUEUE_NOTIFY_OFFSET};
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockConfig};
use kvm_ioctls::{IoEventAddress, VmFd};
use lighter_protocol::monitor::Machine;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

/// net, vsock, rng and balloon.
pub(super) const OTHER_DEVICES: usize = 4;

pub(super) fn make_devices(
    description: &Machine,
    inherited: &mut Inherited,
    balloon: Balloon,
) -> Result<Vec<Box<dyn VirtioDevice>>, MachineError> {
    let disks_and_shares = description.disks.len() + description.shares.len();
    if disks_and_shares > layout::MAX_VIRTIO_DEVICES - OTHER_DEVICES {
        return Err(MachineError::Devices(disks_and_shares));
    }
    let mut devices: Vec<Box<dyn VirtioDevice>> = vec![];
    for disk in &description.disks {
        let file = inherited.take(disk.file, &format!("disk {}", disk.id))?.into();
        let layers = disk.layers.iter().enumerate();
        let layers = layers.map(|(number, layer)| {
            inherited.take(*layer, &format!("layer {} of disk {}", number + 1, disk.id))
        });
        let layers: Result<Vec<OwnedFd>, _> = layers.collect();
        let config = BlockConfig {
            id: disk.id.clone(),
            file,
            layers: layers?.into_iter().map(File::from).collect(),
            read_only: disk.read_only,
        };
        let block = Block::new(config);
        let block = block.map_err(|source| MachineError::Disk {
            id: disk.id.clone(),
            source,
        })?;
        devices.push(Box::new(block));
    }
    if let Some(net) = &description.net {
        let config = NetConfig {
            mac: net.mac,
            mtu: net.mtu,
            kind: net.kind,
            plug: net.plug.map(|plug| inherited.take(plug, "network")).transpose()?,
        };
        devices.push(Box::new(Net::new(config).map_err(MachineError::Net)?));
    }
    // One connection of the socket device takes one, too: a quarter is for those and for the rest.
    let descriptors = descriptor_limit() / 4 * 3;
    for share in &description.shares {
        let config = FsConfig {
            tag: share.tag.clone(),
            path: share.path.clone(),
            folder: inherited.take(share.folder, &format!("shared folder {}", share.path))?,
            read_only: share.read_only,
            descriptors: descriptors / description.shares.len() as u64,
        };
        let device = Fs::new(config).map_err(|source| MachineError::Share {
            path: share.path.clone(),
            source,
        })?;
        devices.push(Box::new(device));
    }
    let vsock = &description.vsock;
    let mut host_ports = vec![];
    for port in &vsock.host_ports {
        host_ports.push((
            port.port,
            inherited.take(port.connections, &format!("vsock port {}", port.port))?,
        ));
    }
    let muxer = UnixListener::from(inherited.take(vsock.muxer, "vsock muxer")?);
    let config = VsockConfig {
        guest_cid: vsock.guest_cid,
        muxer,
        host_ports,
    };
    devices.push(Box::new(Vsock::new(config).map_err(MachineError::Vsock)?));
    devices.push(Box::new(Rng::new()));
    devices.push(Box::new(balloon));
    Ok(devices)
}

/// How many files this process may have open.
fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for writing. It cannot fail for it.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur
}

/// Wires the devices and the console, with its registers if it was saved, to interrupts and notifications, and starts the devices'
/// threads.
pub(super) fn attach(
    description: &Machine,
    inherited: &mut Inherited,
    vm: &VmFd,
    memory: &GuestMemory,
    devices: Vec<Box<dyn VirtioDevice>>,
    serial: Option<&SerialState>,
    cage: Cage,
) -> Result<Bus, MachineError> {
    let mut virtio = vec![];
    for (number, mut device) in (0u32..).zip(devices) {
        let line = irq_line(vm, layout::VIRTIO_GSI + number)?;
        let transport = || {
            let prepare = cage.prepare(device.device_type(), device.prepare()?);
            MmioTransport::new(device, memory.clone(), line, prepare)
        };
        let transport =
            transport().map_err(|error| MachineError::Os("a device's notifications and thread", error))?;
        let window = layout::VIRTIO_MMIO + u64::from(number) * layout::VIRTIO_MMIO_STRIDE;
        let notify = IoEventAddress::Mmio(window + QUEUE_NOTIFY_OFFSET);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            vm.register_ioevent(kick, &notify, queue)
                .map_err(kvm_error("listen to device notifications"))?;
        }
        virtio.push(Arc::new(Mutex::new(transport)));
    }
    let console_error = |error| MachineError::Os("console log", error);
    let log = match &description.console {
        Some(console) => {
            let file = inherited.take(console.log, "console log")?.into();
            Some(CappedLog::new(file, console.max_bytes).map_err(console_error)?)
        }
        None => None,
    };
    let line = irq_line(vm, layout::SERIAL_GSI)?;
    let serial = match serial {
        Some(state) => SerialConsole::restore(state, line, log).map_err(console_error)?,
        None => SerialConsole::new(line, log),
    };
    Ok(Bus::new(virtio, serial))
}
