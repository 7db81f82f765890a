//! Network device (section 5.1): one receive and one transmit queue, and a link that can be plugged in and pulled while it runs.
//!
//! Large packets go into several receive buffers (VIRTIO_NET_F_MRG_RXBUF). Where they come from is one of two:
//!
//! - passt's stream of Ethernet frames: they are known to be whole, so the driver need not check them
//!   (VIRTIO_NET_F_GUEST_CSUM), and are of up to 64 KiB in both directions, which serves better than to segment smaller ones;
//! - a tap: the host's kernel takes and gives packets with the driver's own header, so that checksums and segments are left to it
//!   in both directions.
//!
//! The parts:
//!
//! - `device`: the queues and the thread
//! - `link`: whichever of the two it is
//! - `stream`: frames on the socket
//! - `tap`: packets of the host's interface
//!
//! There is no state beside the rings to save: packets under way are lost, as packets may be.

mod device;
mod link;
mod stream;
mod tap;
#[cfg(test)]
mod tests;

use super::activity::Activity;
use super::queue::VirtQueue;
use super::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use device::NetHandler;
use lighter_protocol::monitor::NetKind;
use link::Link;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What it is called.
pub const NAME: &str = "net";

/// Largest size of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// The queue with buffers for packets to the guest.
const RX: usize = 0;
/// The queue with packets from the guest.
const TX: usize = 1;
const QUEUES: usize = 2;

/// Largest packets that a network can be told to carry, bytes after the Ethernet header.
pub const MTUS: std::ops::RangeInclusive<u16> = 1280..=65_520;

/// VIRTIO_NET_F_CSUM: the device takes packets whose checksum is to be completed.
const F_CSUM: u64 = 1;
/// VIRTIO_NET_F_GUEST_CSUM: the driver takes packets without checking them.
const F_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_MTU: the configuration space has the largest packet's size.
const F_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC: the configuration space has the address.
const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN: the driver takes TCP packets that are longer than the
/// MTU, with congestion notification.
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
/// VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN: the device does.
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
/// VIRTIO_NET_F_MRG_RXBUF: a packet may take several buffers.
const F_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_STATUS: the configuration space says whether the link is up.
const F_STATUS: u64 = 1 << 16;

/// What is left to the host's kernel behind a tap.
const F_OFFLOADS: u64 =
    F_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN;

/// Where in the configuration space the link's status is, and its length in all.
const STATUS: usize = 6;
const CONFIG: usize = 12;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest packet, of [`MTUS`].
    pub mtu: u16,
    /// What its link is.
    pub kind: NetKind,
    /// Where that begins, see [`lighter_protocol::monitor::Net::plug`]; `None` is a link that is down.
    pub plug: Option<OwnedFd>,
}

/// Why there can be no network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not a size that works everywhere.
    #[error("an MTU of {0} bytes is not possible; use {min} to {max}", min = MTUS.start(), max = MTUS.end())]
    Mtu(u16),
    /// Not the address of one machine.
    #[error("{0:02x?} cannot be a machine's Ethernet address: it is a group's")]
    Mac([u8; 6]),
    /// The descriptor is not what it should be.
    #[error("cannot use the network's descriptor")]
    Descriptor(#[source] io::Error),
    /// The device is another.
    #[error("{0} is not a network device")]
    Kind(String),
    /// It is not there.
    #[error("the VM has no network device")]
    None,
    /// Its link is with a thread that did not come back.
    #[error("the network device is lost; restart the VM")]
    Lost,
}

/// Whether the link is up; clones are the same link's.
#[derive(Clone, Debug, Default)]
struct LinkStatus(Arc<AtomicBool>);

impl LinkStatus {
    fn set(&self, up: bool) {
        self.0.store(up, Ordering::SeqCst);
    }

    fn is_up(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    /// `struct virtio_net_config` up to its MTU; fields of features that are not offered are zero, and so is the status.
    config: [u8; CONFIG],
    kind: NetKind,
    status: LinkStatus,
    activity: Activity<Link, NetHandler>,
}

impl Net {
    /// A device that no driver uses yet. The descriptor is made non-blocking.
    ///
    /// # Errors
    /// When the configuration makes no sense, or the descriptor is of no use.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        if !MTUS.contains(&config.mtu) {
            return Err(NetError::Mtu(config.mtu));
        }
        if config.mac[0] & 1 != 0 {
            return Err(NetError::Mac(config.mac));
        }
        let mut bytes = [0; CONFIG];
        bytes[..STATUS].copy_from_slice(&config.mac);
        bytes[10..].copy_from_slice(&config.mtu.to_le_bytes());
        let mut net = Self {
            config: bytes,
            kind: config.kind,
            status: LinkStatus::default(),
            activity: Activity::Idle(Link::Unplugged.into()),
        };
        net.plug(config.plug)?;
        Ok(net)
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        NAME
    }

    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        let offloads = match self.kind {
            NetKind::Stream => 0,
            NetKind::Tap => F_OFFLOADS,
        };
        F_GUEST_CSUM | F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS | offloads
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.config;
        let status = if self.status.is_up() { LINK_UP } else { 0 };
        config[STATUS..STATUS + 2].copy_from_slice(&status.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues: [VirtQueue; QUEUES] = activation.take_queues()?;
        let Activation {
            memory,
            interrupt,
            features,
            thread,
            ..
        } = activation;
        let status = self.status.clone();
        let handler = |mut link: Link| {
            link.agree(features);
            NetHandler::new(link, status, memory, queues, interrupt.clone(), features)
        };
        self.activity.start(&thread, interrupt.clone(), handler)
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.activity.stop(NetHandler::into_parts)
    }

    fn plug(&mut self, plug: Option<OwnedFd>) -> Result<(), NetError> {
        let Activity::Idle(link) = &mut self.activity else {
            return Err(NetError::Lost);
        };
        **link = Link::new(self.kind, plug).map_err(NetError::Descriptor)?;
        self.status.set(link.fd().is_some());
        Ok(())
    }
}
