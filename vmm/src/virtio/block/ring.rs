//! io_uring: every job has a slot, and one system call of it is with the kernel at a time.

use super::engine::{Finished, Job};
use super::operation::Step;
use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// All that is asked of a ring.
const OPERATIONS: [u8; 4] = [
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];

/// The asynchronous engine.
pub(super) struct Ring {
    ring: IoUring,
    files: Vec<Arc<File>>,
    /// Jobs that are under way; the kernel knows them by their index.
    slots: Vec<Option<Job>>,
    free: Vec<usize>,
    finished: VecDeque<Finished>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let under_way = self.under_way();
        formatter
            .debug_struct("Ring")
            .field("under_way", &under_way)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for up to `depth` jobs at once.
    ///
    /// # Errors
    /// When the host has no io_uring for us, or one that is too old.
    pub(super) fn new(files: Vec<Arc<File>>, depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(u32::from(depth).next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !OPERATIONS.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // A ring asks the kernel for things that no filter of system calls sees: this one never for anything else.
        let mut allowed = OPERATIONS.map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            files,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..usize::from(depth)).rev().collect(),
            finished: VecDeque::new(),
        })
    }

    pub(super) fn set_files(&mut self, files: Vec<Arc<File>>) {
        self.files = files;
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn completions(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    pub(super) fn start(&mut self, job: Job) {
        let slot = self.free.pop().expect("jobs are only started when there is room");
        self.slots[slot] = Some(job);
        self.go_on(slot, Ok(None));
    }

    pub(super) fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    pub(super) fn submit(&mut self) -> io::Result<bool> {
        while self.has_unsubmitted() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) => return Ok(false),
                    _ => return Err(error),
                },
            }
        }
        Ok(true)
    }

    pub(super) fn next_finished(&mut self) -> Option<Finished> {
        self.reap();
        self.finished.pop_front()
    }

    pub(super) fn wait_finished(&mut self) -> Option<Finished> {
        loop {
            if let Some(finished) = self.next_finished() {
                return Some(finished);
            }
            if self.under_way() == 0 {
                return None;
            }
            if self.ring.submit_and_wait(1).is_err() {
                // Interrupted, or the kernel has no memory for more: what it has already taken goes on in any case.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn under_way(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes the kernel's results; jobs that have more to do are queued for [`Self::submit`].
    fn reap(&mut self) {
        while let Some(result) = { self.ring.completion().next() } {
            let slot = usize::try_from(result.user_data()).expect("user data is an index");
            let outcome = usize::try_from(result.result())
                .map(Some)
                .map_err(|_| io::Error::from_raw_os_error(-result.result()));
            match outcome {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                    self.go_on(slot, Ok(None));
                }
                outcome => self.go_on(slot, outcome),
            }
        }
    }

    /// Queues the next step of a job, after noting the result of the last one, if any; or finishes it.
    fn go_on(&mut self, slot: usize, outcome: io::Result<Option<usize>>) {
        let job = self.slots[slot]
            .as_mut()
            .expect("the kernel answers each step once");
        let kind = job.operation.step_kind();
        let advanced = outcome.and_then(|done| done.map_or(Ok(()), |done| job.operation.advance(done)));
        if advanced.is_ok()
            && let Some(step) = job.operation.step()
        {
            let file = &self.files[job.operation.file()];
            let entry = entry(file.as_raw_fd(), step).user_data(slot as u64);
            // SAFETY: the job keeps the pieces, and they keep guest memory mapped, in its slot until the kernel is done
            // with them: see `drop`.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.expect("the ring has an entry for every slot");
            return;
        }
        if let Some(Job { reply, then, .. }) = self.slots[slot].take() {
            self.free.push(slot);
            let result = advanced.map_err(|error| (kind, error));
            self.finished.push_back(Finished { reply, then, result });
        }
    }
}

impl Drop for Ring {
    /// Buffers may go only when the kernel is done with them.
    fn drop(&mut self) {
        while self.wait_finished().is_some() {}
    }
}

fn entry(fd: RawFd, step: Step<'_>) -> squeue::Entry {
    let fd = types::Fd(fd);
    match step {
        // There are at most as many pieces as a queue has entries.
        Step::Read(pieces, at) => opcode::Readv::new(fd, pieces.as_ptr(), pieces.len() as u32)
            .offset(at)
            .build(),
        Step::Write(pieces, at) => opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32)
            .offset(at)
            .build(),
        Step::Allocate(mode, at, length) => opcode::Fallocate::new(fd, length).offset(at).mode(mode).build(),
        Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_else_is_asked_of_a_ring() {
        // A host without io_uring has the other engine.
        let Ok(mut ring) = Ring::new(vec![], 1) else {
            return;
        };
        let name = c"/etc/passwd";
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name.as_ptr()).build();
        // SAFETY: the name outlives the ring.
        unsafe { ring.ring.submission().push(&open) }.expect("the ring is empty");
        ring.ring.submit_and_wait(1).expect("submit");
        let result = ring
            .ring
            .completion()
            .next()
            .map(|completion| completion.result());
        assert_eq!(result, Some(-libc::EACCES));
    }
}
