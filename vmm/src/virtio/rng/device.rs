//! The device and its thread.

use super::{MOST, QUEUE_SIZE};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{Handler, Poller, Worker};
use crate::virtio::{ActivateError, Activation, VirtioDevice, device_type};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use vmm_sys_util::epoll::EventSet;

const KICK: u64 = 0;

/// A source of random bytes.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker<RngHandler>>,
}

impl Rng {
    /// A source that no driver uses yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        "rng"
    }

    fn device_type(&self) -> u32 {
        device_type::RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    /// There is no configuration space.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queue = activation.queues.into_iter().next().filter(VirtQueue::is_ready);
        let handler = RngHandler {
            memory: activation.memory,
            queue: queue.ok_or(ActivateError::QueueNotReady(0))?,
            interrupt: activation.interrupt.clone(),
            again: true,
        };
        let worker = Worker::start(&activation.thread, activation.interrupt, handler);
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        let handler = self.worker.take().and_then(Worker::stop);
        handler.map(|handler| handler.queue).into_iter().collect()
    }
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum RngError {
    /// The driver broke the ring.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// getrandom.
    #[error("cannot get random bytes from the host")]
    Random(#[source] io::Error),
    /// A buffer cannot be written.
    #[error("cannot write random bytes into guest memory")]
    Write(#[source] io::Error),
}

#[derive(Debug)]
struct RngHandler {
    memory: GuestMemory,
    queue: VirtQueue,
    interrupt: Interrupt,
    again: bool,
}

impl Handler for RngHandler {
    type Error = RngError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(self.queue.kick().as_raw_fd(), KICK, EventSet::IN)
    }

    fn start(&mut self, poller: &Poller) -> Result<(), RngError> {
        self.after_batch(poller)
    }

    fn handle(&mut self, _token: u64, _events: EventSet, _poller: &Poller) -> Result<(), RngError> {
        self.queue.consume_kick();
        Ok(())
    }

    fn after_batch(&mut self, _poller: &Poller) -> Result<(), RngError> {
        let memory = &self.memory;
        self.again = self
            .queue
            .serve(memory, &self.interrupt, |chain| fill(memory, chain))?;
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if self.again { 0 } else { -1 }
    }
}

/// Fills a chain's writable buffers, up to [`MOST`] bytes, and says how many bytes that were.
fn fill(memory: &GuestMemory, chain: Chain) -> Result<u32, RngError> {
    let mut writer = chain.writer(memory).map_err(QueueError::Chain)?;
    let mut left = writer.available_bytes().min(MOST);
    let mut bytes = [0; 4096];
    let mut written = 0;
    while left > 0 {
        let part = left.min(bytes.len());
        // SAFETY: `part` bytes of a buffer of our own.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), part, 0) };
        // Short, or interrupted, only when a signal came.
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(RngError::Random(error));
        };
        writer.write_all(&bytes[..got]).map_err(RngError::Write)?;
        left -= got;
        // At most `MOST` in all.
        written += got as u32;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, DriverQueue, Guest, Layout, NEXT, WRITE};
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::GuestAddress;

    fn active(size: u16, event_idx: bool) -> (Guest, DriverQueue, Rng) {
        let mut guest = Guest::new(16);
        let driver = DriverQueue::new(&mut guest, size, event_idx);
        let mut rng = Rng::new();
        rng.activate(guest.activation(&[&driver], 0)).unwrap();
        (guest, driver, rng)
    }

    #[test]
    fn buffers_are_filled_with_different_bytes_each_time() {
        for (layout, event_idx) in [(Layout::Direct, false), (Layout::Indirect, true)] {
            let (mut guest, mut driver, mut rng) = active(4, event_idx);
            let mut seen = vec![];
            for _ in 0..10 {
                let buffers = [guest.writable(32), guest.writable(33)];
                let used = driver.round_trip(&guest, &buffers, layout);
                assert_eq!(used.length, 65);
                seen.extend(buffers.map(|buffer| guest.bytes(buffer)[..32].to_vec()));
            }
            seen.sort();
            seen.dedup();
            assert_eq!(seen.len(), 20, "two buffers of 32 random bytes are equal");
            assert_eq!(rng.deactivate().len(), 1);
        }
    }

    #[test]
    fn a_greedy_driver_gets_no_more_than_the_most() {
        let (mut guest, mut driver, _rng) = active(4, false);
        let buffers = [guest.readable(&[7; 8]), guest.writable(1 << 20)];
        let used = driver.round_trip(&guest, &buffers, Layout::Direct);
        assert_eq!(used.length as usize, MOST);
        assert_eq!(guest.bytes(buffers[0]), [7; 8]);
        assert!(guest.bytes(buffers[1])[MOST..].iter().all(|byte| *byte == 0));
        let used = driver.round_trip(&guest, &[buffers[0]], Layout::Direct);
        assert_eq!(used.length, 0);
    }

    #[test]
    fn a_buffer_outside_memory_fails_the_device_until_it_is_reset() {
        let (mut guest, mut driver, mut rng) = active(4, false);
        let outside = Buffer::writable(GuestAddress(u64::MAX - 8), 64);
        driver.add(&[outside], Layout::Direct);
        driver.kick();
        guest.wait_until_failed();
        assert_eq!(rng.deactivate().len(), 1);
        guest.interrupt.reset();
        let mut driver = DriverQueue::new(&mut guest, 4, false);
        rng.activate(guest.activation(&[&driver], 0)).unwrap();
        let buffer = guest.writable(16);
        assert_eq!(driver.round_trip(&guest, &[buffer], Layout::Direct).length, 16);
    }

    #[test]
    fn a_chain_in_a_loop_and_a_ring_that_overflows_do_no_harm() {
        let (mut guest, mut driver, mut rng) = active(4, false);
        let buffer = guest.writable(16);
        driver.write_descriptor(0, Descriptor::new(buffer.address.0, 16, NEXT | WRITE, 0));
        driver.make_available(0);
        driver.publish_available(1000);
        driver.force_kick();
        guest.wait_until_failed();
        assert_eq!(rng.deactivate().len(), 1);
    }

    #[test]
    fn a_queue_that_is_not_set_up_is_named() {
        let guest = Guest::new(16);
        let error = Rng::new().activate(guest.activation(&[], 0)).unwrap_err();
        assert_eq!(error.to_string(), "the driver did not set up queue 0");
    }
}
