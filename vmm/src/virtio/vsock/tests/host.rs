//! The programs of the host.

use super::guest::{CID, PATIENCE, SERVED};
use crate::virtio::vsock::VsockConfig;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// The programs of the host.
pub struct Host {
    folder: tempfile::TempDir,
    /// Serves [`SERVED`].
    connections: Option<UnixStream>,
}

impl Host {
    /// The sockets of a host, and the device's ends of them.
    pub fn new() -> (Self, VsockConfig) {
        let folder = tempfile::tempdir().unwrap();
        let muxer = UnixListener::bind(folder.path().join("muxer")).unwrap();
        let (ours, theirs) = seqpacket_pair();
        let connections = UnixStream::from(ours);
        connections.set_read_timeout(Some(PATIENCE)).unwrap();
        let config = VsockConfig {
            guest_cid: CID,
            muxer,
            host_ports: vec![(SERVED, theirs)],
        };
        let connections = Some(connections);
        (Self { folder, connections }, config)
    }

    pub fn connect_silently(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("muxer")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A client that wants `port`, and sends `more` with its line.
    pub fn connect(&self, port: u32, more: &str) -> UnixStream {
        let mut stream = self.connect_silently();
        stream
            .write_all(format!("CONNECT {port}\n{more}").as_bytes())
            .unwrap();
        stream
    }

    /// The next connection of the guest with [`SERVED`].
    pub fn accept(&self) -> UnixStream {
        let connections = self.connections.as_ref().unwrap();
        let mut byte = [0; 2];
        let (length, fd) = connections.recv_with_fd(&mut byte).unwrap();
        assert_eq!((length, byte[0]), (1, 1));
        let stream = UnixStream::from(OwnedFd::from(fd.unwrap()));
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The next connection of the guest with [`SERVED`], if one waits.
    pub fn try_accept(&self) -> Option<UnixStream> {
        let connections = self.connections.as_ref().unwrap();
        connections.set_nonblocking(true).unwrap();
        let received = connections.recv_with_fd(&mut [0; 2]);
        connections.set_nonblocking(false).unwrap();
        received.ok()?.1.map(|fd| UnixStream::from(OwnedFd::from(fd)))
    }

    /// Nobody serves [`SERVED`] any more.
    pub fn stop_serving(&mut self) {
        self.connections = None;
    }
}

/// Reads the line that tells a client that the guest has accepted, and returns the host's port.
pub fn read_ok(stream: &UnixStream) -> u32 {
    let mut line = String::new();
    // One byte at a time, so that no data behind the line is taken.
    BufReader::with_capacity(1, stream).read_line(&mut line).unwrap();
    line.strip_prefix("OK ")
        .unwrap_or_else(|| panic!("{line:?} is no OK line"))
        .trim_end()
        .parse()
        .unwrap()
}

pub fn read_exactly(mut stream: &UnixStream, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    stream.read_exact(&mut data).unwrap();
    data
}

pub fn read_to_end(mut stream: &UnixStream) -> Vec<u8> {
    let mut data = vec![];
    stream.read_to_end(&mut data).unwrap();
    data
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize) -> Vec<u8> {
    let byte = |index: usize| (index.wrapping_mul(2_654_435_761) >> 13) as u8;
    (0..length).map(byte).collect()
}

fn seqpacket_pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: the array has room for two descriptors.
    let result = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: both are open and owned by nobody else.
    unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}
