//! The socket device (section 5.10): stream sockets between the guest and programs of the host, without a network.
//!
//! ```text
//!   client ──connect──▶ muxer socket ── "CONNECT 2375\n" ──▶ REQUEST ──▶ guest port 2375
//!          ◀─ "OK 1073741824\n" ──────────────────────────── RESPONSE ◀─
//!
//!   whoever serves host port 1024 ◀── a connected socket (SCM_RIGHTS) ── REQUEST ◀── guest connects to CID 2, port 1024
//! ```
//!
//! From then on a connection is two byte streams, each with its own end, and the device keeps it so.
//!
//! # The half-close rule
//! *The end of one direction is passed on as the end of that direction alone, behind all data sent before it.*
//!
//! - A program of the host ends its direction (`shutdown(SHUT_WR)`; we read the end of the stream): the guest gets SHUTDOWN
//!   with the SEND flag **only**. It may go on sending, and the program goes on receiving.
//! - The guest sends SHUTDOWN with SEND: what waits for the host's program is passed on first, then
//!   `shutdown(SHUT_WR)` ends that direction of its socket.
//! - The guest sends SHUTDOWN with RECEIVE: `shutdown(SHUT_RD)`, and the program can write no more. A program that has
//!   gone, or reads no more, is told to the guest likewise.
//! - Only when both directions have ended is the connection closed, by SHUTDOWN with both flags and the RST that answers it.
//!
//! `echo hi | docker run -i … cat` depends on it: the client ends its direction after `hi`, and `cat` only then answers.
//! If both flags went to the guest, the answer would be lost or the client would hang.
//!
//! # Files
//! [`packet`] the header; [`credit`] who may send how much; [`connection`] the state machine; [`handshake`] the CONNECT
//! line; [`pieces`] a chain's bytes; [`socket`] the host's end; [`link`] a connection with its socket; [`muxer`] all of
//! them; [`device`] the thread and the queues.

pub mod connection;
pub mod credit;
pub mod device;
pub mod handshake;
pub mod link;
pub mod muxer;
pub mod packet;
pub mod pieces;
pub mod socket;

#[cfg(test)]
mod tests;

use super::activity::Activity;
use super::queue::VirtQueue;
use super::worker::DeviceThread;
use super::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use device::{QUEUE_SIZE, QUEUES, RX, SocketHandler, TX};
use muxer::Muxer;
use packet::{HOST_CID, Ports};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

/// Stream sockets are supported (VIRTIO_VSOCK_F_STREAM).
const F_STREAM: u64 = 1 << 0;

/// CIDs a guest can have: those below mean the hypervisor, the guest itself and the host, the one above any; and the upper
/// 32 bits are reserved.
const GUEST_CIDS: Range<u64> = HOST_CID + 1..0xffff_ffff;

/// What a socket device is made of.
#[derive(Debug)]
pub struct VsockConfig {
    /// The guest's context identifier, 3 or more.
    pub guest_cid: u64,
    /// Where clients of the host connect: a listening Unix stream socket.
    pub muxer: UnixListener,
    /// Ports of the host that the guest may connect to. For each connection one byte is sent on the socket
    /// (`SOCK_SEQPACKET`), with the descriptor of a connected, non-blocking Unix stream socket.
    pub host_ports: Vec<(u32, OwnedFd)>,
}

/// Why there can be no socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Not one that a guest can have.
    #[error("{0} cannot be the CID of a guest; use 3 to 4294967294")]
    GuestCid(u64),
    /// A port twice.
    #[error("host port {0} is given twice")]
    PortTwice(u32),
    /// The descriptor is no socket.
    #[error("cannot use the descriptor of host port {port}")]
    HostPort {
        /// Which.
        port: u32,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The descriptor is no socket.
    #[error("cannot use the muxer socket")]
    Muxer(#[source] io::Error),
}

/// What a snapshot keeps of the device. Connections do not survive one: their other ends are elsewhere. Their ports are
/// kept so that the guest can be told that they are gone, each by an RST. The event for all of them at once (section 5.10.6.7)
/// would be shorter, but Linux' sockets do not wake whoever waits to read when it comes. What listens in the guest goes on listening.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context identifier.
    pub guest_cid: u64,
    /// The host's port of the next connection, so that no port is used again soon.
    pub next_local_port: u32,
    /// Open connections: the host's port, the guest's port.
    pub connections: Vec<(u32, u32)>,
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    config: [u8; 8],
    activity: Activity<Muxer, SocketHandler>,
}

impl Vsock {
    /// A device without connections. The sockets are made non-blocking.
    ///
    /// # Errors
    /// When the configuration makes no sense, or a descriptor is no socket.
    pub fn new(config: VsockConfig) -> Result<Self, VsockError> {
        let guest_cid = config.guest_cid;
        if !GUEST_CIDS.contains(&guest_cid) {
            return Err(VsockError::GuestCid(guest_cid));
        }
        config.muxer.set_nonblocking(true).map_err(VsockError::Muxer)?;
        let mut host_ports = HashMap::new();
        for (port, connections) in config.host_ports {
            let connections =
                socket::non_blocking(connections).map_err(|source| VsockError::HostPort { port, source })?;
            if host_ports.insert(port, connections).is_some() {
                return Err(VsockError::PortTwice(port));
            }
        }
        let muxer = Muxer::new(guest_cid, config.muxer, host_ports);
        Ok(Self {
            config: guest_cid.to_le_bytes(),
            activity: Activity::Idle(muxer.into()),
        })
    }

    /// The device's state; `None` while it is active.
    pub fn state(&self) -> Option<VsockState> {
        let Activity::Idle(muxer) = &self.activity else {
            return None;
        };
        let pair = |ports: Ports| (ports.local, ports.peer);
        Some(VsockState {
            guest_cid: u64::from_le_bytes(self.config),
            next_local_port: muxer.next_local_port(),
            connections: muxer.ports().into_iter().map(pair).collect(),
        })
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        device_type::VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let unusable = [RX, TX]
            .into_iter()
            .find(|&queue| !activation.queues.get(queue).is_some_and(VirtQueue::is_ready));
        if let Some(queue) = unusable {
            return Err(ActivateError::QueueNotReady(queue));
        }
        let queues: Result<[VirtQueue; QUEUES], _> = activation.queues.try_into();
        let queues = queues.map_err(|queues| ActivateError::QueueNotReady(queues.len()))?;
        let Activation {
            memory,
            interrupt,
            thread,
            ..
        } = activation;
        let handler = |muxer| SocketHandler::new(muxer, memory, queues, interrupt.clone());
        self.activity.start(&thread, interrupt.clone(), handler)
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.activity.stop(SocketHandler::into_parts)
    }

    fn save(&mut self, _thread: &DeviceThread) -> io::Result<Vec<u8>> {
        let state = self.state();
        let state = state.ok_or_else(|| io::Error::other("the device is active"))?;
        postcard::to_allocvec(&state).map_err(io::Error::other)
    }

    fn restore(&mut self, own: &[u8]) -> io::Result<()> {
        let state: VsockState = postcard::from_bytes(own).map_err(io::Error::other)?;
        if state.guest_cid.to_le_bytes() != self.config {
            let reason = format!("the guest's CID was {}", state.guest_cid);
            return Err(io::Error::other(reason));
        }
        match &mut self.activity {
            Activity::Idle(muxer) => {
                muxer.restore(&state);
                Ok(())
            }
            _ => Err(io::Error::other("the device is active")),
        }
    }

    fn reset(&mut self) {
        if let Activity::Idle(muxer) = &mut self.activity {
            muxer.reset();
        }
    }
}
