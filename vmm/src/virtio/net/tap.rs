//! Packets of a tap, an interface of the host's whose other end is a descriptor: one a call, each behind the header that drivers
//! write and read (IFF_VNET_HDR, with the length of [`HEADER`]).
//!
//! The host's kernel checks headers as it does any program's. What it could not have been offered is not passed on to it.

use super::link::{HEADER, LinkError, MAX_FRAME, Packet};
use super::{F_GUEST_CSUM, F_GUEST_ECN, F_GUEST_TSO4, F_GUEST_TSO6};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

/// `TUNSETOFFLOAD`, `_IOW('T', 208, unsigned int)`; and its bits.
const SET_OFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;

/// Fields of the header (section 5.1.6), and what may be in them.
const FLAGS: usize = 0;
const NEEDS_CSUM: u8 = 1;
const GSO_TYPE: usize = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Both directions of the interface.
#[derive(Debug)]
pub(super) struct Tap {
    file: File,
    /// A packet for the guest, of `have` bytes with its header; none when that is 0.
    incoming: Vec<u8>,
    have: usize,
    /// A packet of the guest that the kernel does not have yet, with its header.
    outgoing: Vec<u8>,
}

impl Tap {
    /// Of a descriptor of `/dev/net/tun` that an interface was attached to.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let fd = file.as_raw_fd();
        // SAFETY: these commands of fcntl take and give flags, and nothing else.
        let done = unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL);
            flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) == 0
        };
        if !done {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            file,
            incoming: vec![0; HEADER + MAX_FRAME],
            have: 0,
            outgoing: vec![],
        })
    }

    /// To wait for.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The kernel gives no packets but those that a driver with these features takes.
    pub(super) fn agree(&mut self, features: u64) {
        let offloads = [
            (F_GUEST_CSUM, TUN_F_CSUM),
            (F_GUEST_TSO4, TUN_F_TSO4),
            (F_GUEST_TSO6, TUN_F_TSO6),
            (F_GUEST_ECN, TUN_F_TSO_ECN),
        ];
        let agreed = offloads
            .into_iter()
            .filter(|(feature, _)| features & feature != 0);
        let offload = agreed.fold(0, |all, (_, offload)| all | offload);
        // SAFETY: the argument is a number. All that could be wrong is that the interface is gone, which is found out next.
        unsafe { libc::ioctl(self.file.as_raw_fd(), SET_OFFLOAD, libc::c_ulong::from(offload)) };
    }

    /// As `Link::next_packet`. Which packets need no checking is in the kernel's header.
    pub(super) fn next_packet(&mut self) -> Result<Option<Packet<'_>>, LinkError> {
        while self.have <= HEADER {
            match self.file.read(&mut self.incoming) {
                Ok(count) => self.have = count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(LinkError::Tap(error)),
            }
        }
        let packet = self.incoming[..self.have].split_first_chunk::<HEADER>();
        Ok(packet.map(|(header, frame)| Packet {
            header: *header,
            frame,
        }))
    }

    /// As `Link::consume`.
    pub(super) fn consume(&mut self) {
        self.have = 0;
    }

    /// As `Link::has_room`.
    pub(super) fn has_room(&mut self) -> bool {
        // What is wrong is found again by the flush that follows.
        self.flush().unwrap_or(false)
    }

    /// As `Link::add`.
    pub(super) fn add<E>(
        &mut self,
        mut header: [u8; HEADER],
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        debug_assert!(self.outgoing.is_empty() && length <= MAX_FRAME);
        header[FLAGS] &= NEEDS_CSUM;
        if !matches!(header[GSO_TYPE] & !GSO_ECN, GSO_NONE | GSO_TCPV4 | GSO_TCPV6) {
            return Ok(());
        }
        self.outgoing.extend(header);
        self.outgoing.resize(HEADER + length, 0);
        fill(&mut self.outgoing[HEADER..]).inspect_err(|_| self.outgoing.clear())
    }

    /// As `Link::flush`.
    pub(super) fn flush(&mut self) -> Result<bool, LinkError> {
        while !self.outgoing.is_empty() {
            match self.file.write(&self.outgoing) {
                Ok(_) => self.outgoing.clear(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    return Err(LinkError::Tap(error));
                }
                // The kernel does not take this packet: it is malformed, or the interface is down.
                Err(_) => self.outgoing.clear(),
            }
        }
        Ok(true)
    }
}
