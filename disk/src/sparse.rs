//! Files with holes.

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Where `file` has data, in `range`.
///
/// # Errors
/// When the file system does not tell.
pub fn extents(file: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut extents = vec![];
    let mut position = range.start;
    while position < range.end {
        let start = match seek(file, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => break,
            start => start?,
        };
        if start >= range.end {
            break;
        }
        position = seek(file, SeekFrom::Hole(start))?.min(range.end);
        extents.push(start..position);
    }
    Ok(extents)
}

/// Makes `range` read as zeros, and gives its space back where the file system can.
pub(crate) fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, range.start, range.end - range.start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = [0; 64 << 10];
            let mut at = range.start;
            while at < range.end {
                let part = (range.end - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..part as usize], at)?;
                at += part;
            }
            Ok(())
        }
        result => Ok(result?),
    }
}

/// Fills `buffer` from `at` on; what lies behind the end of the file is zeros.
pub(crate) fn read_padded(file: &File, mut buffer: &mut [u8], mut at: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, at) {
            Ok(0) => {
                buffer.fill(0);
                return Ok(());
            }
            Ok(count) => {
                buffer = &mut buffer[count..];
                at += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Whether all of it is zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any eight bytes are a number.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    words.iter().all(|word| *word == 0) && head.iter().chain(tail).all(|byte| *byte == 0)
}
