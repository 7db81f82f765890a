//! The bytes of a descriptor chain, as the pieces of guest memory they lie in.
//!
//! A packet's header and data may lie in any number of descriptors, cut anywhere. The pieces are handed to the kernel as
//! they are, so that data goes from a socket to guest memory, and back, with one copy.

use super::packet::HEADER_LEN;
use crate::memory::GuestMemory;
use crate::virtio::queue::Chain;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

/// The kernel takes no more pieces at once (UIO_MAXIOV); what a chain has beyond them is left alone.
const MAX_PIECES: usize = 1024;

/// Which descriptors of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those with a packet of the guest.
    FromGuest,
    /// Those to be filled with a packet for the guest.
    ToGuest,
}

/// Pieces of guest memory in the order of their bytes, none of them empty.
///
/// The guest can change them at any time: each byte is to be looked at once.
#[derive(Debug)]
pub struct Pieces<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Pieces<'a> {
    /// No bytes.
    pub fn none() -> Self {
        Self {
            pieces: vec![],
            len: 0,
        }
    }

    /// The bytes of `chain` for one direction; `None` if a descriptor does not lie in guest memory.
    pub fn new(memory: &'a GuestMemory, chain: Chain, direction: Direction) -> Option<Self> {
        let mut all = Self::none();
        let wanted = direction == Direction::ToGuest;
        for descriptor in chain.filter(|descriptor| descriptor.is_write_only() == wanted) {
            let length = usize::try_from(descriptor.len()).ok()?;
            if length == 0 {
                continue;
            }
            for piece in memory.get_slices(descriptor.addr(), length) {
                if all.pieces.len() == MAX_PIECES {
                    return Some(all);
                }
                let piece = piece.ok()?;
                all.len += piece.len();
                all.pieces.push(piece);
            }
        }
        Some(all)
    }

    /// Bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the bytes of a header off the front; `None` if there are not as many.
    pub fn take_header(&mut self) -> Option<Self> {
        if self.len < HEADER_LEN {
            return None;
        }
        let mut header = Self {
            pieces: vec![],
            len: HEADER_LEN,
        };
        let mut missing = HEADER_LEN;
        let mut whole = 0;
        for piece in &mut self.pieces {
            let taken = missing.min(piece.len());
            header.pieces.push(piece.subslice(0, taken).ok()?);
            missing -= taken;
            if taken < piece.len() {
                *piece = piece.offset(taken).ok()?;
                break;
            }
            whole += 1;
            if missing == 0 {
                break;
            }
        }
        self.pieces.drain(..whole);
        self.len -= HEADER_LEN;
        Some(header)
    }

    /// Copies all bytes into a buffer of at least their length, those after `skip`.
    pub fn copy_to(&self, mut skip: usize, mut to: &mut [u8]) {
        for piece in &self.pieces {
            if skip >= piece.len() {
                skip -= piece.len();
                continue;
            }
            let Ok(rest) = piece.offset(skip) else {
                return;
            };
            skip = 0;
            let copied = rest.copy_to(to);
            to = &mut to[copied..];
        }
    }

    /// Copies `from`, not longer than they are, over the first bytes.
    pub fn copy_from(&self, mut from: &[u8]) {
        for piece in &self.pieces {
            let taken = from.len().min(piece.len());
            piece.copy_from(&from[..taken]);
            from = &from[taken..];
        }
    }

    /// The first `limit` bytes, for a system call. The pointers are valid as long as these pieces are.
    pub fn io_vectors(&self, mut limit: usize) -> Vec<libc::iovec> {
        let mut vectors = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let length = limit.min(piece.len());
            if length == 0 {
                break;
            }
            vectors.push(libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: length,
            });
            limit -= length;
        }
        vectors
    }

    /// Notes that a system call has written the first `bytes` bytes.
    pub fn mark_written(&self, mut bytes: usize) {
        for piece in &self.pieces {
            let written = bytes.min(piece.len());
            piece.bitmap().mark_dirty(0, written);
            bytes -= written;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use proptest::prelude::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{Bytes, GuestAddress};

    const BASE: u64 = 0x8000;

    /// A chain of buffers of these lengths, which lie apart, and the addresses of their bytes.
    fn chain(memory: &GuestMemory, lengths: &[u16], flags: u16) -> (Chain, Vec<u64>) {
        let mut addresses = vec![];
        let mut descriptors = vec![];
        for (index, &length) in lengths.iter().enumerate() {
            let start = BASE + index as u64 * 0x1000;
            addresses.extend(start..start + u64::from(length));
            let more = u16::from(index + 1 < lengths.len());
            descriptors.push(RawDescriptor::from(Descriptor::new(
                start,
                length.into(),
                flags | more,
                index as u16 + 1,
            )));
        }
        let rings = MockSplitQueue::new(&**memory, 32);
        rings.build_desc_chain(&descriptors).unwrap();
        let mut queue: Queue = rings.create_queue().unwrap();
        (queue.pop_descriptor_chain(memory.clone()).unwrap(), addresses)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// However a packet is cut, header and data are the bytes in their order.
        #[test]
        fn cuts_do_not_matter(lengths in prop::collection::vec(0u16..60, 1..20), skip in 0usize..50) {
            let memory = memory::create(1).unwrap();
            let (chain, addresses) = chain(&memory, &lengths, 0);
            let bytes: Vec<u8> = (0..addresses.len()).map(|index| index as u8).collect();
            for (&address, &byte) in addresses.iter().zip(&bytes) {
                memory.write_obj(byte, GuestAddress(address)).unwrap();
            }
            let mut data = Pieces::new(&memory, chain.clone(), Direction::FromGuest).unwrap();
            prop_assert_eq!(data.len(), bytes.len());
            prop_assert!(Pieces::new(&memory, chain, Direction::ToGuest).unwrap().is_empty());
            let Some(header) = data.take_header() else {
                prop_assert!(bytes.len() < HEADER_LEN);
                return Ok(());
            };
            let mut copied = [0; HEADER_LEN];
            header.copy_to(0, &mut copied);
            prop_assert_eq!(&copied[..], &bytes[..HEADER_LEN]);
            let rest = &bytes[HEADER_LEN..];
            let skip = skip.min(rest.len());
            let mut copied = vec![0; rest.len() - skip];
            data.copy_to(skip, &mut copied);
            prop_assert_eq!(&copied[..], &rest[skip..]);
            let vectors = data.io_vectors(skip);
            prop_assert_eq!(vectors.iter().map(|vector| vector.iov_len).sum::<usize>(), skip);
        }

        #[test]
        fn a_copy_fills_the_first_bytes(lengths in prop::collection::vec(0u16..60, 1..20), length in 0usize..100) {
            let memory = memory::create(1).unwrap();
            let (chain, addresses) = chain(&memory, &lengths, 2);
            let room = Pieces::new(&memory, chain, Direction::ToGuest).unwrap();
            let length = length.min(room.len());
            room.copy_from(&vec![9; length]);
            for (index, &address) in addresses.iter().enumerate() {
                let byte: u8 = memory.read_obj(GuestAddress(address)).unwrap();
                prop_assert_eq!(byte == 9, index < length);
            }
        }
    }

    #[test]
    fn memory_that_is_not_there_is_no_piece() {
        let memory = memory::create(1).unwrap();
        let rings = MockSplitQueue::new(&*memory, 32);
        let end = (1 << 20) - 10;
        rings
            .build_desc_chain(&[RawDescriptor::from(Descriptor::new(end, 11, 0, 0))])
            .unwrap();
        let mut queue: Queue = rings.create_queue().unwrap();
        let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
        assert!(Pieces::new(&memory, chain, Direction::FromGuest).is_none());
    }
}
