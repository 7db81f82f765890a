//! What a driver asks for (section 5.2.6): from a descriptor chain to an [`Operation`].
//!
//! A chain is a header of 16 readable bytes, data in either direction, and a writable status byte at the very end. How
//! those bytes are spread over descriptors is the driver's choice (section 2.7.4.3).

use super::operation::{Emptying, Extent, Operation, OutsideMemory, Segments};
use super::{DISCARD_RANGES, QUEUE_SIZE, SECTOR, WRITE_ZEROES_RANGES};
use crate::memory::GuestMemory;
use virtio_bindings::virtio_blk as abi;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes of a header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of one range of DISCARD and WRITE_ZEROES: sector, number of sectors, flags.
const RANGE: usize = 16;

/// A chain that is no request: it cannot even be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum Malformed {
    /// More descriptors than the queue has entries, or more bytes than a used element can count.
    #[error("a chain is too long")]
    TooLong,
    /// The order of section 2.7.4.2 is broken.
    #[error("a buffer for reading comes after one for writing")]
    Order,
    /// Less than 16 readable bytes.
    #[error("a request has no header")]
    NoHeader,
    /// No writable byte.
    #[error("a request has no status byte")]
    NoStatus,
    /// A buffer does not lie in guest memory.
    #[error(transparent)]
    Outside(#[from] OutsideMemory),
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = abi::VIRTIO_BLK_S_OK as isize,
    IoError = abi::VIRTIO_BLK_S_IOERR as isize,
    Unsupported = abi::VIRTIO_BLK_S_UNSUPP as isize,
}

/// Where the answer to a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// The chain.
    pub(super) head: u16,
    /// The status byte; in guest memory.
    pub(super) status: GuestAddress,
    /// Bytes of data that a success writes into the chain.
    pub(super) data: u32,
    /// A success says that data is on stable storage.
    pub(super) durable: bool,
}

/// What is known of the disk when requests are parsed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// Writes are made stable before they complete.
    pub(super) writethrough: bool,
}

/// A piece of guest memory, not checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffer {
    pub(super) address: GuestAddress,
    pub(super) length: u32,
}

/// What to do for a request.
#[derive(Debug)]
pub(super) enum Action {
    /// Something on the file.
    Operate(Operation),
    /// Write the serial number.
    Identify(Vec<Buffer>),
    /// Nothing: the request is refused.
    Refuse(Status),
}

/// Parses the chain that starts at `head`.
pub(super) fn parse(
    memory: &GuestMemory,
    head: u16,
    chain: impl Iterator<Item = Descriptor>,
    rules: Rules,
) -> Result<(Reply, Action), Malformed> {
    let (mut readable, mut writable) = split(chain)?;
    let status = take_last_byte(&mut writable).ok_or(Malformed::NoStatus)?;
    if !memory.address_in_range(status) {
        return Err(OutsideMemory.into());
    }
    let mut header = [0; HEADER];
    if take_front(memory, &mut readable, &mut header)? < HEADER {
        return Err(Malformed::NoHeader);
    }
    let [type_, _reserved, sector_low, sector_high] = words(&header);
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let mut data = 0;
    let action = match type_ {
        abi::VIRTIO_BLK_T_IN => {
            data = length(&writable);
            transfer(memory, &writable, sector, rules, Operation::read)?
        }
        abi::VIRTIO_BLK_T_OUT if !rules.read_only => {
            let write = |from, at| Operation::write(from, at, rules.writethrough);
            transfer(memory, &readable, sector, rules, write)?
        }
        abi::VIRTIO_BLK_T_FLUSH => Action::Operate(Operation::flush()),
        abi::VIRTIO_BLK_T_DISCARD if !rules.read_only => {
            empty(memory, readable, rules, DISCARD_RANGES, discard)?
        }
        abi::VIRTIO_BLK_T_WRITE_ZEROES if !rules.read_only => {
            empty(memory, readable, rules, WRITE_ZEROES_RANGES, write_zeroes)?
        }
        abi::VIRTIO_BLK_T_GET_ID => {
            data = length(&writable).min(abi::VIRTIO_BLK_ID_BYTES);
            Action::Identify(writable)
        }
        abi::VIRTIO_BLK_T_OUT | abi::VIRTIO_BLK_T_DISCARD | abi::VIRTIO_BLK_T_WRITE_ZEROES => {
            Action::Refuse(Status::IoError)
        }
        _ => Action::Refuse(Status::Unsupported),
    };
    let durable = matches!(&action, Action::Operate(operation) if operation.syncs());
    let reply = Reply {
        head,
        status,
        data,
        durable,
    };
    Ok((reply, action))
}

