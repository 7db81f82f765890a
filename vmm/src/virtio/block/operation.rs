//! A request as work on the host's files: one system call after another, until all of it is done.

use crate::memory::GuestMemory;
use lighter_disk::Chain;
use std::io;
use std::ops::Range;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Part of a request's data that is not in guest memory.
#[derive(Debug, thiserror::Error)]
#[error("a buffer is not in guest memory")]
pub(super) struct OutsideMemory;

/// Pieces of guest memory, in the order in which a transfer fills or drains them.
#[derive(Debug)]
pub(super) struct Segments {
    /// All of them lie in `memory` and have a length above 0; those before `first` are done with.
    pieces: Vec<libc::iovec>,
    first: usize,
    /// Keeps the pieces mapped for as long as they may be used.
    memory: GuestMemory,
}

// SAFETY: an iovec is an address and a length; the memory is guest memory, shared between all threads, kept mapped by
// `memory`, and only ever handed to the kernel.
unsafe impl Send for Segments {}

impl Segments {
    /// No pieces yet.
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self {
            pieces: vec![],
            first: 0,
            memory,
        }
    }

    /// Adds a piece; an empty one is left out.
    pub(super) fn push(&mut self, address: GuestAddress, length: u32) -> Result<(), OutsideMemory> {
        if length == 0 {
            return Ok(());
        }
        let piece = self
            .memory
            .get_slice(address, length as usize)
            .map_err(|_| OutsideMemory)?;
        self.pieces.push(libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        });
        Ok(())
    }

    /// Cuts off what is transferred after `bytes`.
    pub(super) fn split_off(&mut self, mut bytes: u64) -> Self {
        let mut rest = Self::new(self.memory.clone());
        let keep = self.pieces[self.first..].iter().position(|piece| {
            let whole = bytes >= piece.iov_len as u64;
            bytes -= if whole { piece.iov_len as u64 } else { 0 };
            !whole
        });
        let Some(keep) = keep else { return rest };
        rest.pieces = self.pieces.split_off(self.first + keep);
        if bytes > 0 {
            let mut both = rest.pieces[0];
            both.iov_len = bytes as usize;
            self.pieces.push(both);
            // Stays inside the piece, since `bytes` is less than its length.
            let first = &mut rest.pieces[0];
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(bytes as usize).cast();
            first.iov_len -= bytes as usize;
        }
        rest
    }

    /// What is still to be transferred.
    pub(super) fn rest(&self) -> &[libc::iovec] {
        &self.pieces[self.first..]
    }

    /// Bytes still to be transferred.
    pub(super) fn length(&self) -> u64 {
        self.rest().iter().map(|piece| piece.iov_len as u64).sum()
    }

    /// Notes that `bytes` were transferred.
    fn advance(&mut self, mut bytes: usize) {
        while let Some(piece) = self.pieces.get_mut(self.first) {
            if bytes < piece.iov_len {
                // Stays inside the piece, since `bytes` is less than its length.
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                piece.iov_len -= bytes;
                return;
            }
            bytes -= piece.iov_len;
            self.first += 1;
        }
    }
}

/// A range of the file to be emptied, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) at: u64,
    pub(super) length: u64,
    pub(super) how: Emptying,
}

/// What becomes of the space of an emptied range; it reads as zeros in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Emptying {
    /// Given back to the host's file system.
    PunchHole,
    /// Kept, so that later writes cannot fail for want of it.
    Zero,
}

impl Emptying {
    /// The mode of fallocate(2).
    fn mode(self) -> i32 {
        libc::FALLOC_FL_KEEP_SIZE
            | match self {
                Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
                Self::Zero => libc::FALLOC_FL_ZERO_RANGE,
            }
    }
}

/// Work on the disk's file, or its files.
#[derive(Debug)]
pub(super) struct Operation {
    /// Which file the next step is on.
    file: usize,
    work: Work,
    /// Reads from other files after that: which one, into what, where. The last one is next.
    more: Vec<(usize, Segments, u64)>,
    /// Whether the work is to be made stable afterwards.
    sync: bool,
}

#[derive(Debug)]
enum Work {
    Read {
        into: Segments,
        at: u64,
    },
    Write {
        from: Segments,
        at: u64,
    },
    /// The last one is next.
    Empty(Vec<Extent>),
}

/// The next system call of an operation.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step<'a> {
    /// preadv at an offset.
    Read(&'a [libc::iovec], u64),
    /// pwritev at an offset.
    Write(&'a [libc::iovec], u64),
    /// fallocate with a mode, at an offset, for a length.
    Allocate(i32, u64, u64),
    /// fdatasync: the length of the file never changes, so this is as good as fsync.
    Sync,
}

/// A [`Step`] without its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StepKind {
    Read,
    Write,
    Allocate,
    Sync,
}

impl StepKind {
    /// What cannot be done when the step fails.
    pub(super) fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Allocate => "discard or zero",
            Self::Sync => "sync",
        }
    }
}

impl Operation {
    /// Reads from the byte `at` on.
    pub(super) fn read(into: Segments, at: u64) -> Self {
        Self::of(Work::Read { into, at }, false)
    }

    /// Writes from the byte `at` on, and makes that stable if `sync`.
    pub(super) fn write(from: Segments, at: u64, sync: bool) -> Self {
        Self::of(Work::Write { from, at }, sync)
    }

    /// Empties `extents`, and makes that stable if `sync`.
    pub(super) fn empty(mut extents: Vec<Extent>, sync: bool) -> Self {
        extents.reverse();
        Self::of(Work::Empty(extents), sync)
    }

