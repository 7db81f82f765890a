//! One virtqueue as a device sees it: descriptor chains in, used buffers out, with the counters of both.
//!
//! The ring arithmetic is `virtio-queue`'s; here is what every device does around it.

use super::interrupt::Interrupt;
use crate::memory::GuestMemory;
use lighter_protocol::monitor::QueueStatistics;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// A chain of descriptors that a driver made available; `reader(&memory)` and `writer(&memory)` give its bytes, checked
/// against guest memory.
pub type Chain = virtio_queue::DescriptorChain<GuestMemory>;

/// How a driver broke the rules of a ring (sections 2.7.5 to 2.7.13), or why memory of a ring is gone.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The available ring is ahead of the device by more than the queue's size, or not in guest memory.
    #[error("the available ring is broken")]
    Available(#[source] virtio_queue::Error),
    /// A used element cannot be written.
    #[error("the used ring is broken")]
    Used(#[source] virtio_queue::Error),
    /// The notification fields cannot be accessed.
    #[error("the ring's notification fields are broken")]
    Notification(#[source] virtio_queue::Error),
    /// A chain's descriptors do not lie in guest memory, are too many, or loop.
    #[error("a descriptor chain is broken")]
    Chain(#[source] virtio_queue::Error),
}

/// Counters, shared with whoever shows them.
#[derive(Debug, Default)]
pub struct Counters {
    /// Notifications from the guest.
    pub kicks: AtomicU64,
    /// Chains taken.
    pub chains: AtomicU64,
    /// Interrupts sent.
    pub interrupts: AtomicU64,
    /// Bytes written into the guest's buffers.
    pub written_bytes: AtomicU64,
}

impl Counters {
    /// A copy for showing.
    pub fn snapshot(&self) -> QueueStatistics {
        QueueStatistics {
            kicks: self.kicks.load(Ordering::Relaxed),
            chains: self.chains.load(Ordering::Relaxed),
            interrupts: self.interrupts.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
        }
    }
}

/// A virtqueue with its notification from the driver.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    kick: Arc<EventFd>,
    counters: Arc<Counters>,
    /// Chains were put on the used ring that the ring's own count of them has missed.
    uncounted: bool,
}

impl VirtQueue {
    /// Wraps a ring that the driver has set up. `kick` is signalled by KVM when the driver notifies (ioeventfd).
    pub fn new(queue: Queue, kick: Arc<EventFd>, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            kick,
            counters,
            uncounted: false,
        }
    }

    /// Whether the driver has set it up.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// To wait on for the driver's notifications; reset with [`Self::consume_kick`].
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Reads the notification so that it can be waited for again.
    pub fn consume_kick(&self) {
        // WouldBlock (nobody kicked) is as good as a kick: the ring is looked at in any case.
        let _ = self.kick.read();
        self.counters.kicks.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes the next available chain.
    ///
    /// # Errors
    /// When the driver broke the ring; the device then has to fail.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        let mut available = match self.queue.iter(memory.clone()) {
            Ok(available) => available,
            Err(virtio_queue::Error::QueueNotReady) => return Ok(None),
            Err(error) => return Err(QueueError::Available(error)),
        };
        let chain = available.next();
        if chain.is_some() {
            self.counters.chains.fetch_add(1, Ordering::Relaxed);
        }
        Ok(chain)
    }

    /// As [`Self::pop`]; when there is no chain, asks for a notification of the next, so that none is missed.
    ///
    /// # Errors
    /// When the driver broke the ring; the device then has to fail.
    pub fn pop_or_listen(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, QueueError> {
        if let Some(chain) = self.pop(memory)? {
            return Ok(Some(chain));
        }
        match self.enable_kicks(memory)? {
            true => self.pop(memory),
            false => Ok(None),
        }
    }

    /// Gives the last popped chain back to the available ring, to be popped again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
        self.counters.chains.fetch_sub(1, Ordering::Relaxed);
    }

    /// Puts a chain on the used ring; `written` is the number of bytes written into it.
    ///
    /// # Errors
    /// When the used ring is not in guest memory.
    pub fn push_used(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), QueueError> {
        self.count_written(written);
        self.queue
            .add_used(&**memory, head, written)
            .map_err(QueueError::Used)
    }

    fn count_written(&self, bytes: u32) {
        let written = &self.counters.written_bytes;
        written.fetch_add(bytes.into(), Ordering::Relaxed);
    }

    /// Puts several chains on the used ring at once, as (head, bytes written): the driver sees all of them or none.
    ///
    /// # Errors
    /// When the used ring is not in guest memory, or a head is none.
    pub fn push_used_together(
        &mut self,
        memory: &GuestMemory,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some((&(head, written), before)) = chains.split_last() else {
            return Ok(());
        };
        let first = self.queue.next_used();
        // At most a ring's worth of chains is ever available.
        for (position, &(head, written)) in (0u16..).zip(before) {
            let entry = first.wrapping_add(position) % self.queue.size();
            let address = GuestAddress(self.queue.used_ring()).checked_add(4 + 8 * u64::from(entry));
            let address = address.ok_or(QueueError::Used(virtio_queue::Error::AddressOverflow))?;
            // struct virtq_used_elem (section 2.7.8).
            let element = [u32::from(head).to_le(), written.to_le()];
            memory
                .write_obj(element, address)
                .map_err(|error| QueueError::Used(virtio_queue::Error::GuestMemory(error)))?;
            self.count_written(written);
        }
        // The last one is what makes all of them visible.
        self.queue.set_next_used(first.wrapping_add(before.len() as u16));
        self.uncounted |= !before.is_empty();
        self.push_used(memory, head, written)
    }

    /// Raises the interrupt if the driver wants to hear of what was put on the used ring.
    ///
    /// # Errors
    /// When the ring's fields are not in guest memory.
    pub fn signal(&mut self, memory: &GuestMemory, interrupt: &Interrupt) -> Result<(), QueueError> {
        let wanted = self
            .queue
            .needs_notification(&**memory)
            .map_err(QueueError::Notification)?;
        if std::mem::take(&mut self.uncounted) || wanted {
            self.counters.interrupts.fetch_add(1, Ordering::Relaxed);
            interrupt.used_ring();
        }
        Ok(())
    }

    /// Asks the driver not to notify while the device is looking at the ring anyway.
    ///
    /// # Errors
    /// When the ring's fields are not in guest memory.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&**memory)
            .map_err(QueueError::Notification)
    }

    /// Asks for notifications again; true when chains have come in between and have to be looked at first.
    ///
    /// # Errors
    /// When the ring's fields are not in guest memory.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&**memory)
            .map_err(QueueError::Notification)
    }

    /// Works off available chains that a device completes at once; `answer` says how many bytes it wrote into one. Tells
    /// the driver, and says whether to be called again without waiting for a notification: no more than a ring's worth
    /// is done at a time, so that a worker hears a stop in spite of a busy driver.
    ///
    /// # Errors
    /// When the driver broke the ring, and as `answer`.
    pub fn serve<E: From<QueueError>>(
        &mut self,
        memory: &GuestMemory,
        interrupt: &Interrupt,
        mut answer: impl FnMut(Chain) -> Result<u32, E>,
    ) -> Result<bool, E> {
        self.disable_kicks(memory)?;
        let mut used = false;
        let mut again = true;
        for _ in 0..self.queue.size() {
            let Some(chain) = self.pop_or_listen(memory)? else {
                again = false;
                break;
            };
            let head = chain.head_index();
            let written = answer(chain)?;
            self.push_used(memory, head, written)?;
            used = true;
        }
        if used {
            self.signal(memory, interrupt)?;
        }
        Ok(again)
    }

    /// The counters, shared.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The ring itself.
    pub fn into_ring(self) -> Queue {
        self.queue
    }

    /// The ring's state as plain data.
    pub fn save(&self) -> RingState {
        self.queue.state().into()
    }
}

/// A ring as plain data: where it lies and how far it is worked off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingState {
    /// Largest size.
    pub max_size: u16,
    /// Size chosen by the driver.
    pub size: u16,
    /// Set up by the driver.
    pub ready: bool,
    /// Next entry of the available ring to take.
    pub next_avail: u16,
    /// Next entry of the used ring to write.
    pub next_used: u16,
    /// VIRTIO_F_EVENT_IDX was agreed on.
    pub event_idx: bool,
    /// Guest physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest physical address of the available ring.
    pub avail_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
}

impl From<QueueState> for RingState {
    fn from(state: QueueState) -> Self {
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

impl RingState {
    /// Builds the ring back.
    ///
    /// # Errors
    /// When a field has a value that no driver could have set.
    pub fn restore(self) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
    }
}
