//! Guest memory: where it lies in the guest's physical address space, and the memory file behind it.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Guest memory, shared by vCPUs and device threads.
pub type GuestMemory = std::sync::Arc<GuestMemoryMmap>;

/// Where memory below 4 GiB ends: device registers lie between here and [`HIGH_MEMORY`].
pub const LOW_MEMORY_END: u64 = 0xc000_0000;

/// Where memory that does not fit below [`LOW_MEMORY_END`] goes on.
pub const HIGH_MEMORY: u64 = 1 << 32;

/// Shown by the host in the mappings of the monitor, so that guest memory can be told from the monitor's own.
pub const MEMORY_FILE_NAME: &CStr = c"lighter-guest";

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero, or more than an address space holds.
    #[error("{0} MiB is no size for guest memory")]
    Size(u64),
    /// memfd_create or ftruncate.
    #[error("cannot create a memory file of {mib} MiB")]
    File {
        /// Wanted size, MiB.
        mib: u64,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// mmap.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Wanted size, MiB.
        mib: u64,
        /// The system's reason.
        #[source]
        source: vm_memory::mmap::FromRangesError,
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

/// Creates zeroed guest memory of `mib` MiB, backed by one memory file; pages are taken from the host when touched.
///
/// # Errors
/// When the size is absurd or the host refuses the file or the mapping.
pub fn create(mib: u64) -> Result<GuestMemory, MemoryError> {
    let bytes = mib
        .checked_mul(1 << 20)
        .filter(|bytes| (1..1 << 46).contains(bytes));
    let bytes = bytes.ok_or(MemoryError::Size(mib))?;
    let file = memory_file(bytes).map_err(|source| MemoryError::File { mib, source })?;
    let mut offset = 0;
    let mut ranges = vec![];
    for (start, length) in regions(bytes) {
        let file = file
            .try_clone()
            .map_err(|source| MemoryError::File { mib, source })?;
        let length_usize = usize::try_from(length).map_err(|_| MemoryError::Size(mib))?;
        ranges.push((
            GuestAddress(start),
            length_usize,
            Some(FileOffset::new(file, offset)),
        ));
        offset += length;
    }
    let memory = GuestMemoryMmap::from_ranges_with_files(ranges);
    Ok(memory.map_err(|source| MemoryError::Map { mib, source })?.into())
}

fn memory_file(bytes: u64) -> std::io::Result<File> {
    // SAFETY: the name is a valid C string; the result is checked.
    let fd = unsafe {
        libc::memfd_create(
            MEMORY_FILE_NAME.as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` is open and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    // SAFETY: plain fcntl on an open descriptor.
    if unsafe {
        libc::fcntl(
            file.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW,
        )
    } < 0
    {
        return Err(std::io::Error::last_os_error());
    }
    Ok(file)
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
    fn absurd_sizes_are_refused() {
        assert!(matches!(create(0), Err(MemoryError::Size(0))));
        assert!(matches!(create(u64::MAX), Err(MemoryError::Size(_))));
    }
}
