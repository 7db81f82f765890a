//! Who carries operations out: io_uring where the host allows it, plain system calls otherwise.

use super::operation::{Operation, StepKind};
use super::plain::Plain;
use super::request::Reply;
use super::ring::Ring;
use lighter_disk::Changes;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

/// An operation and whom to tell.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) reply: Reply,
    pub(super) operation: Operation,
    pub(super) then: Then,
}

/// What follows the operation when it has succeeded.
#[derive(Debug)]
pub(super) enum Then {
    /// The answer.
    Answer,
    /// In a disk of layers: the map is told which clusters are empty, and whether their space is kept; then the answer, or a flush
    /// and the answer.
    Change {
        emptied: Vec<(Range<usize>, bool)>,
        flush: bool,
    },
    /// It was a step of a flush of such a disk, for these besides the one whom it is for. With changes of the map the data is
    /// synced now, and they are to be written; without, all is.
    Flush {
        changes: Option<Changes>,
        others: Vec<Reply>,
    },
    /// The same, and the changes are written and synced.
    FlushMap { changes: Changes, others: Vec<Reply> },
}

/// A job that is over.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) reply: Reply,
    pub(super) then: Then,
    /// What went wrong at which step.
    pub(super) result: Result<(), (StepKind, io::Error)>,
}

/// Either way of doing I/O.
#[derive(Debug)]
pub(super) enum Engine {
    /// Asynchronous: many jobs at once.
    Ring(Box<Ring>),
    /// Synchronous: a job is over when [`Engine::start`] returns.
    Plain(Plain),
}

impl Engine {
    /// io_uring if it can be had (containers and `kernel.io_uring_disabled` forbid it), for up to `depth` jobs at once.
    pub(super) fn new(files: Vec<Arc<File>>, depth: u16) -> Self {
        match Ring::new(files.clone(), depth) {
            Ok(ring) => Self::Ring(Box::new(ring)),
            Err(_) => Self::plain(files),
        }
    }

    /// The one that needs nothing of the host.
    pub(super) fn plain(files: Vec<Arc<File>>) -> Self {
        Self::Plain(Plain::new(files))
    }

    /// Works on other files from here on; only when no job is under way.
    pub(super) fn set_files(&mut self, files: Vec<Arc<File>>) {
        match self {
            Self::Ring(ring) => ring.set_files(files),
            Self::Plain(plain) => plain.set_files(files),
        }
    }

    /// Whether another job may be started.
    pub(super) fn has_room(&self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_room(),
            Self::Plain(_) => true,
        }
    }

    /// Takes a job over; only when there is room.
    pub(super) fn start(&mut self, job: Job) {
        match self {
            Self::Ring(ring) => ring.start(job),
            Self::Plain(plain) => plain.start(job),
        }
    }

    /// Hands the started jobs to the kernel. False when it has no memory for some of them now: to be called again soon.
    ///
    /// # Errors
    /// When the kernel takes none at all.
    pub(super) fn submit(&mut self) -> io::Result<bool> {
        match self {
            Self::Ring(ring) => ring.submit(),
            Self::Plain(_) => Ok(true),
        }
    }

    /// Whether [`Self::submit`] has something to do.
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_unsubmitted(),
            Self::Plain(_) => false,
        }
    }

    /// The next job that is over.
    pub(super) fn next_finished(&mut self) -> Option<Finished> {
        match self {
            Self::Ring(ring) => ring.next_finished(),
            Self::Plain(plain) => plain.next_finished(),
        }
    }

    /// Waits for the next job to be over; `None` when there is none.
    pub(super) fn wait_finished(&mut self) -> Option<Finished> {
        match self {
            Self::Ring(ring) => ring.wait_finished(),
            Self::Plain(plain) => plain.next_finished(),
        }
    }

    /// Readable when jobs are over.
    pub(super) fn completions(&self) -> Option<RawFd> {
        match self {
            Self::Ring(ring) => Some(ring.completions()),
            Self::Plain(_) => None,
        }
    }
}
