//! Block device (section 5.2): a raw file of the host as the guest's disk, or one with layers above it.
//!
//! The way of a request: [`request`] parses a descriptor chain into a [`operation::Operation`] on the file, with the
//! guest's own buffers as its memory; an [`engine`] (io_uring, or plain system calls where the host forbids it) carries
//! it out; [`handler`], on the device's thread, writes the status byte and puts the chain on the used ring.
//!
//! What a guest may rely on:
//! - A request is completed when the host's kernel has accepted its data, and a FLUSH when everything completed before
//!   it was submitted is on stable storage. Without VIRTIO_BLK_F_FLUSH each write is made stable before it completes.
//! - When the host failed to make data stable it may have dropped that data, so no later FLUSH succeeds either, until the
//!   disk is opened anew.
//! - Requests in flight at the same time are not ordered, overlapping or not: a driver waits for a write or a discard
//!   before it sends another request for the same sectors, as it does with a real disk.
//! - Errors of the host's file are the guest's I/O errors, and are reported once per kind of trouble.
//!
//! With layers (`lighter-disk`), [`operation::Operation::place`] has a request go where its bytes are: a read to the file that has
//! them, or to several, and what changes something to the last, into which the clusters that it touches are copied before. A FLUSH
//! is then data, map, data: one at a time, those that come meanwhile together. A disk without layers has none of that.
//!
//! The device has one queue of [`QUEUE_SIZE`] entries; a request has at most [`SEGMENTS`] data segments, and no more
//! requests are in flight than the queue has entries. There is no state beside the ring to save: what the driver
//! negotiated comes with each activation, and the map of layers is in their file when the device is not active.

mod backend;
mod device;
mod engine;
mod handler;
mod operation;
mod plain;
mod request;
mod ring;
#[cfg(test)]
mod tests;
mod trouble;

pub use backend::{BlockConfig, BlockError};
pub use device::Block;

/// Bytes in a sector: the unit of every request, whatever the host's disk has.
pub const SECTOR: u64 = 512;

/// Entries of the only queue.
pub const QUEUE_SIZE: u16 = 256;

/// Data segments of one request: a chain is at most as long as the queue, and has a header and a status.
pub const SEGMENTS: u16 = QUEUE_SIZE - 2;

/// Ranges in one DISCARD request.
pub const DISCARD_RANGES: u32 = 16;

/// Ranges in one WRITE_ZEROES request.
pub const WRITE_ZEROES_RANGES: u32 = 1;
