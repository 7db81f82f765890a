//! The device's thread: chains from the queue to the engine, results back.

use super::QUEUE_SIZE;
use super::backend::Disk;
use super::engine::{Engine, Finished, Job, Then};
use super::operation::{Operation, StepKind};
use super::request::{self, Action, Buffer, Malformed, Reply, Rules, Status};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{self, Poller};
use lighter_disk::Changes;
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

/// How an operation went: what failed, and at which step.
type Outcome = Result<(), (StepKind, io::Error)>;

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
    /// A flush of the layers is under way: their map is written by one at a time, in the order of its changes.
    pub(super) flushes: bool,
    /// Flushes that came meanwhile; one will do for all.
    pub(super) waiting: Vec<Reply>,
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
            while left > 0 && self.has_room() && !idle {
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
            if !self.has_room() {
                return Ok(());
            }
        }
    }

    fn has_room(&self) -> bool {
        self.engine.has_room() && self.waiting.len() < usize::from(QUEUE_SIZE)
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
            // Layers are flushed when the write is done.
            writethrough: self.writethrough && !self.disk.has_layers(),
        };
        let (mut reply, action) = request::parse(&self.memory, head, chain, rules)?;
        if let Action::Operate(operation) = &action {
            reply.durable |= self.writethrough && operation.changes();
        }
        match action {
            Action::Operate(_) if reply.durable && !self.disk.is_reliable() => {
                self.answer(reply, Status::IoError)
            }
            Action::Operate(operation) => self.start(reply, operation),
            Action::Identify(buffers) => {
                let status = self.identify(&buffers);
                self.answer(reply, status)
            }
            Action::Refuse(status) => self.answer(reply, status),
        }
    }

    fn start(&mut self, reply: Reply, mut operation: Operation) -> Result<(), HandlerError> {
        let Some(mut chain) = self.disk.layers() else {
            let then = Then::Answer;
            self.engine.start(Job {
                reply,
                operation,
                then,
            });
            return Ok(());
        };
        if operation.syncs() {
            drop(chain);
            match self.flushes {
                true => self.waiting.push(reply),
                false => self.flush(reply, vec![]),
            }
            return Ok(());
        }
        let placed = operation.place(&mut chain);
        drop(chain);
        match placed {
            Ok(emptied) => {
                let flush = self.writethrough && operation.changes();
                let then = Then::Change { emptied, flush };
                self.engine.start(Job {
                    reply,
                    operation,
                    then,
                });
                Ok(())
            }
            Err(error) => {
                let status = self.failed(StepKind::Write, &error);
                self.answer(reply, status)
            }
        }
    }

    /// Makes everything stable that was completed before: data first, then the map that tells where it is. Only when no flush is
    /// under way.
    fn flush(&mut self, reply: Reply, others: Vec<Reply>) {
        let Some(mut chain) = self.disk.layers() else {
            return;
        };
        let (changes, operation) = (chain.take_changes(), Operation::sync(chain.top()));
        drop(chain);
        self.flushes = true;
        let then = Then::Flush { changes, others };
        self.engine.start(Job {
            reply,
            operation,
            then,
        });
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
        let Finished { reply, then, result } = finished;
        match then {
            Then::Answer => self.conclude(reply, result),
            Then::Change { emptied, flush } => {
                if result.is_ok()
                    && let Some(mut chain) = self.disk.layers()
                {
                    for (clusters, kept) in emptied {
                        chain.emptied(clusters, kept);
                    }
                }
                match flush && result.is_ok() {
                    true if self.flushes => self.waiting.push(reply),
                    true => self.flush(reply, vec![]),
                    false => return self.conclude(reply, result),
                }
                Ok(())
            }
            Then::Flush {
                changes: Some(changes),
                others,
            } => {
                let written = result.and_then(|()| match self.disk.layers() {
                    Some(chain) => chain.write_changes(&changes).map_err(|e| (StepKind::Write, e)),
                    None => Ok(()),
                });
                if let (Ok(()), Some(chain)) = (&written, self.disk.layers()) {
                    let operation = Operation::sync(chain.top());
                    drop(chain);
                    let then = Then::FlushMap { changes, others };
                    self.engine.start(Job {
                        reply,
                        operation,
                        then,
                    });
                    return Ok(());
                }
                self.give_back(changes);
                self.flushed(reply, others, written)
            }
            Then::Flush {
                changes: None,
                others,
            } => self.flushed(reply, others, result),
            Then::FlushMap { changes, others } => {
                if result.is_err() {
                    self.give_back(changes);
                }
                self.flushed(reply, others, result)
            }
        }
    }

    fn give_back(&self, changes: Changes) {
        if let Some(mut chain) = self.disk.layers() {
            chain.give_back(changes);
        }
    }

    /// A flush is over, for all for whom it was. Those that came meanwhile are next.
    fn flushed(&mut self, reply: Reply, others: Vec<Reply>, result: Outcome) -> Result<(), HandlerError> {
        self.flushes = false;
        let failed = result.is_err();
        self.conclude(reply, result)?;
        for other in others {
            let status = match failed || !self.disk.is_reliable() {
                true => Status::IoError,
                false => Status::Ok,
            };
            self.answer(other, status)?;
        }
        if let Some(next) = self.waiting.pop() {
            // The slot of the job that is over is free.
            let others = std::mem::take(&mut self.waiting);
            self.flush(next, others);
        }
        Ok(())
    }

    fn conclude(&mut self, reply: Reply, result: Outcome) -> Result<(), HandlerError> {
        let status = match result {
            Ok(()) if reply.durable && !self.disk.is_reliable() => Status::IoError,
            Ok(()) => Status::Ok,
            Err((StepKind::Allocate, error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Status::Unsupported
            }
            Err((step, error)) => self.failed(step, &error),
        };
        self.answer(reply, status)
    }

    /// Notes that the host did not do something.
    fn failed(&self, step: StepKind, error: &io::Error) -> Status {
        if step == StepKind::Sync {
            self.disk.distrust();
        }
        if let Some(text) = self.disk.note_trouble(step, error) {
            worker::report(worker::Severity::Trouble, &self.name, &text);
        }
        Status::IoError
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
