//! Large files with holes: copies that share what they can, and checksums that do not depend on where the holes are.

use lighter_disk::{Chain, extents};
use rustix::fs::ioctl_ficlone;
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
    for extent in extents(from, 0..from.metadata()?.len())? {
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

/// What is read page by page.
#[derive(Debug)]
pub enum Pages {
    /// A file.
    File(File),
    /// A data disk of several files, as one.
    Disk(Box<Chain>),
}

impl Pages {
    /// Its length, bytes.
    ///
    /// # Errors
    /// When the file does not tell.
    pub fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Disk(chain) => Ok(chain.size()),
        }
    }

    /// Where there is data.
    fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        match self {
            Self::File(file) => extents(file, 0..self.length()?),
            Self::Disk(chain) => chain.extents(),
        }
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.read_exact_at(buffer, at),
            Self::Disk(chain) => chain.read_at(buffer, at),
        }
    }
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

/// The [`Checksum`] of all pages.
///
/// # Errors
/// When the file cannot be read.
pub fn checksum(pages: &Pages) -> io::Result<String> {
    let mut sum = Checksum::default();
    each_page(pages, |number, page| {
        sum.page(number, page);
        Ok(())
    })?;
    Ok(sum.finish(pages.length()?))
}

/// Calls `each` with the number and the bytes of each page that has something else than zeros, in their order.
///
/// # Errors
/// When the file cannot be read, or `each` fails.
pub fn each_page(pages: &Pages, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let length = pages.length()?;
    let page = PAGE as u64;
    let mut buffer = vec![0; CHUNK];
    let mut done = 0;
    for extent in pages.extents()? {
        let mut position = (extent.start / page * page).max(done);
        let end = extent.end.next_multiple_of(page).min(length);
        while position < end {
            // No more than a chunk.
            let wanted = (end - position).min(CHUNK as u64) as usize;
            pages.read_at(&mut buffer[..wanted], position)?;
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

    fn sum_of(file: &File) -> String {
        checksum(&Pages::File(file.try_clone().unwrap())).unwrap()
    }

    #[test]
    fn a_checksum_sees_each_byte_and_no_holes() {
        let one = file();
        let sum = sum_of(&one);
        let filled = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; LENGTH as usize + 5];
        one.read_exact_at(&mut bytes, 0).unwrap();
        filled.write_all_at(&bytes, 0).unwrap();
        assert_eq!(sum_of(&filled), sum);
        for (place, value) in [(0, 1), ((1 << 20) + 9_999, 6), (LENGTH + 4, 8)] {
            let other = file();
            other.write_all_at(&[value], place).unwrap();
            assert_ne!(sum_of(&other), sum, "at {place}");
        }
        one.set_len(LENGTH + 6).unwrap();
        assert_ne!(sum_of(&one), sum);
        // The same data elsewhere.
        let moved = tempfile::tempfile().unwrap();
        moved.set_len(LENGTH).unwrap();
        moved.write_all_at(&[1], 0).unwrap();
        let first = sum_of(&moved);
        moved.write_all_at(&[0], 0).unwrap();
        moved.write_all_at(&[1], 4096).unwrap();
        assert_ne!(sum_of(&moved), first);
    }
}
