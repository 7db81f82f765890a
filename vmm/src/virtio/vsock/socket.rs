//! The host's end of a connection: a Unix stream socket that is never waited for, and the bytes it would not take yet.

use super::pieces::Pieces;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A socket with what waits for it to take more.
#[derive(Debug)]
pub struct HostSocket {
    stream: UnixStream,
    /// Bytes from the guest that the socket would not take; the guest's credit bounds them.
    backlog: Vec<u8>,
    /// How many bytes at the front of the backlog are gone.
    gone: usize,
}

impl HostSocket {
    /// Takes over a connected socket.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            backlog: vec![],
            gone: 0,
        }
    }

    /// For waiting.
    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Bytes that wait.
    pub fn waiting(&self) -> usize {
        self.backlog.len() - self.gone
    }

    /// Sends the first `length` bytes of `data`, and keeps what the socket would not take. Returns how many it took.
    ///
    /// # Errors
    /// When nobody will ever read them; nothing is kept then.
    pub fn deliver(&mut self, data: &Pieces<'_>, length: usize) -> io::Result<usize> {
        let taken = if self.waiting() == 0 {
            send(self.fd(), &mut data.io_vectors(length))?
        } else {
            0
        };
        if taken < length {
            self.backlog.drain(..self.gone);
            self.gone = 0;
            let end = self.backlog.len();
            self.backlog.resize(end + length - taken, 0);
            data.copy_to(taken, &mut self.backlog[end..]);
        }
        Ok(taken)
    }

    /// Sends what waits, as far as the socket takes it, and returns how much it took.
    ///
    /// # Errors
    /// When nobody will ever read it.
    pub fn flush(&mut self) -> io::Result<usize> {
        if self.waiting() == 0 {
            return Ok(0);
        }
        let taken = send_bytes(self.fd(), &self.backlog[self.gone..])?;
        self.gone += taken;
        if self.waiting() == 0 {
            self.discard();
        }
        Ok(taken)
    }

    /// Throws away what waits, and its memory. Returns how many bytes that were.
    pub fn discard(&mut self) -> usize {
        let waiting = self.waiting();
        self.backlog = vec![];
        self.gone = 0;
        waiting
    }

    /// Receives at most `limit` bytes, not 0, into `room`. 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet; anything else when there never will be.
    pub fn receive(&self, room: &Pieces<'_>, limit: usize) -> io::Result<usize> {
        let received = receive(self.fd(), &mut room.io_vectors(limit), 0)?;
        room.mark_written(received);
        Ok(received)
    }

    /// Ends one direction or both. The other side may have gone already, which is as good.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = self.stream.shutdown(how);
    }
}

/// Looks at the next bytes without taking them.
///
/// # Errors
/// As [`HostSocket::receive`].
pub fn peek(stream: &UnixStream, into: &mut [u8]) -> io::Result<usize> {
    receive(stream.as_raw_fd(), &mut [vector(into)], libc::MSG_PEEK)
}

/// Takes bytes that [`peek`] has shown.
///
/// # Errors
/// As [`HostSocket::receive`].
pub fn take(stream: &UnixStream, into: &mut [u8]) -> io::Result<usize> {
    receive(stream.as_raw_fd(), &mut [vector(into)], 0)
}

/// Sends bytes, as far as the socket takes them.
///
/// # Errors
/// When nobody will ever read them.
pub fn send_bytes(socket: RawFd, bytes: &[u8]) -> io::Result<usize> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    send(socket, &mut [vector])
}

/// Hands one end of a new socket to whoever serves a host port, with one byte; returns the other end.
///
/// # Errors
/// When nobody takes it from `connections` (a non-blocking `SOCK_SEQPACKET` socket) now, or there are no descriptors left.
pub fn hand_over(connections: &UnixStream) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    connections.send_with_fd(&[1u8][..], theirs.as_raw_fd())?;
    Ok(ours)
}

/// Makes a connected socket of any type one that is never waited for.
///
/// # Errors
/// When it is no socket, or has no other end.
pub fn non_blocking(socket: OwnedFd) -> io::Result<UnixStream> {
    // `UnixStream` is no more than a descriptor with the calls of a connected Unix socket.
    let socket = UnixStream::from(socket);
    socket.peer_addr()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn vector(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr: no address, no vectors, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

/// How many bytes the socket took: 0 if it takes none now.
fn send(socket: RawFd, vectors: &mut [libc::iovec]) -> io::Result<usize> {
    let message = message(vectors);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the vectors, which the message points to, describe memory that the caller keeps mapped. It is only read.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, flags) };
    match usize::try_from(sent) {
        Ok(sent) => Ok(sent),
        Err(_) => match io::Error::last_os_error() {
            error if is_temporary(&error) => Ok(0),
            error => Err(error),
        },
    }
}

fn receive(socket: RawFd, vectors: &mut [libc::iovec], flags: i32) -> io::Result<usize> {
    let mut message = message(vectors);
    // SAFETY: the vectors, which the message points to, describe memory that the caller keeps mapped and may be written.
    let received = unsafe { libc::recvmsg(socket, &raw mut message, flags | libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// The host has no memory for a message now, or the socket is full.
fn is_temporary(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}
