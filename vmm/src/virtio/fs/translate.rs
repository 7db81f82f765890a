//! Descriptor chains as the library takes them.
//!
//! `virtiofsd` is made of an older vm-memory and virtio-queue than the rest of the monitor, so it is given guest memory by
//! its address, and a chain that was read from the guest's ring once and written into a ring of our own: what the library
//! reads of it cannot change any more, nor lead anywhere else.

use crate::memory::GuestMemory;
use crate::virtio::queue::{Chain, QueueError};
use std::io;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd_bitmap::bitmap::BitmapMmapRegion;
use virtiofsd_memory::mmap::MmapRegionBuilder;
use virtiofsd_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use virtiofsd_queue::desc::RawDescriptor;
use virtiofsd_queue::desc::split::Descriptor;
use virtiofsd_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// Most descriptors of a request.
const MOST: u16 = super::REQUESTS_SIZE;

/// `struct fuse_out_header`: the least that an answer takes.
const ANSWER_HEADER: u64 = 16;

/// Our own ring: descriptors, available ring, and a page for answers that nobody wants.
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 16 * MOST as u64;
const UNWANTED: u64 = AVAILABLE + 0x1000;
const UNWANTED_LENGTH: u32 = 0x1000;
const LENGTH: usize = UNWANTED as usize + UNWANTED_LENGTH as usize;

/// Guest memory and one chain in the library's types.
pub(super) struct Translator {
    guest: Memory,
    own: Memory,
    queue: Queue,
}

/// A request, and where its answer goes.
pub(super) struct Request<'a> {
    /// What the driver sent.
    pub(super) reader: Reader<'a>,
    /// The driver's buffers.
    pub(super) writer: Writer<'a>,
    /// The driver has no room for an answer: what is written is lost.
    pub(super) unwanted: bool,
}

impl Translator {
    /// For the chains of a driver whose guest has `memory`.
    ///
    /// # Errors
    /// When this process gets no memory for a ring.
    pub(super) fn new(memory: &GuestMemory) -> io::Result<Self> {
        let own = Memory::from_ranges(&[(GuestAddress(DESCRIPTORS), LENGTH)]).map_err(io::Error::other)?;
        let mut queue = Queue::new(MOST).map_err(io::Error::other)?;
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_ready(true);
        Ok(Self {
            guest: same_memory(memory)?,
            own,
            queue,
        })
    }

    /// A chain of the driver's.
    ///
    /// # Errors
    /// When its descriptors do not lie in guest memory, are too many, or loop.
    pub(super) fn translate(&mut self, chain: Chain) -> Result<Request<'_>, QueueError> {
        let invalid = || QueueError::Chain(virtio_queue::Error::InvalidChain);
        let (mut readable, mut writable) = (vec![], vec![]);
        let (mut room, mut goes_on) = (0u64, true);
        for (number, descriptor) in (0..).zip(chain) {
            if number == MOST {
                return Err(invalid());
            }
            let part = (descriptor.addr().raw_value(), descriptor.len());
            if descriptor.is_write_only() {
                add(&mut writable, part);
                room += u64::from(part.1);
            } else {
                add(&mut readable, part);
            }
            goes_on = descriptor.has_next();
        }
        // It ended before its end: an index out of range, a loop, or a table out of memory.
        if goes_on {
            return Err(invalid());
        }
        // The library takes it for granted that there is room for the header.
        let unwanted = room < ANSWER_HEADER;
        if unwanted {
            writable = vec![(UNWANTED, UNWANTED_LENGTH)];
        }
        // That page may be one too many.
        if readable.len() + writable.len() > usize::from(MOST) {
            return Err(invalid());
        }
        let chain = write(&self.own, &mut self.queue, &readable, &writable).map_err(|_| invalid())?;
        let answers = if unwanted { &self.own } else { &self.guest };
        Ok(Request {
            reader: Reader::new(&self.guest, chain.clone()).map_err(|_| invalid())?,
            writer: Writer::new(answers, chain).map_err(|_| invalid())?,
            unwanted,
        })
    }
}

/// Adds an address with a length. What follows on the last is made one with it: a large request has hundreds of pages, many of
/// them side by side.
fn add(parts: &mut Vec<(u64, u32)>, (address, length): (u64, u32)) {
    if let Some(last) = parts.last_mut()
        && last.0.checked_add(u64::from(last.1)) == Some(address)
        && let Some(sum) = last.1.checked_add(length)
    {
        last.1 = sum;
    } else {
        parts.push((address, length));
    }
}

/// Writes a chain of these descriptors into our own ring, and takes it out again.
fn write<'a>(
    own: &'a Memory,
    queue: &mut Queue,
    readable: &[(u64, u32)],
    writable: &[(u64, u32)],
) -> io::Result<DescriptorChain<&'a Memory>> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let readable = readable.iter().map(|part| (part, 0));
    let parts = readable.chain(writable.iter().map(|part| (part, WRITE)));
    let mut parts = (0u16..).zip(parts).peekable();
    while let Some((index, (&(address, length), write))) = parts.next() {
        let (next, flags) = match parts.peek() {
            Some(_) => (index + 1, write | NEXT),
            None => (0, write),
        };
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, next));
        let place = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
        own.write_obj(descriptor, place).map_err(io::Error::other)?;
    }
    let position = queue.next_avail();
    let entry = AVAILABLE + 4 + 2 * u64::from(position % MOST);
    let available = [(0u16, entry), (position.wrapping_add(1), AVAILABLE + 2)];
    for (value, place) in available {
        own.write_obj(value.to_le(), GuestAddress(place))
            .map_err(io::Error::other)?;
    }
    let chain = queue.pop_descriptor_chain(own);
    chain.ok_or_else(|| io::Error::other("a chain of our own is broken"))
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").finish_non_exhaustive()
    }
}

/// The same guest memory in the library's type.
fn same_memory(memory: &GuestMemory) -> io::Result<Memory> {
    let mut regions = vec![];
    for region in memory.iter() {
        let length = usize::try_from(region.len()).map_err(io::Error::other)?;
        let builder = MmapRegionBuilder::new_with_bitmap(length, BitmapMmapRegion::default())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: the region's own mapping, which is as long, and stays for as long as the process (see `memory::create`).
        let builder = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) };
        let mapped = builder.build().map_err(io::Error::other)?;
        let start = GuestAddress(region.start_addr().raw_value());
        let region = GuestRegionMmap::new(mapped, start);
        regions.push(region.ok_or_else(|| io::Error::other("a region is too long"))?);
    }
    Memory::from_regions(regions).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::add;

    #[test]
    fn parts_side_by_side_are_one_as_long_as_their_length_is_a_number() {
        let mut parts = vec![];
        let all = u32::MAX;
        for part in [
            (0x1000, 0x1000),
            (0x2000, 0x1000),
            (0x4000, 8),
            (0x4008, all - 8),
            (0x4000 + u64::from(all), 1),
            (0x1000, 0),
            (0x1000, 4),
            (u64::MAX, 1),
            (0, 1),
        ] {
            add(&mut parts, part);
        }
        let whole = [
            (0x1000, 0x2000),
            (0x4000, all),
            (0x4000 + u64::from(all), 1),
            (0x1000, 4),
            (u64::MAX, 1),
            (0, 1),
        ];
        assert_eq!(parts, whole);
    }
}
