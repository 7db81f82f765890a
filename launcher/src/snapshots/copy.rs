//! Large files with holes: copies that share what they can, and checksums that do not depend on where the holes are.

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use xxhash_rust::xxh3::Xxh3;

/// What checksums go by, bytes: no file system has smaller holes.
pub const PAGE: usize = 4096;

/// Read at once, bytes.
const CHUNK: usize = 1 << 20;

/// Makes the empty file `to` a copy of `from`: one that shares all of its blocks where the file system can do that, else one
/// with the same holes.
///
/// # Errors
/// When the file system does not take it.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    if ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    to.set_len(from.metadata()?.len())?;
    for extent in extents(from)? {
        let (mut from, mut to) = (from, to);
        from.seek(io::SeekFrom::Start(extent.start))?;
        to.seek(io::SeekFrom::Start(extent.start))?;
        // Inside of the kernel where it can.
        let length = extent.end - extent.start;
        if io::copy(&mut from.take(length), &mut to)? != length {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter while it was copied",
            ));
        }
    }
    Ok(())
}

/// Where `file` has data.
///
/// # Errors
/// When the file system does not tell.
pub fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let length = file.metadata()?.len();
    let mut extents = vec![];
    let mut position = 0;
    while position < length {
        let start = match seek(file, SeekFrom::Data(position)) {
            Err(Errno::NXIO) => break,
            start => start?,
        };
        position = seek(file, SeekFrom::Hole(start))?;
        extents.push(start..position);
    }
    Ok(extents)
}

/// The checksum of a file that is read page by page: XXH3, 128 bits, of each page that has something else than zeros, behind its
/// number, and of the length.
#[derive(Default)]
pub struct Checksum(Xxh3);

impl Checksum {
    /// The next page that has something else than zeros.
    pub fn page(&mut self, number: u64, page: &[u8]) {
        self.0.update(&number.to_le_bytes());
        self.0.update(page);
    }

    /// In hexadecimal, for a file of `length`.
    pub fn finish(mut self, length: u64) -> String {
        self.0.update(&length.to_le_bytes());
        format!("{:032x}", self.0.digest128())
    }
}

/// The [`Checksum`] of a file.
///
/// # Errors
/// When the file cannot be read.
pub fn checksum(file: &File) -> io::Result<String> {
    let mut sum = Checksum::default();
    each_page(file, |number, page| {
        sum.page(number, page);
        Ok(())
    })?;
    Ok(sum.finish(file.metadata()?.len()))
}

/// Calls `each` with the number and the bytes of each page that has something else than zeros, in their order.
///
/// # Errors
/// When the file cannot be read, or `each` fails.
pub fn each_page(file: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let length = file.metadata()?.len();
    let page = PAGE as u64;
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    for extent in extents(file)? {
        let mut position = (extent.start / page * page).max(done);
        let end = extent.end.next_multiple_of(page).min(length);
        while position < end {
            // No more than a chunk.
            let wanted = (end - position).min(CHUNK as u64) as usize;
            file.read_exact_at(&mut buffer[..wanted], position)?;
            for bytes in buffer[..wanted].chunks(PAGE) {
                if bytes != &ZEROS[..bytes.len()] {
                    each(position / page, bytes)?;
                }
                position += bytes.len() as u64;
            }
        }
        done = position.max(done);
    }
    Ok(())
}

const ZEROS: [u8; PAGE] = [0; PAGE];

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const LENGTH: u64 = 8 << 20;

    /// Data at 1 MiB, zeros at 3 MiB, one byte at the odd end.
    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LENGTH + 5).unwrap();
        file.write_all_at(&[7; 10_000], 1 << 20).unwrap();
        file.write_all_at(&[0; 8192], 3 << 20).unwrap();
        file.write_all_at(&[9], LENGTH + 4).unwrap();
        file
    }

    #[test]
    fn a_copy_has_the_bytes_and_the_holes() {
        let from = file();
        let to = tempfile::tempfile().unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(to.metadata().unwrap().len(), LENGTH + 5);
        let read = |file: &File| {
            let mut bytes = vec![0; LENGTH as usize + 5];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert_eq!(read(&from), read(&to));
        assert!(to.metadata().unwrap().blocks() * 512 < LENGTH / 2);
    }

    #[test]
    fn a_checksum_sees_each_byte_and_no_holes() {
        let one = file();
        let sum = checksum(&one).unwrap();
        let filled = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; LENGTH as usize + 5];
        one.read_exact_at(&mut bytes, 0).unwrap();
        filled.write_all_at(&bytes, 0).unwrap();
        assert_eq!(checksum(&filled).unwrap(), sum);
        for (place, value) in [(0, 1), ((1 << 20) + 9_999, 6), (LENGTH + 4, 8)] {
            let other = file();
            other.write_all_at(&[value], place).unwrap();
            assert_ne!(checksum(&other).unwrap(), sum, "at {place}");
        }
        one.set_len(LENGTH + 6).unwrap();
        assert_ne!(checksum(&one).unwrap(), sum);
        // The same data elsewhere.
        let moved = tempfile::tempfile().unwrap();
        moved.set_len(LENGTH).unwrap();
        moved.write_all_at(&[1], 0).unwrap();
        let first = checksum(&moved).unwrap();
        moved.write_all_at(&[0], 0).unwrap();
        moved.write_all_at(&[1], 4096).unwrap();
        assert_ne!(checksum(&moved).unwrap(), first);
    }
}
