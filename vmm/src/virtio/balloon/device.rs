//! The device and its thread.

use super::reclaim::{PAGE, ReclaimError, give_back, join};
use super::{MOST_PAGES, QUEUE_SIZE};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{DeviceThread, Handler, Poller, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use serde::{Deserialize, Serialize};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vmm_sys_util::epoll::EventSet;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;

/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: a driver may take its pages back when it runs short.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_REPORTING: a driver may report free pages.
const F_REPORTING: u64 = 1 << 5;

/// Where the configuration space has the field `actual`.
const ACTUAL: u64 = 4;

/// What the device knows besides its rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages in the balloon, as the driver says.
    pub actual_pages: u32,
}

/// A balloon whose target is empty.
#[derive(Debug, Default)]
pub struct Balloon {
    state: BalloonState,
    returned_bytes: Arc<AtomicU64>,
    worker: Option<Worker<BalloonHandler>>,
}

impl Balloon {
    /// An empty balloon.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of guest memory given back to the host so far; a page counts each time it is given back.
    pub fn returned_bytes(&self) -> Arc<AtomicU64> {
        self.returned_bytes.clone()
    }

    /// What the device knows besides its rings.
    pub fn state(&self) -> BalloonState {
        self.state
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        "balloon"
    }

    fn device_type(&self) -> u32 {
        device_type::BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    /// struct virtio_balloon_config, section 5.5.4: num_pages (the target) and actual.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[ACTUAL as usize..].copy_from_slice(&self.state.actual_pages.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            self.state.actual_pages = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for queue in [INFLATE, DEFLATE] {
            if !activation.queues.get(queue).is_some_and(VirtQueue::is_ready) {
                return Err(ActivateError::QueueNotReady(queue));
            }
        }
        let handler = BalloonHandler {
            memory: activation.memory,
            busy: vec![true; activation.queues.len()],
            queues: activation.queues,
            interrupt: activation.interrupt.clone(),
            returned_bytes: self.returned_bytes.clone(),
        };
        let worker = Worker::start(&activation.thread, activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        let handler = self.worker.take().and_then(Worker::stop);
        handler.map_or(vec![], |handler| handler.queues)
    }

    fn save(&mut self, _thread: &DeviceThread) -> io::Result<Vec<u8>> {
        postcard::to_allocvec(&self.state).map_err(io::Error::other)
    }

    fn restore(&mut self, own: &[u8]) -> io::Result<()> {
        self.state = postcard::from_bytes(own).map_err(io::Error::other)?;
        Ok(())
    }

    fn reset(&mut self) {
        self.state = BalloonState::default();
    }
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum BalloonError {
    /// The driver broke a ring.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver gave what is not its own, or the host does not take it.
    #[error(transparent)]
    Reclaim(#[from] ReclaimError),
    /// An array of page numbers cannot be read.
    #[error("cannot read page numbers from guest memory")]
    Read(#[source] io::Error),
}

#[derive(Debug)]
struct BalloonHandler {
    memory: GuestMemory,
    queues: Vec<VirtQueue>,
    /// Queues to look at without waiting.
    busy: Vec<bool>,
    interrupt: Interrupt,
    returned_bytes: Arc<AtomicU64>,
}

impl Handler for BalloonHandler {
    type Error = BalloonError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        for (token, queue) in self.queues.iter().enumerate() {
            poller.add(queue.kick().as_raw_fd(), token as u64, EventSet::IN)?;
        }
        Ok(())
    }

    fn start(&mut self, poller: &Poller) -> Result<(), BalloonError> {
        self.after_batch(poller)
    }

    fn handle(&mut self, token: u64, _events: EventSet, _poller: &Poller) -> Result<(), BalloonError> {
        // Tokens are the queues' indices.
        let index = token as usize;
        self.queues[index].consume_kick();
        self.busy[index] = true;
        Ok(())
    }

    fn after_batch(&mut self, _poller: &Poller) -> Result<(), BalloonError> {
        let (memory, returned_bytes) = (&self.memory, &self.returned_bytes);
        for (index, (queue, busy)) in self.queues.iter_mut().zip(&mut self.busy).enumerate() {
            // A queue that was not negotiated is not ready.
            if !std::mem::take(busy) || !queue.is_ready() {
                continue;
            }
            *busy = queue.serve(memory, &self.interrupt, |chain| {
                let returned = match index {
                    INFLATE => inflate(memory, chain)?,
                    REPORTING => report(memory, chain)?,
                    _ => 0,
                };
                returned_bytes.fetch_add(returned, Ordering::Relaxed);
                Ok::<u32, BalloonError>(0)
            })?;
        }
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if self.busy.contains(&true) { 0 } else { -1 }
    }
}

/// Gives back the pages that a chain of the inflate queue numbers; says how many bytes that were.
fn inflate(memory: &GuestMemory, chain: Chain) -> Result<u64, BalloonError> {
    let mut reader = chain.reader(memory).map_err(QueueError::Chain)?;
    let count = (reader.available_bytes() / 4).min(MOST_PAGES);
    let mut bytes = vec![0; 4 * count];
    reader.read_exact(&mut bytes).map_err(BalloonError::Read)?;
    let (numbers, _) = bytes.as_chunks();
    let mut returned = 0;
    for (first, pages) in join(numbers.iter().map(|number| u32::from_le_bytes(*number))) {
        returned += give_back(memory, first * PAGE, pages * PAGE)?;
    }
    Ok(returned)
}

/// Gives back the ranges that a chain of the reporting queue has as buffers; says how many bytes that were.
fn report(memory: &GuestMemory, chain: Chain) -> Result<u64, BalloonError> {
    let mut returned = 0;
    for buffer in chain.writable() {
        returned += give_back(memory, buffer.addr().0, buffer.len().into())?;
    }
    Ok(returned)
}

#[cfg(test)]
mod tests;
