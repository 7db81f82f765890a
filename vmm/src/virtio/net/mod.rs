//! Network device (section 5.1) over a stream of Ethernet frames, as passt speaks it.
//!
//! One receive and one transmit queue. Large packets go into several receive buffers (VIRTIO_NET_F_MRG_RXBUF), and the
//! other end's frames are known to be whole, so the driver need not check them (VIRTIO_NET_F_GUEST_CSUM). The other end
//! takes frames of up to 64 KiB, which serves better than to segment smaller ones.
//!
//! - `device`: the queues and the thread
//! - `stream`: frames on the socket
//!
//! There is no state beside the rings to save: packets under way are lost, as packets may be.

mod device;
mod stream;
#[cfg(test)]
mod tests;

use super::activity::Activity;
use super::queue::VirtQueue;
use super::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use device::NetHandler;
use std::io;
use std::os::unix::net::UnixStream;
use stream::Stream;

/// Largest size of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// The queue with buffers for packets to the guest.
const RX: usize = 0;
/// The queue with packets from the guest.
const TX: usize = 1;
const QUEUES: usize = 2;

/// Largest packets that a network can be told to carry, bytes after the Ethernet header.
pub const MTUS: std::ops::RangeInclusive<u16> = 1280..=65_520;

/// VIRTIO_NET_F_GUEST_CSUM: the driver takes packets without checking them.
const F_GUEST_CSUM: u64 = 1 << 1;
/// VIRTIO_NET_F_MTU: the configuration space has the largest packet's size.
const F_MTU: u64 = 1 << 3;
/// VIRTIO_NET_F_MAC: the configuration space has the address.
const F_MAC: u64 = 1 << 5;
/// VIRTIO_NET_F_MRG_RXBUF: a packet may take several buffers.
const F_MRG_RXBUF: u64 = 1 << 15;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest packet, of [`MTUS`].
    pub mtu: u16,
    /// Frames, each behind its length as 32 bits big endian.
    pub stream: UnixStream,
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
    /// The descriptor is no socket.
    #[error("cannot use the network's socket")]
    Socket(#[source] io::Error),
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    config: [u8; 12],
    activity: Activity<Stream, NetHandler>,
}

impl Net {
    /// A device that no driver uses yet. The socket is made non-blocking.
    ///
    /// # Errors
    /// When the configuration makes no sense, or the descriptor is no socket.
    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        if !MTUS.contains(&config.mtu) {
            return Err(NetError::Mtu(config.mtu));
        }
        if config.mac[0] & 1 != 0 {
            return Err(NetError::Mac(config.mac));
        }
        config.stream.set_nonblocking(true).map_err(NetError::Socket)?;
        // struct virtio_net_config up to its MTU; the fields between are of features that are not offered.
        let mut bytes = [0; 12];
        bytes[..6].copy_from_slice(&config.mac);
        bytes[10..].copy_from_slice(&config.mtu.to_le_bytes());
        Ok(Self {
            config: bytes,
            activity: Activity::Idle(Stream::new(config.stream).into()),
        })
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        "net"
    }

    fn device_type(&self) -> u32 {
        device_type::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        F_GUEST_CSUM | F_MTU | F_MAC | F_MRG_RXBUF
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues: [VirtQueue; QUEUES] = activation.take_queues()?;
        let Activation {
            memory,
            interrupt,
            features,
            ..
        } = activation;
        let handler = |stream| NetHandler::new(stream, memory, queues, interrupt.clone(), features);
        self.activity.start("net", interrupt.clone(), handler)
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.activity.stop(NetHandler::into_parts)
    }
}
