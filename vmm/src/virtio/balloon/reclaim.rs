//! Giving ranges of guest memory back to the host.

use crate::memory::GuestMemory;
use std::io;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Size of a page in the balloon's page numbers, whatever the host's pages are.
pub(super) const PAGE: u64 = 4096;

/// Why a range cannot be given back.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReclaimError {
    /// Not the guest's to give.
    #[error("{length} bytes at {start:#x} are not in guest memory")]
    Outside { start: u64, length: u64 },
    /// madvise.
    #[error("cannot give memory back to the host")]
    Host(#[source] io::Error),
}

/// Gives whole pages of a range back, and says how many bytes that were. They read as zeros from
/// then on, or, in memory that was mapped from a snapshot, as they were in it: a driver counts on neither.
pub(super) fn give_back(memory: &GuestMemory, start: u64, length: u64) -> Result<u64, ReclaimError> {
    let outside = || ReclaimError::Outside { start, length };
    let size = usize::try_from(length).map_err(|_| outside())?;
    let pieces: Result<Vec<_>, _> = memory.get_slices(GuestAddress(start), size).collect();
    let mut returned = 0;
    // All of the range is looked at before any of it is given back.
    for piece in pieces.map_err(|_| outside())? {
        let guard = piece.ptr_guard_mut();
        let address = guard.as_ptr() as usize;
        let page = PAGE as usize;
        let first = address.next_multiple_of(page);
        let last = (address + piece.len()) / page * page;
        if first >= last {
            continue;
        }
        // SAFETY: whole pages inside a mapping of guest memory, which `memory` keeps. Nothing of ours refers to guest
        // memory by reference, so bytes turning into zeros are no different from a guest writing zeros.
        let result = unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_DONTNEED) };
        if result < 0 {
            return Err(ReclaimError::Host(io::Error::last_os_error()));
        }
        returned += (last - first) as u64;
    }
    Ok(returned)
}

/// Joins page numbers that follow each other, upwards or downwards, to ranges (first page, pages).
pub(super) fn join(pages: impl IntoIterator<Item = u32>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = vec![];
    for page in pages.into_iter().map(u64::from) {
        match ranges.last_mut() {
            Some((first, count)) if page == *first + *count => *count += 1,
            Some((first, count)) if page + 1 == *first => {
                *first = page;
                *count += 1;
            }
            _ => ranges.push((page, 1)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    #[test]
    fn neighbours_are_joined_in_both_directions() {
        assert_eq!(
            join([5, 6, 7, 9, 8, 3, u32::MAX]),
            [(5, 3), (8, 2), (3, 1), (u32::MAX.into(), 1)]
        );
        assert_eq!(join([]), []);
    }

    #[test]
    fn only_whole_pages_of_a_range_become_zeros() {
        let memory = memory::create(1).unwrap();
        memory.write_slice(&[9; 4 * 4096], GuestAddress(0)).unwrap();
        assert_eq!(give_back(&memory, 100, 3 * PAGE).unwrap(), 2 * PAGE);
        assert_eq!(give_back(&memory, 1, PAGE - 2).unwrap(), 0);
        assert_eq!(give_back(&memory, 0, 0).unwrap(), 0);
        let mut bytes = vec![1; 4 * 4096];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let zeros = bytes.iter().enumerate().filter(|(_, byte)| **byte == 0);
        let places: Vec<usize> = zeros.map(|(place, _)| place).collect();
        assert_eq!(places, (4096..3 * 4096).collect::<Vec<_>>());
    }

    #[test]
    fn a_range_that_only_begins_in_memory_is_refused_whole() {
        let memory = memory::create(1).unwrap();
        memory
            .write_slice(&[9; 4096], GuestAddress((1 << 20) - 4096))
            .unwrap();
        let error = give_back(&memory, (1 << 20) - 4096, 8192).unwrap_err();
        assert_eq!(error.to_string(), "8192 bytes at 0xff000 are not in guest memory");
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 9);
    }

    proptest! {
        #[test]
        fn joining_loses_and_invents_no_page(pages in proptest::collection::vec(0u32..64, 0..64)) {
            let mut joined: Vec<u64> = join(pages.clone()).into_iter().flat_map(|(f, c)| f..f + c).collect();
            let mut pages: Vec<u64> = pages.into_iter().map(u64::from).collect();
            joined.sort_unstable();
            pages.sort_unstable();
            prop_assert_eq!(joined, pages);
        }

        #[test]
        fn any_range_is_given_back_inside_or_refused(start: u64, length: u64) {
            let memory = memory::create(1).unwrap();
            for (start, length) in [(start, length), (start % (2 << 20), length % (2 << 20))] {
                let inside = start.checked_add(length).is_some_and(|end| end <= 1 << 20);
                match give_back(&memory, start, length) {
                    Ok(returned) => prop_assert!(returned <= length && (inside || length == 0)),
                    Err(_) => prop_assert!(!inside),
                }
            }
        }
    }
}
