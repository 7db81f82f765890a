//! Writing guest memory to a file while the guest goes on.
//!
//! A copy of the process does it (fork(2)): it has the pages as they were at that moment, and the kernel copies those that
//! the guest writes to from then on. So the guest stands still only for as long as the kernel takes to copy page tables,
//! and needs no record of what it writes to, which it could not have of what devices write for it.
//!
//! The copy is of one thread of a process of many: it may not allocate, lock or panic. It closes what it inherited but for
//! the file, so that a connection which is closed meanwhile ends; and it ends with its parent.

use crate::memory::GuestMemory;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// Granularity of holes, bytes.
const PAGE: usize = 4096;

/// Most written at once, bytes.
const MOST: usize = 4 << 20;

/// Why memory cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryWriteError {
    /// The file would not take its length.
    #[error("cannot make the file for guest memory as long as that")]
    Length(#[source] io::Error),
    /// No second process.
    #[error("cannot copy the process that is to write guest memory")]
    Fork(#[source] io::Error),
    /// Writing.
    #[error("cannot write guest memory")]
    Write(#[source] io::Error),
    /// It was killed, or cannot be waited for.
    #[error("the process that wrote guest memory ended without having done so")]
    Ended,
}

/// A process that writes memory.
#[derive(Debug)]
pub struct Writer {
    process: libc::pid_t,
}

/// A region, as the copy of the process needs it: nothing in here is of the heap.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: *const u8,
    length: usize,
    /// In the file.
    offset: u64,
}

/// There are two regions: below and above the device hole.
const MOST_PIECES: usize = 2;

/// Begins to write `memory`, as it is now, to the empty `file`. Nothing may change memory until this returns.
///
/// # Errors
/// When there can be no second process, or the file is too long for its file system.
pub fn begin(memory: &GuestMemory, file: &File) -> Result<Writer, MemoryWriteError> {
    file.set_len(crate::memory::size(memory))
        .map_err(MemoryWriteError::Length)?;
    let mut pieces = [None; MOST_PIECES];
    let mut offset = 0;
    for (piece, region) in pieces.iter_mut().zip(memory.iter()) {
        *piece = Some(piece_of(region, offset));
        offset += region.len();
    }
    let parent = std::process::id();
    let fd = file.as_raw_fd();
    // SAFETY: what the new process does until it ends is `write_and_exit`, which only makes system calls.
    match unsafe { libc::fork() } {
        0 => write_and_exit(&pieces, fd, parent),
        process if process > 0 => Ok(Writer { process }),
        _ => Err(MemoryWriteError::Fork(io::Error::last_os_error())),
    }
}

fn piece_of(region: &GuestRegionMmap, offset: u64) -> Piece {
    Piece {
        start: region.as_ptr(),
        // A mapping's length.
        length: region.len() as usize,
        offset,
    }
}

impl Writer {
    /// Waits until memory is written.
    ///
    /// # Errors
    /// When it is not.
    pub fn wait(self) -> Result<(), MemoryWriteError> {
        let mut status = 0;
        // SAFETY: a child of this process that is waited for once; `status` is valid for writing.
        while unsafe { libc::waitpid(self.process, &raw mut status, 0) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(MemoryWriteError::Ended);
            }
        }
        match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
            (true, 0) => Ok(()),
            (true, errno) => Err(MemoryWriteError::Write(io::Error::from_raw_os_error(errno))),
            (false, _) => Err(MemoryWriteError::Ended),
        }
    }
}

/// What the copy of the process does. Its exit status is the error's number.
fn write_and_exit(pieces: &[Option<Piece>], file: RawFd, parent: u32) -> ! {
    const ONLY: libc::c_int = 3;
    // SAFETY: system calls on numbers; this process has one thread, and nothing of it runs after them but what is below.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The parent may have ended before.
        if libc::getppid().cast_unsigned() != parent {
            libc::_exit(libc::ESRCH);
        }
        if file != ONLY && libc::dup2(file, ONLY) < 0 {
            libc::_exit(errno());
        }
        libc::close_range(ONLY.cast_unsigned() + 1, libc::c_uint::MAX, 0);
    }
    for piece in pieces.iter().flatten() {
        if let Err(errno) = write_piece(*piece, ONLY) {
            // SAFETY: ends this process.
            unsafe { libc::_exit(errno) };
        }
    }
    // SAFETY: ends this process.
    unsafe { libc::_exit(0) }
}

