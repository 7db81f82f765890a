//! The device's thread: chains from the queue to the engine, results back.

use super::QUEUE_SIZE;
use super::backend::Disk;
use super::engine::{Engine, Finished, Job};
use super::operation::StepKind;
use super::request::{self, Action, Buffer, Malformed, Reply, Rules, Status};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{self, Poller};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

const KICK: u64 = 0;
const COMPLETIONS: u64 = 1;

/// How soon to try again when the kernel had no memory for a submission, milliseconds.
const RETRY_MS: i32 = 10;

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandlerError {
    /// The driver broke the ring.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver sent something that is no request.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The host's io_uring failed as a whole.
    #[error("cannot submit I/O to the host")]
    Submit(#[source] io::Error),
}

/// What the device's thread owns.
#[derive(Debug)]
pub(super) struct Handler {
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    pub(super) engine: Engine,
    pub(super) memory: GuestMemory,
    pub(super) queue: VirtQueue,
    pub(super) interrupt: Interrupt,
    pub(super) writethrough: bool,
    /// There are used chains that the driver was not told of.
    pub(super) unsignalled: bool,
    /// There is more to do than waiting: milliseconds until then.
    pub(super) again_ms: Option<i32>,
}

impl worker::Handler for Handler {
    type Error = HandlerError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick().as_raw_fd(), KICK, EventSet::IN)?;
        if let Some(completions) = self.engine.completions() {
            poller.add(completions, COMPLETIONS, EventSet::IN)?;
        }
        Ok(())
    }

    fn start(&mut self, _poller: &Poller) -> Result<(), HandlerError> {
        self.work()
    }

    fn handle(&mut self, token: u64, _events: EventSet, _poller: &Poller) -> Result<(), HandlerError> {
        if token == KICK {
            self.queue.consume_kick();
        }
        Ok(())
    }

    fn after_batch(&mut self, _poller: &Poller) -> Result<(), HandlerError> {
        self.work()
    }

    fn timeout_ms(&self) -> i32 {
        self.again_ms.unwrap_or(-1)
    }

    fn stop(&mut self) {
        while let Some(finished) = self.engine.wait_finished() {
            // A broken ring was, or will be, found by `pop`.
            let _ = self.complete(finished);
        }
        let _ = self.signal();
    }
}

impl Handler {
    /// Takes chains and completes them until there is nothing to do or, so that a stop is heard in spite of a busy
    /// driver, a queue's worth is done.
    pub(super) fn work(&mut self) -> Result<(), HandlerError> {
        self.again_ms = None;
        self.queue.disable_kicks(&self.memory)?;
        let mut left = QUEUE_SIZE;
        loop {
            let mut idle = false;
            while left > 0 && self.engine.has_room() && !idle {
                match self.queue.pop(&self.memory)? {
                    Some(chain) => {
                        self.begin(chain)?;
                        left -= 1;
                    }
                    None => idle = true,
                }
            }
            let mut submitted = true;
            let mut any = true;
            // Jobs of several steps come back to be submitted again.
            while submitted && (any || self.engine.has_unsubmitted()) {
                submitted = self.engine.submit().map_err(HandlerError::Submit)?;
                any = self.complete_finished()?;
            }
            if !submitted {
                self.again_ms = Some(RETRY_MS);
            }
            if idle {
                if !self.queue.enable_kicks(&self.memory)? {
                    return Ok(());
                }
                // A driver that makes nothing available over and over is also worked for only so long.
                left = left.saturating_sub(1);
            }
            if left == 0 {
                self.again_ms = Some(0);
                return Ok(());
            }
            if !self.engine.has_room() {
                return Ok(());
            }
        }
    }

    fn begin(&mut self, chain: Chain) -> Result<(), HandlerError> {
        let head = chain.head_index();
        self.begin_at(head, chain)?;
        // The plain engine is done already: the driver need not wait for the rest of the batch.
        if matches!(self.engine, Engine::Plain(_)) {
            self.complete_finished()?;
        }
        Ok(())
    }

    fn begin_at(&mut self, head: u16, chain: impl Iterator<Item = Descriptor>) -> Result<(), HandlerError> {
        let rules = Rules {
            sectors: self.disk.sectors,
            read_only: self.disk.read_only,
            writethrough: self.writethrough,
        };
        let (reply, action) = request::parse(&self.memory, head, chain, rules)?;
        match action {
            Action::Operate(_) if reply.durable && !self.disk.is_reliable() => {
                self.answer(reply, Status::IoError)
            }
            Action::Operate(operation) => {
                self.engine.start(Job { reply, operation });
                Ok(())
            }
            Action::Identify(buffers) => {
                let status = self.identify(&buffers);
                self.answer(reply, status)
            }
            Action::Refuse(status) => self.answer(reply, status),
        }
    }

    /// Completes what is over and tells the driver; says whether there was anything.
    fn complete_finished(&mut self) -> Result<bool, HandlerError> {
        let mut any = false;
        while let Some(finished) = self.engine.next_finished() {
            self.complete(finished)?;
            any = true;
        }
        self.signal()?;
        Ok(any)
    }

    fn signal(&mut self) -> Result<(), HandlerError> {
        if std::mem::take(&mut self.unsignalled) {
            self.queue.signal(&self.memory, &self.interrupt)?;
        }
        Ok(())
    }

    fn complete(&mut self, finished: Finished) -> Result<(), HandlerError> {
        let status = match finished.result {
            Ok(()) if finished.reply.durable && !self.disk.is_reliable() => Status::IoError,
            Ok(()) => Status::Ok,
            Err((StepKind::Allocate, error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Status::Unsupported
            }
            Err((step, error)) => {
                if step == StepKind::Sync {
                    self.disk.distrust();
                }
                if let Some(text) = self.disk.note_trouble(step, &error) {
                    worker::report(worker::Severity::Trouble, &self.name, &text);
                }
                Status::IoError
            }
        };
        self.answer(finished.reply, status)
    }

    fn answer(&mut self, reply: Reply, status: Status) -> Result<(), HandlerError> {
        // In guest memory, as `parse` checked, so this cannot fail.
        let _ = self.memory.write_obj(status as u8, reply.status);
        // With the status byte this is at most what `split` let pass, which fits.
        let data = if status == Status::Ok { reply.data } else { 0 };
        self.queue.push_used(&self.memory, reply.head, data + 1)?;
        self.unsignalled = true;
        Ok(())
    }

    fn identify(&self, buffers: &[Buffer]) -> Status {
        let serial = self.disk.serial();
        let mut rest = &serial[..];
        for buffer in buffers {
            let (part, later) = rest.split_at(rest.len().min(buffer.length as usize));
            if self.memory.write_slice(part, buffer.address).is_err() {
                return Status::IoError;
            }
            rest = later;
        }
        Status::Ok
    }
}
