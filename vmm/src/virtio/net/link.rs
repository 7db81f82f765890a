//! What is at the other end of the device's cable.

use super::stream::Stream;
use super::tap::Tap;
use lighter_protocol::monitor::NetKind;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

/// The longest frame in either direction, bytes: the largest MTU with a header and a tag, rounded up.
pub(super) const MAX_FRAME: usize = 65_552;

/// Length of `struct virtio_net_hdr_v1` (section 5.1.6), which is before each frame in the queues.
pub(super) const HEADER: usize = 12;

/// VIRTIO_NET_HDR_F_DATA_VALID: the checksum was checked.
const DATA_VALID: u8 = 2;

/// Why no more packets come or go.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The other end has closed it.
    #[error("the other end of the network's link is gone")]
    Ended,
    /// Reading or writing failed.
    #[error("the network's socket failed")]
    Socket(#[source] io::Error),
    /// A length that no frame has.
    #[error("the other end of the network's socket sent nonsense: a frame of {0} bytes")]
    Length(usize),
    /// There is no such interface any more, most likely.
    #[error("the host's interface for the guest's network is gone")]
    Tap(#[source] io::Error),
}

/// A packet for the guest.
#[derive(Debug)]
pub(super) struct Packet<'a> {
    pub(super) header: [u8; HEADER],
    pub(super) frame: &'a [u8],
}

/// The other end.
#[derive(Debug)]
pub(super) enum Link {
    /// A program that speaks passt's protocol.
    Stream(Stream),
    /// An interface of the host's.
    Tap(Tap),
    /// Nothing: what the guest sends is thrown away.
    Unplugged,
}

impl Link {
    /// Makes the descriptor non-blocking.
    ///
    /// # Errors
    /// When it is not what `kind` says.
    pub(super) fn new(kind: NetKind, plug: Option<OwnedFd>) -> io::Result<Self> {
        let Some(plug) = plug else {
            return Ok(Self::Unplugged);
        };
        match kind {
            NetKind::Stream => Stream::new(plug.into()).map(Self::Stream),
            NetKind::Tap => Tap::new(plug.into()).map(Self::Tap),
        }
    }

    /// To wait for, if there is anything.
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Stream(stream) => Some(stream.fd()),
            Self::Tap(tap) => Some(tap.fd()),
            Self::Unplugged => None,
        }
    }

    /// The driver takes no packets but those that `features` allow.
    pub(super) fn agree(&mut self, features: u64) {
        if let Self::Tap(tap) = self {
            tap.agree(features);
        }
    }

    /// The next packet for the guest, if all of it is there. It stays the next until [`Self::consume`]. With `unchecked` the
    /// driver need not check what is known to be whole.
    ///
    /// # Errors
    /// When no more packets will come.
    pub(super) fn next_packet(&mut self, unchecked: bool) -> Result<Option<Packet<'_>>, LinkError> {
        match self {
            Self::Stream(stream) => {
                let mut header = [0; HEADER];
                header[0] = if unchecked { DATA_VALID } else { 0 };
                Ok(stream.next_frame()?.map(|frame| Packet { header, frame }))
            }
            Self::Tap(tap) => tap.next_packet(),
            Self::Unplugged => Ok(None),
        }
    }

    /// Uses the packet up that [`Self::next_packet`] gave.
    pub(super) fn consume(&mut self) {
        match self {
            Self::Stream(stream) => stream.consume(),
            Self::Tap(tap) => tap.consume(),
            Self::Unplugged => {}
        }
    }

    /// Whether another packet may be added.
    pub(super) fn has_room(&mut self) -> bool {
        match self {
            Self::Stream(stream) => stream.has_room(),
            Self::Tap(tap) => tap.has_room(),
            Self::Unplugged => true,
        }
    }

    /// Adds a packet of the guest with a frame of `length` bytes, at most [`MAX_FRAME`], that `fill` writes; it goes out with
    /// [`Self::flush`]. Takes nothing when `fill` fails.
    ///
    /// # Errors
    /// As `fill`.
    pub(super) fn add<E>(
        &mut self,
        header: [u8; HEADER],
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            // No feature was offered that would give the header a meaning.
            Self::Stream(stream) => stream.add(length, fill),
            Self::Tap(tap) => tap.add(header, length, fill),
            Self::Unplugged => Ok(()),
        }
    }

    /// Writes what there is to write, as far as the other end takes it; says whether that was all.
    ///
    /// # Errors
    /// When the other end takes no more.
    pub(super) fn flush(&mut self) -> Result<bool, LinkError> {
        match self {
            Self::Stream(stream) => stream.flush(),
            Self::Tap(tap) => tap.flush(),
            Self::Unplugged => Ok(true),
        }
    }
}
