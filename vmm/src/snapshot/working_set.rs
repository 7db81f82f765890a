//! Which pages of a snapshot's memory its VMs touch first. Noted when one has gone on from it, and had ready for the next: from a
//! disk in one go in place of one read for each, and in the process's page tables without a fault for each.
//!
//! It is a hint: nothing is wrong without it, or with another. The file (all numbers little-endian):
//!
//! ```text
//!   8 bytes   "LGHTWRK1"
//!   and for each part
//!   4         its first page, of 4 KiB
//!   4         how many; the highest bit says that they are written to
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const MAGIC: [u8; 8] = *b"LGHTWRK1";
const PAGE: usize = 4096;
const WRITTEN: u32 = 1 << 31;

/// The most that is noted.
const MOST_PARTS: usize = 64 << 10;

/// Neighbours closer than this, pages, are had ready as one when they are only read.
const NEAR: u32 = 4;

/// Neighbours closer than this, pages, are read from a disk as one.
const READ_NEAR: u32 = 32;

/// Bits of an entry in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

/// Pages side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Number of the first.
    first: u32,
    /// How many.
    pages: u32,
    /// They are copied, since they are written to.
    written: bool,
}

/// Opens the table of this process's pages.
///
/// # Errors
/// When there is no /proc.
pub fn open_pagemap() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// What of the private mapping of `bytes` at `start` this process has touched.
///
/// # Errors
/// When the kernel does not tell.
pub fn find(pagemap: &File, start: *const u8, bytes: usize) -> io::Result<Vec<Part>> {
    let mut parts = vec![];
    let mut entries = [0; 64 << 10];
    let (mut page, end) = (0, bytes / PAGE);
    while page < end {
        let count = (end - page).min(entries.len() / 8);
        let buffer = &mut entries[..count * 8];
        pagemap.read_exact_at(buffer, ((start as usize / PAGE + page) * 8) as u64)?;
        for (entry, number) in buffer.chunks_exact(8).zip(page..) {
            let entry = entry
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
            if entry & PRESENT != 0 {
                // Guest memory has fewer than 2^31 pages: 8 TiB.
                add(&mut parts, number as u32, entry & OF_FILE == 0);
            }
        }
        page += count;
    }
    parts.truncate(MOST_PARTS);
    Ok(parts)
}

fn add(parts: &mut Vec<Part>, page: u32, written: bool) {
    if let Some(last) = parts.last_mut() {
        let end = last.first + last.pages;
        let near = if written { 0 } else { NEAR };
        if last.written == written && page - end <= near {
            last.pages = page + 1 - last.first;
            return;
        }
    }
    parts.push(Part {
        first: page,
        pages: 1,
        written,
    });
}

/// Writes `parts` into the empty `file`.
///
/// # Errors
/// When it cannot be written.
pub fn write(parts: &[Part], file: &mut File) -> io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    for part in parts {
        let count = part.pages | if part.written { WRITTEN } else { 0 };
        bytes.extend(part.first.to_le_bytes());
        bytes.extend(count.to_le_bytes());
    }
    file.write_all(&bytes)
}

/// What [`write()`] wrote, as far as it lies in memory of `bytes`; nothing, if it is anything else.
pub fn read(file: &mut File, bytes: usize) -> Vec<Part> {
    let mut content = vec![];
    let most = (MAGIC.len() + MOST_PARTS * 8) as u64;
    match file.take(most).read_to_end(&mut content) {
        Ok(_) => parse(&content, bytes),
        Err(_) => vec![],
    }
}

fn parse(content: &[u8], bytes: usize) -> Vec<Part> {
    let Some(records) = content.strip_prefix(&MAGIC) else {
        return vec![];
    };
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u32::from(*byte))
    };
    let part = |record: &[u8]| {
        let (first, count) = (number(&record[..4]), number(&record[4..]));
        Part {
            first,
            pages: count & !WRITTEN,
            written: count & WRITTEN != 0,
        }
    };
    let lies_in = |part: &Part| u64::from(part.first) + u64::from(part.pages) <= (bytes / PAGE) as u64;
    records.chunks_exact(8).map(part).filter(lies_in).collect()
}

/// Has `parts` of the private mapping of `file` at `start` ready.
///
/// # Safety
/// The mapping has to have all of the parts, and to last as long as this runs.
pub unsafe fn prefetch(start: *mut u8, file: &File, parts: &[Part]) {
    for read in reads(parts) {
        let [at, end] = [read.start, read.end].map(|page| i64::from(page) * PAGE as i64);
        // SAFETY: of a descriptor that is open. It only begins to read.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), at, end - at, libc::POSIX_FADV_WILLNEED) };
    }
    // On a single processor the guest would wait for what it may not need.
    if processors() == 1 {
        return;
    }
    for part in parts {
        let advice = match part.written {
            true => libc::MADV_POPULATE_WRITE,
            false => libc::MADV_POPULATE_READ,
        };
        let [at, length] = [part.first, part.pages].map(|pages| pages as usize * PAGE);
        // SAFETY: the caller's mapping has it. What a page holds does not change by it.
        if unsafe { libc::madvise(start.add(at).cast(), length, advice) } != 0 {
            // A kernel before 5.14, or no memory: the guest has its faults.
            return;
        }
    }
}