fn errno() -> libc::c_int {
    // SAFETY: a pointer to this thread's variable.
    unsafe { *libc::__errno_location() }
}

/// Writes the runs of pages that are not zero.
fn write_piece(piece: Piece, file: RawFd) -> Result<(), libc::c_int> {
    let mut run = 0;
    let mut at = 0;
    while at < piece.length {
        let length = PAGE.min(piece.length - at);
        let written = match is_zero(piece.start.wrapping_add(at), length) {
            true => write_all(piece, at - run, run, file),
            false => {
                run += length;
                match run >= MOST {
                    true => write_all(piece, at + length - run, run, file),
                    false => Ok(false),
                }
            }
        };
        if written? {
            run = 0;
        }
        at += length;
    }
    write_all(piece, at - run, run, file).map(drop)
}

fn is_zero(start: *const u8, length: usize) -> bool {
    // SAFETY: inside a region of guest memory, which nobody writes to in this process.
    let bytes = unsafe { std::slice::from_raw_parts(start, length) };
    // SAFETY: any bytes are numbers.
    let (before, words, after) = unsafe { bytes.align_to::<u64>() };
    words.iter().all(|word| *word == 0) && before.iter().chain(after).all(|byte| *byte == 0)
}

/// Writes `length` bytes from `at` on; true, so that the run is over.
fn write_all(piece: Piece, at: usize, length: usize, file: RawFd) -> Result<bool, libc::c_int> {
    let mut done = 0;
    while done < length {
        let from = piece.start.wrapping_add(at + done);
        // Offsets in a file that has its length.
        let to = (piece.offset + (at + done) as u64).cast_signed();
        // SAFETY: that many bytes of the region.
        let written = unsafe { libc::pwrite(file, from.cast(), length - done, to) };
        match usize::try_from(written) {
            Ok(0) => return Err(libc::EIO),
            Ok(count) => done += count,
            Err(_) if errno() == libc::EINTR => {}
            Err(_) => return Err(errno()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn memory_is_written_as_it_was_and_zeros_are_holes() {
        let memory = memory::create(64).unwrap();
        let places = [0u64, 4096 * 3 + 5, (8 << 20) + 1, (64 << 20) - 8];
        for place in places {
            memory.write_obj(place + 1, GuestAddress(place)).unwrap();
        }
        // More than is written at once.
        memory
            .write_slice(&vec![7; MOST + PAGE], GuestAddress(16 << 20))
            .unwrap();
        let file = tempfile::tempfile().unwrap();
        let writer = begin(&memory, &file).unwrap();
        // After the copy: not in the file.
        memory.write_obj(99u64, GuestAddress(0)).unwrap();
        writer.wait().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 64 << 20);
        assert!(file.metadata().unwrap().blocks() * 512 < 6 << 20);
        for place in places {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, place).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), place + 1);
        }
        let mut block = vec![0; MOST + PAGE];
        file.read_exact_at(&mut block, 16 << 20).unwrap();
        assert!(block.iter().all(|byte| *byte == 7));
        let again = memory::map_file(64, &file).unwrap();
        assert_eq!(
            again.read_obj::<u64>(GuestAddress(8 << 20 | 1)).unwrap(),
            (8 << 20) + 2
        );
        again.write_obj(5u64, GuestAddress(0)).unwrap();
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), 1, "the mapping is private");
    }

    #[test]
    fn a_file_that_cannot_be_written_is_told() {
        let memory = memory::create(1).unwrap();
        memory.write_obj(1u64, GuestAddress(0)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        // Opened for reading: the length cannot be set, so it is begun on one that can and fails at the write.
        let error = begin(&memory, &File::open(&path).unwrap()).unwrap_err();
        assert!(matches!(error, MemoryWriteError::Length(_)));
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let piece = piece_of(memory.iter().next().unwrap(), 0);
        assert_eq!(write_piece(piece, full.as_raw_fd()), Err(libc::ENOSPC));
    }
}
