//! The device against a driver, over real files.

mod faults;
mod hostile;
mod io;
mod layers;
mod model;
mod requests;

use super::backend::Disk;
use super::engine::Engine;
use super::plain::Plain;
use super::{Block, BlockError, QUEUE_SIZE};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Buffer, DriverQueue, Guest, Layout};
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_blk as abi;

const OK: u8 = abi::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = abi::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = abi::VIRTIO_BLK_S_UNSUPP as u8;
const FLUSH: u64 = 1 << abi::VIRTIO_BLK_F_FLUSH;

/// Which engine a test is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The one a user gets here: io_uring, see [`io_uring_is_used_where_the_host_has_it`].
    Best,
    Plain,
}

const KINDS: [Kind; 2] = [Kind::Best, Kind::Plain];

impl Kind {
    fn engine(self, disk: &Disk) -> Engine {
        match self {
            Self::Best => Engine::new(disk.files(), QUEUE_SIZE),
            Self::Plain => Engine::Plain(Plain::new(disk.files())),
        }
    }
}

#[test]
fn io_uring_is_used_where_the_host_has_it() {
    // struct io_uring_params, all zeros.
    let mut parameters = [0u64; 15];
    // SAFETY: the structure has 120 bytes; the result is checked.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    if fd >= 0 {
        // SAFETY: `fd` is open and owned by nobody else.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    let disk = Disk::unchecked("data".into(), tempfile::tempfile().unwrap(), 1, false);
    let engine = Kind::Best.engine(&disk);
    assert_eq!(matches!(engine, Engine::Ring(_)), fd >= 0, "{engine:?}");
}

fn header(type_: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&type_.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// One range of DISCARD or WRITE_ZEROES.
fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&count.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// `length` bytes that differ by place and by `seed`.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|place| (place * 7 + place / 256 + seed * 31) as u8)
        .collect()
}

/// An active device over a file that has no name.
struct Setup {
    guest: Guest,
    queue: DriverQueue,
    block: Block,
    file: File,
    layout: Layout,
}

impl Setup {
    fn new(kind: Kind, sectors: u64) -> Self {
        Self::with(kind, sectors, false, Layout::Indirect, true)
    }

    fn with(kind: Kind, sectors: u64, read_only: bool, layout: Layout, event_idx: bool) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(sectors * 512).unwrap();
        Self::over(kind, file, sectors, read_only, layout, event_idx)
    }

    fn over(kind: Kind, file: File, sectors: u64, read_only: bool, layout: Layout, event_idx: bool) -> Self {
        let disk = Disk::unchecked("data".into(), file.try_clone().unwrap(), sectors, read_only);
        let engine = kind.engine(&disk);
        let mut block = Block::with(disk, engine);
        let mut guest = Guest::new(64);
        let queue = DriverQueue::new(&mut guest, QUEUE_SIZE, event_idx);
        block.activate(guest.activation(&[&queue], FLUSH)).unwrap();
        Self {
            guest,
            queue,
            block,
            file,
            layout,
        }
    }

    /// Sends a request and waits for its answer: the status, and how many bytes were written.
    fn send(&mut self, header: &[u8], data: &[Buffer]) -> (u8, u32) {
        let status = self.guest.writable(1);
        let mut buffers = vec![self.guest.readable(header)];
        buffers.extend_from_slice(data);
        buffers.push(status);
        self.guest.fill(status, 0xff);
        let used = self.queue.round_trip(&self.guest, &buffers, self.layout);
        (self.guest.bytes(status)[0], used.length)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let data = self.guest.readable(data);
        self.send(&header(abi::VIRTIO_BLK_T_OUT, sector), &[data]).0
    }

    fn read(&mut self, sector: u64, length: usize) -> (u8, Vec<u8>) {
        let data = self.guest.writable(length);
        let (status, _) = self.send(&header(abi::VIRTIO_BLK_T_IN, sector), &[data]);
        (status, self.guest.bytes(data))
    }

    fn flush(&mut self) -> u8 {
        self.send(&header(abi::VIRTIO_BLK_T_FLUSH, 0), &[]).0
    }

    fn empty(&mut self, type_: u32, ranges: &[[u8; 16]]) -> u8 {
        let data = self.guest.readable(&ranges.concat());
        self.send(&header(type_, 0), &[data]).0
    }

    fn on_file(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        match self.block.disk().layers() {
            Some(chain) => chain.read_at(&mut bytes, at).unwrap(),
            None => self.file.read_exact_at(&mut bytes, at).unwrap(),
        }
        bytes
    }

    /// Stops the device as a pause does, has the disk get another layer, and lets it go on.
    fn add_layer(&mut self, merged: Option<File>) -> Result<(), BlockError> {
        let queues = self.block.deactivate();
        let added = self
            .block
            .add_layer(layers::layer(self.block.disk().sectors), merged);
        self.block
            .activate(self.guest.activation_with(queues, FLUSH))
            .unwrap();
        added
    }
}
