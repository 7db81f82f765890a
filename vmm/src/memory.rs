//! Guest memory: where it lies in the guest's physical address space, and what is behind it on the host.
//!
//! It is anonymous memory, in pages of 2 MiB where the host has them: a guest that is backed by small pages takes an exit for
//! each page that it touches for the first time, and walks longer tables for every other. A memory file (memfd) gets large
//! pages only where an administrator has allowed that (`shmem_enabled`), which no distribution does.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Guest memory, shared by vCPUs and device threads.
pub type GuestMemory = std::sync::Arc<GuestMemoryMmap>;

/// Where memory below 4 GiB ends: device registers lie between here and [`HIGH_MEMORY`].
pub const LOW_MEMORY_END: u64 = 0xc000_0000;

/// Where memory that does not fit below [`LOW_MEMORY_END`] goes on.
pub const HIGH_MEMORY: u64 = 1 << 32;

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or more than an address space holds.
    #[error("{0} MiB is no size for guest memory")]
    Size(u64),
    /// Not the memory of such a VM.
    #[error("the snapshot's memory has {actual} bytes and not {mib} MiB: the file is damaged")]
    FileLength {
        /// Wanted size, MiB.
        mib: u64,
        /// The file's length, bytes.
        actual: u64,
    },
    /// mmap.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Wanted size, MiB.
        mib: u64,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Cuts `bytes` of memory into regions (start, length) around the hole for devices below 4 GiB.
pub fn regions(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_MEMORY_END);
    let mut regions = vec![(0, low)];
    if bytes > low {
        regions.push((HIGH_MEMORY, bytes - low));
    }
    regions
}

/// Creates zeroed guest memory of `mib` MiB; pages are taken from the host when touched, and are no part of a core dump.
///
/// The mapping lasts as long as the process, which has one guest.
///
/// # Errors
/// When the size is absurd or the host refuses the mapping.
pub fn create(mib: u64) -> Result<GuestMemory, MemoryError> {
    let bytes = length(mib)?;
    let start = map(bytes).map_err(|source| MemoryError::Map { mib, source })?;
    // A kernel without large pages refuses: the guest runs on small ones.
    advise(start, bytes, libc::MADV_HUGEPAGE);
    cut(start, mib)
}

/// Makes guest memory of a snapshot's `file`, as [`create`] does of nothing: a page is read when it is touched, shared with
/// everybody who maps the file, and copied when it is written to. The file must never change.
///
/// # Errors
/// As [`create`], and when the file has another length.
pub fn map_file(mib: u64, file: &File) -> Result<GuestMemory, MemoryError> {
    let bytes = length(mib)?;
    let error = |source| MemoryError::Map { mib, source };
    let actual = file.metadata().map_err(error)?.len();
    if actual != bytes as u64 {
        return Err(MemoryError::FileLength { mib, actual });
    }
    let start = map(bytes).map_err(error)?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: over the whole of the new mapping, which nobody knows of yet.
    let over = unsafe { libc::mmap(start.cast(), bytes, PROTECTION, flags, file.as_raw_fd(), 0) };
    if over == libc::MAP_FAILED {
        return Err(error(io::Error::last_os_error()));
    }
    // Of the new mapping, as `map` did of the one before.
    advise(start, bytes, libc::MADV_DONTDUMP);
    cut(start, mib)
}

/// The length of memory of `mib` MiB, bytes.
fn length(mib: u64) -> Result<usize, MemoryError> {
    let bytes = mib
        .checked_mul(1 << 20)
        .filter(|bytes| (1..1 << 46).contains(bytes));
    usize::try_from(bytes.ok_or(MemoryError::Size(mib))?).map_err(|_| MemoryError::Size(mib))
}

/// Cuts a mapping of `mib` MiB at `start` into regions.
fn cut(start: *mut u8, mib: u64) -> Result<GuestMemory, MemoryError> {
    let error = |source| MemoryError::Map { mib, source };
    let mut offset = 0;
    let mut parts = vec![];
    for (address, length) in regions(mib << 20) {
        // Fits, as the whole does.
        let length = length as usize;
        // SAFETY: `length` bytes from there on are inside the mapping, which is never unmapped, and no other region has them.
        let region = unsafe {
            MmapRegionBuilder::new(length)
                .with_mmap_prot(PROTECTION)
                .with_mmap_flags(FLAGS)
                .with_raw_mmap_pointer(start.add(offset))
        };
        let region = region.build().map_err(|source| error(io::Error::other(source)))?;
        let region = GuestRegionMmap::new(region, GuestAddress(address)).ok_or(MemoryError::Size(mib))?;
        parts.push(region);
        offset += length;
    }
    let memory = GuestMemoryMmap::from_regions(parts).map_err(|source| error(io::Error::other(source)))?;
    Ok(memory.into())
}

const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// The processor's large pages. KVM uses them where guest and host addresses are aligned alike.
const LARGE_PAGE: usize = 2 << 20;

/// Maps `bytes` of anonymous memory, aligned to a large page.
fn map(bytes: usize) -> io::Result<*mut u8> {
    let reserved = bytes + LARGE_PAGE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), reserved, PROTECTION, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = start.addr().next_multiple_of(LARGE_PAGE) - start.addr();
    let aligned = start.cast::<u8>().wrapping_add(before);
    let trimmed = [
        (start.cast::<u8>(), before),
        (aligned.wrapping_add(bytes), reserved - before - bytes),
    ];
    for (part, length) in trimmed.into_iter().filter(|(_, length)| *length > 0) {
        // SAFETY: a part of the new mapping that nobody knows of.
        unsafe { libc::munmap(part.cast(), length) };
    }
    advise(aligned, bytes, libc::MADV_DONTDUMP);
    Ok(aligned)
}

/// Advises the kernel on a mapping; what it refuses it does not do.
fn advise(start: *mut u8, bytes: usize, advice: libc::c_int) {
    // SAFETY: a mapping of ours; the kinds of advice given here leave its contents alone.
    unsafe { libc::madvise(start.cast(), bytes, advice) };
}

/// Total size of `memory`, bytes.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_the_device_hole_goes_above_4_gib() {
        assert_eq!(regions(1 << 30), [(0, 1 << 30)]);
        assert_eq!(regions(4 << 30), [(0, LOW_MEMORY_END), (HIGH_MEMORY, 1 << 30)]);
        let memory = create(4096).unwrap();
        assert_eq!(size(&memory), 4 << 30);
        memory
            .write_obj(7u64, GuestAddress(HIGH_MEMORY + (1 << 30) - 8))
            .unwrap();
        assert!(
            memory
                .write_obj(7u64, GuestAddress(HIGH_MEMORY + (1 << 30)))
                .is_err()
        );
        assert!(memory.write_obj(7u64, GuestAddress(LOW_MEMORY_END)).is_err());
    }

    #[test]
    fn host_addresses_are_aligned_as_the_guests() {
        for mib in [1, 63, 4097] {
            let memory = create(mib).unwrap();
            for region in memory.iter() {
                assert_eq!(region.as_ptr().addr() % LARGE_PAGE, 0);
            }
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(matches!(create(0), Err(MemoryError::Size(0))));
        assert!(matches!(create(u64::MAX), Err(MemoryError::Size(_))));
    }
}
