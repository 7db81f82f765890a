//! Plain system calls, one after another on the device's thread.

use super::engine::{Finished, Job};
use super::operation::Step;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// The synchronous engine.
#[derive(Debug)]
pub(super) struct Plain {
    files: Vec<Arc<File>>,
    finished: VecDeque<Finished>,
}

impl Plain {
    pub(super) fn new(files: Vec<Arc<File>>) -> Self {
        Self {
            files,
            finished: VecDeque::new(),
        }
    }

    pub(super) fn set_files(&mut self, files: Vec<Arc<File>>) {
        self.files = files;
    }

    pub(super) fn start(&mut self, job: Job) {
        let Job {
            reply,
            mut operation,
            then,
        } = job;
        let mut result = Ok(());
        while let Some(step) = operation.step() {
            let outcome = carry_out(&self.files[operation.file()], step);
            if matches!(&outcome, Err(error) if error.kind() == io::ErrorKind::Interrupted) {
                continue;
            }
            let kind = operation.step_kind();
            let advanced = outcome.and_then(|done| operation.advance(done));
            if let Err(error) = advanced {
                result = Err((kind, error));
                break;
            }
        }
        self.finished.push_back(Finished { reply, then, result });
    }

    pub(super) fn next_finished(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }
}

fn carry_out(file: &File, step: Step<'_>) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    // Offsets on a disk are below its length, which fits an off_t; there are at most as many pieces as a queue has
    // entries.
    let result = match step {
        // SAFETY: the pieces lie in guest memory, which `Segments` keeps mapped.
        Step::Read(pieces, at) => unsafe {
            libc::preadv(fd, pieces.as_ptr(), pieces.len() as i32, at as i64)
        },
        // SAFETY: as above.
        Step::Write(pieces, at) => unsafe {
            libc::pwritev(fd, pieces.as_ptr(), pieces.len() as i32, at as i64)
        },
        // SAFETY: plain numbers.
        Step::Allocate(mode, at, length) => unsafe {
            libc::fallocate(fd, mode, at as i64, length as i64) as isize
        },
        // SAFETY: plain numbers.
        Step::Sync => unsafe { libc::fdatasync(fd) as isize },
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