/// How many processors this thread may run on.
fn processors() -> libc::c_int {
    // SAFETY: a set of processors is plain bits, all of which may be zero; it is valid for writing.
    unsafe {
        let mut set = std::mem::zeroed::<libc::cpu_set_t>();
        match libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) {
            0 => libc::CPU_COUNT(&set),
            _ => 1,
        }
    }
}

/// The pages of `parts`, and of what lies between those that are near: to be read in few long reads.
fn reads(parts: &[Part]) -> Vec<Range<u32>> {
    let mut reads: Vec<Range<u32>> = vec![];
    for part in parts {
        let end = part.first + part.pages;
        match reads.last_mut() {
            Some(last) if (last.end..=last.end.saturating_add(READ_NEAR)).contains(&part.first) => {
                last.end = end
            }
            _ => reads.push(part.first..end),
        }
    }
    reads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    fn part(first: u32, pages: u32, written: bool) -> Part {
        Part {
            first,
            pages,
            written,
        }
    }

    #[test]
    fn what_a_guest_touches_is_found_and_had_ready_for_the_next() {
        let pagemap = open_pagemap().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 << 20).unwrap();
        file.write_all_at(&[7; 3 * PAGE], 100 * PAGE as u64).unwrap();
        let map = || {
            let memory = memory::map_file(16, &file).unwrap();
            let start = memory.get_host_address(GuestAddress(0)).unwrap();
            (memory, start)
        };
        let (memory, start) = map();
        assert_eq!(find(&pagemap, start, 16 << 20).unwrap(), []);
        memory.write_obj(1u8, GuestAddress(50 * PAGE as u64)).unwrap();
        memory.write_obj(1u8, GuestAddress(51 * PAGE as u64)).unwrap();
        let seven: u8 = memory.read_obj(GuestAddress(101 * PAGE as u64)).unwrap();
        assert_eq!(seven, 7);
        let found = find(&pagemap, start, 16 << 20).unwrap();
        assert!(found.contains(&part(50, 2, true)), "{found:?}");
        let covers = |part: &Part| (part.first..part.first + part.pages).contains(&101) && !part.written;
        assert!(found.iter().any(covers), "{found:?}");

        let mut noted = tempfile::tempfile().unwrap();
        write(&found, &mut noted).unwrap();
        std::io::Seek::rewind(&mut noted).unwrap();
        let parts = read(&mut noted, 16 << 20);
        assert_eq!(parts, found);
        let (memory, start) = map();
        // SAFETY: a mapping of that length, which lasts as long as the process.
        unsafe { prefetch(start, &file, &parts) };
        if std::thread::available_parallelism().unwrap().get() > 1 {
            let ready = find(&pagemap, start, 16 << 20).unwrap();
            assert!(ready.contains(&part(50, 2, true)), "{ready:?}");
            assert!(ready.iter().any(covers), "{ready:?}");
        }
        let zero: u8 = memory.read_obj(GuestAddress(50 * PAGE as u64)).unwrap();
        assert_eq!(zero, 0, "a copy of the snapshot's");
    }

    #[test]
    fn neighbours_are_one_part() {
        let mut parts = vec![];
        for (page, written) in [
            (3, false),
            (4, false),
            (8, false),
            (13, true),
            (14, true),
            (16, true),
        ] {
            add(&mut parts, page, written);
        }
        let expected = [part(3, 6, false), part(13, 2, true), part(16, 1, true)];
        assert_eq!(parts, expected);
        // The numbers of a file may be anything.
        let parts = [
            part(3, 6, false),
            part(41, 2, true),
            part(80, 1, true),
            part(20, 1, true),
        ];
        assert_eq!(reads(&parts), [3..43, 80..81, 20..21]);
    }

    #[test]
    fn what_is_no_working_set_of_that_memory_is_none() {
        let parse = |content: &[u8]| parse(content, 10 * PAGE);
        assert_eq!(parse(b"LGHTSNAP\x01\0\0\0\x01\0\0\0"), []);
        let record = |first: u32, count: u32| [first.to_le_bytes(), count.to_le_bytes()].concat();
        let content = [
            &MAGIC[..],
            &record(1, 9),
            &record(1, 10),
            &record(u32::MAX, u32::MAX),
            &record(9, 1 | WRITTEN),
            &[1, 2, 3],
        ];
        assert_eq!(parse(&content.concat()), [part(1, 9, false), part(9, 1, true)]);
    }
}