    /// The same, of one of the disk's files.
    pub(super) fn sync(file: usize) -> Self {
        Self {
            file,
            ..Self::flush()
        }
    }

    fn of(work: Work, sync: bool) -> Self {
        Self {
            file: 0,
            work,
            more: vec![],
            sync,
        }
    }

    /// Which of the disk's files the next step is on.
    pub(super) fn file(&self) -> usize {
        self.file
    }

    /// Has the work done where it is in a disk of several files, for which `chain` is prepared. Returns what the map is to be
    /// told when it is done: which clusters are empty, and whether their space is kept.
    ///
    /// # Errors
    /// When it cannot be prepared.
    pub(super) fn place(&mut self, chain: &mut Chain) -> io::Result<Vec<(Range<usize>, bool)>> {
        let start = chain.start();
        self.file = chain.top();
        let mut emptied = vec![];
        match &mut self.work {
            Work::Read { into, at } => {
                let runs = chain.runs(*at, into.length());
                // From behind, so that the next one is the last.
                for run in runs.iter().skip(1).rev() {
                    let rest = into.split_off(into.length() - run.length);
                    self.more.push((run.file, rest, run.at));
                }
                if let Some(first) = runs.first() {
                    (self.file, *at) = (first.file, first.at);
                }
            }
            Work::Write { from, at } => {
                chain.prepare_write(*at, from.length())?;
                *at += start;
            }
            Work::Empty(extents) => {
                for extent in extents {
                    let whole = chain.prepare_empty(extent.at, extent.length)?;
                    emptied.push((whole, extent.how == Emptying::Zero));
                    extent.at += start;
                }
            }
        }
        Ok(emptied)
    }

    /// Makes everything stable that was completed before.
    pub(super) fn flush() -> Self {
        Self::empty(vec![], true)
    }

    /// What to do next; `None` when all is done.
    pub(super) fn step(&self) -> Option<Step<'_>> {
        let step = match &self.work {
            Work::Read { into, at } if !into.rest().is_empty() => Some(Step::Read(into.rest(), *at)),
            Work::Write { from, at } if !from.rest().is_empty() => Some(Step::Write(from.rest(), *at)),
            Work::Empty(extents) => extents
                .last()
                .map(|extent| Step::Allocate(extent.how.mode(), extent.at, extent.length)),
            _ => None,
        };
        step.or(self.sync.then_some(Step::Sync))
    }

    /// Whether it changes what is on the disk.
    pub(super) fn changes(&self) -> bool {
        match &self.work {
            Work::Read { .. } => false,
            Work::Write { .. } => true,
            Work::Empty(extents) => !extents.is_empty(),
        }
    }

    /// Whether something is still to be made stable.
    pub(super) fn syncs(&self) -> bool {
        self.sync
    }

    /// The kind of [`Self::step`], for messages about its failure.
    pub(super) fn step_kind(&self) -> StepKind {
        match self.step() {
            Some(Step::Read(..)) => StepKind::Read,
            Some(Step::Write(..)) => StepKind::Write,
            Some(Step::Allocate(..)) => StepKind::Allocate,
            Some(Step::Sync) | None => StepKind::Sync,
        }
    }

    /// Notes that the step succeeded, with the system call's result.
    ///
    /// # Errors
    /// When a transfer made no progress: the file is shorter than the disk.
    pub(super) fn advance(&mut self, result: usize) -> io::Result<()> {
        match &mut self.work {
            Work::Read { into: data, at } | Work::Write { from: data, at } if !data.rest().is_empty() => {
                if result == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                data.advance(result);
                *at += result as u64;
                if data.rest().is_empty()
                    && let Some((file, into, at)) = self.more.pop()
                {
                    (self.file, self.work) = (file, Work::Read { into, at });
                }
            }
            Work::Empty(extents) if !extents.is_empty() => {
                extents.pop();
            }
            _ => self.sync = false,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn segments(lengths: &[u32]) -> Segments {
        let mut segments = Segments::new(memory::create(1).unwrap());
        for length in lengths {
            segments.push(GuestAddress(0x1000), *length).unwrap();
        }
        segments
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped() {
        let mut operation = Operation::write(segments(&[512, 0, 1024]), 4096, true);
        operation.advance(600).unwrap();
        let Some(Step::Write(rest, 4696)) = operation.step() else {
            panic!("{operation:?}");
        };
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].iov_len, 1024 - 88);
        operation.advance(1024 - 88).unwrap();
        assert!(matches!(operation.step(), Some(Step::Sync)));
        operation.advance(0).unwrap();
        assert!(operation.step().is_none());
    }

    #[test]
    fn a_transfer_without_progress_is_an_error_and_no_endless_loop() {
        let mut operation = Operation::read(segments(&[512]), 0);
        assert!(operation.advance(0).is_err());
    }

    #[test]
    fn extents_are_emptied_in_their_order_and_then_made_stable() {
        let extent = |at, how| Extent { at, length: 512, how };
        let extents = vec![extent(0, Emptying::PunchHole), extent(1024, Emptying::Zero)];
        let mut operation = Operation::empty(extents, true);
        let mut seen = vec![];
        while let Some(step) = operation.step() {
            seen.push(match step {
                Step::Allocate(_, at, _) => Some(at),
                _ => None,
            });
            operation.advance(0).unwrap();
        }
        assert_eq!(seen, [Some(0), Some(1024), None]);
    }

    #[test]
    fn buffers_outside_guest_memory_are_refused() {
        let mut segments = segments(&[]);
        for (address, length) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 2), (0, u32::MAX)] {
            assert!(segments.push(GuestAddress(address), length).is_err());
        }
    }
}