/// Sorts a chain's buffers into readable and writable ones; empty ones are left out.
fn split(chain: impl Iterator<Item = Descriptor>) -> Result<(Vec<Buffer>, Vec<Buffer>), Malformed> {
    let (mut readable, mut writable) = (vec![], vec![]);
    let mut total = 0u64;
    for (position, descriptor) in chain.enumerate() {
        total += u64::from(descriptor.len());
        if position >= usize::from(QUEUE_SIZE) || total > u64::from(u32::MAX) {
            return Err(Malformed::TooLong);
        }
        let buffer = Buffer {
            address: descriptor.addr(),
            length: descriptor.len(),
        };
        if descriptor.is_write_only() {
            writable.push(buffer);
        } else if writable.is_empty() {
            readable.push(buffer);
        } else {
            return Err(Malformed::Order);
        }
    }
    readable.retain(|buffer| buffer.length > 0);
    writable.retain(|buffer| buffer.length > 0);
    Ok((readable, writable))
}

/// Cuts the last byte off and says where it is.
fn take_last_byte(buffers: &mut Vec<Buffer>) -> Option<GuestAddress> {
    let last = buffers.last_mut()?;
    last.length -= 1;
    let byte = last.address.checked_add(u64::from(last.length));
    if last.length == 0 {
        buffers.pop();
    }
    byte
}

/// Copies the first bytes into `bytes` and cuts them off; says how many there were.
fn take_front(
    memory: &GuestMemory,
    buffers: &mut Vec<Buffer>,
    bytes: &mut [u8],
) -> Result<usize, OutsideMemory> {
    let mut done = 0;
    for buffer in buffers.iter_mut() {
        let part = (bytes.len() - done).min(buffer.length as usize);
        let to = &mut bytes[done..done + part];
        memory.read_slice(to, buffer.address).map_err(|_| OutsideMemory)?;
        done += part;
        // Cannot overflow: the bytes are in guest memory. `part` is not more than a u32.
        buffer.address = GuestAddress(buffer.address.0.wrapping_add(part as u64));
        buffer.length -= part as u32;
    }
    buffers.retain(|buffer| buffer.length > 0);
    Ok(done)
}

/// Total length; [`split`] saw to it that it fits.
fn length(buffers: &[Buffer]) -> u32 {
    buffers.iter().map(|buffer| buffer.length).sum()
}

/// Little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| u32::from_le_bytes([0, 1, 2, 3].map(|j| bytes[4 * i + j])))
}

/// The bytes of a range of sectors, if it lies on the disk and is not empty.
fn on_disk(sector: u64, count: u64, rules: Rules) -> Option<(u64, u64)> {
    let end = sector.checked_add(count)?;
    // A disk's length in bytes fits, so a sector's place on it does too.
    (count > 0 && end <= rules.sectors).then(|| (sector * SECTOR, count * SECTOR))
}

fn transfer(
    memory: &GuestMemory,
    buffers: &[Buffer],
    sector: u64,
    rules: Rules,
    operation: impl FnOnce(Segments, u64) -> Operation,
) -> Result<Action, OutsideMemory> {
    let mut segments = Segments::new(memory.clone());
    for buffer in buffers {
        segments.push(buffer.address, buffer.length)?;
    }
    let bytes = segments.length();
    let range = on_disk(sector, bytes / SECTOR, rules).filter(|_| bytes.is_multiple_of(SECTOR));
    Ok(match range {
        Some((at, _)) => Action::Operate(operation(segments, at)),
        None => Action::Refuse(Status::IoError),
    })
}

fn empty(
    memory: &GuestMemory,
    mut buffers: Vec<Buffer>,
    rules: Rules,
    most: u32,
    how: fn(u32) -> Option<Emptying>,
) -> Result<Action, OutsideMemory> {
    let bytes = length(&buffers) as usize;
    if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes > RANGE * most as usize {
        return Ok(Action::Refuse(Status::IoError));
    }
    let mut extents = vec![];
    for _ in 0..bytes / RANGE {
        let mut range = [0; RANGE];
        take_front(memory, &mut buffers, &mut range)?;
        let [sector_low, sector_high, count, flags] = words(&range);
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        let Some(how) = how(flags) else {
            return Ok(Action::Refuse(Status::Unsupported));
        };
        let Some((at, length)) = on_disk(sector, u64::from(count), rules) else {
            return Ok(Action::Refuse(Status::IoError));
        };
        extents.push(Extent { at, length, how });
    }
    Ok(Action::Operate(Operation::empty(extents, rules.writethrough)))
}

/// Section 5.2.6.2: a discard has no flags.
fn discard(flags: u32) -> Option<Emptying> {
    (flags == 0).then_some(Emptying::PunchHole)
}

fn write_zeroes(flags: u32) -> Option<Emptying> {
    match flags {
        0 => Some(Emptying::Zero),
        abi::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP => Some(Emptying::PunchHole),
        _ => None,
    }
}
