//! Ethernet frames on a stream socket, each behind its length as 32 bits big endian: the protocol of passt and of QEMU's
//! stream sockets. The other end is a program of the host's, but one that talks to the whole world.

use super::link::{LinkError, MAX_FRAME};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes of a length.
const LENGTH: usize = 4;

/// Frames are read and written in lots of about this many bytes.
const LOT: usize = 256 << 10;

/// Both directions of the socket.
#[derive(Debug)]
pub(super) struct Stream {
    socket: UnixStream,
    /// Bytes that were read: those from `begin` to `end` are not used up.
    incoming: Vec<u8>,
    begin: usize,
    end: usize,
    /// Length of the frame that was given last.
    next: usize,
    /// Bytes that are to be written.
    outgoing: Vec<u8>,
    written: usize,
}

impl Stream {
    /// Over a socket, which is made non-blocking.
    ///
    /// # Errors
    /// When it is none.
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            incoming: vec![],
            begin: 0,
            end: 0,
            next: 0,
            outgoing: vec![],
            written: 0,
        })
    }

    /// The socket, to wait for.
    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The next frame, if all of it is there. It stays the next until [`Self::consume`].
    ///
    /// # Errors
    /// When no more frames will come.
    pub(super) fn next_frame(&mut self) -> Result<Option<&[u8]>, LinkError> {
        loop {
            let have = &self.incoming[self.begin..self.end];
            if let Some((length, rest)) = have.split_first_chunk::<LENGTH>() {
                // Fits: usize has at least 32 bits here.
                let length = u32::from_be_bytes(*length) as usize;
                if length == 0 || length > MAX_FRAME {
                    return Err(LinkError::Length(length));
                }
                if rest.len() >= length {
                    let from = self.begin + LENGTH;
                    self.next = length;
                    return Ok(Some(&self.incoming[from..from + length]));
                }
            }
            if !self.read()? {
                return Ok(None);
            }
        }
    }

    /// Uses the frame up that [`Self::next_frame`] gave.
    pub(super) fn consume(&mut self) {
        self.begin = (self.begin + LENGTH + self.next).min(self.end);
    }

    /// Reads once; says whether anything came.
    fn read(&mut self) -> Result<bool, LinkError> {
        self.incoming.resize(LOT, 0);
        // What is left is less than a frame.
        self.incoming.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        loop {
            match self.socket.read(&mut self.incoming[self.end..]) {
                Ok(0) => return Err(LinkError::Ended),
                Ok(count) => {
                    self.end += count;
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(LinkError::Socket(error)),
            }
        }
    }

    /// Whether another frame may be added.
    pub(super) fn has_room(&self) -> bool {
        self.outgoing.len() < LOT
    }

    /// Adds a frame of `length` bytes that `fill` writes; it goes out with [`Self::flush`]. Takes nothing when `fill` fails.
    ///
    /// # Errors
    /// As `fill`.
    pub(super) fn add<E>(
        &mut self,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        debug_assert!((1..=MAX_FRAME).contains(&length));
        let begin = self.outgoing.len();
        self.outgoing.extend((length as u32).to_be_bytes());
        self.outgoing.resize(begin + LENGTH + length, 0);
        fill(&mut self.outgoing[begin + LENGTH..]).inspect_err(|_| self.outgoing.truncate(begin))
    }

    /// Writes what there is to write, as far as the other end takes it; says whether that was all.
    ///
    /// # Errors
    /// When the other end takes no more.
    pub(super) fn flush(&mut self) -> Result<bool, LinkError> {
        while self.written < self.outgoing.len() {
            match self.socket.write(&self.outgoing[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(LinkError::Ended),
                Err(error) => return Err(LinkError::Socket(error)),
            }
        }
        self.outgoing.clear();
        self.written = 0;
        Ok(true)
    }
}
