//! A driver for tests: real split virtqueues in guest memory, worked the way Linux works them.
//!
//! It obeys notification suppression in both directions, so that a device that forgets to ask for notifications or to
//! interrupt makes a test fail rather than pass by luck: [`DriverQueue::kick`] only kicks when the device asked for it,
//! and [`DriverQueue::wait`] only looks again when the interrupt line was raised.

use super::Activation;
use super::interrupt::Interrupt;
use super::queue::{Counters, VirtQueue};
use super::worker::DeviceThread;
use crate::memory::{self, GuestMemory};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The descriptor goes on at `next`.
pub(crate) const NEXT: u16 = 1;
/// The device may write, and not read, the buffer.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// How long an answer may take. A device that answers at all does so much sooner, also on a slow machine.
const PATIENCE_MS: i32 = 120_000;

/// Guest memory, handed out piece by piece, and the interrupt of the device under test.
pub(crate) struct Guest {
    pub(crate) memory: GuestMemory,
    pub(crate) interrupt: Interrupt,
    /// The device's.
    pub(crate) thread: DeviceThread,
    next: u64,
}

impl Guest {
    /// A guest of `mib` MiB with nothing in it.
    pub(crate) fn new(mib: u64) -> Self {
        Self {
            memory: memory::create(mib).unwrap(),
            interrupt: Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            thread: DeviceThread::start("test", Box::new(|| Ok(()))).unwrap().0,
            // The first page stays empty, so that a null address is never right.
            next: 0x1000,
        }
    }

    /// `length` bytes of memory, aligned to 16 bytes.
    pub(crate) fn allocate(&mut self, length: usize) -> GuestAddress {
        self.allocate_aligned(length, 16)
    }

    /// `length` bytes of memory, aligned to `align` bytes.
    pub(crate) fn allocate_aligned(&mut self, length: usize, align: u64) -> GuestAddress {
        let start = self.next.next_multiple_of(align);
        self.next = start + length as u64;
        assert!(self.next <= memory::size(&self.memory), "the guest is too small");
        GuestAddress(start)
    }

    /// A buffer that the device reads, holding `bytes`.
    pub(crate) fn readable(&mut self, bytes: &[u8]) -> Buffer {
        let address = self.allocate(bytes.len());
        self.memory.write_slice(bytes, address).unwrap();
        Buffer::readable(address, bytes.len())
    }

    /// A buffer that the device writes.
    pub(crate) fn writable(&mut self, length: usize) -> Buffer {
        let address = self.allocate(length);
        Buffer::writable(address, length)
    }

    /// Fills a buffer with `byte`.
    pub(crate) fn fill(&self, buffer: Buffer, byte: u8) {
        let bytes = vec![byte; buffer.length as usize];
        self.memory.write_slice(&bytes, buffer.address).unwrap();
    }

    /// Takes all memory back that was allocated after `queue` was; what is in it stays.
    pub(crate) fn free_all_but_queue(&mut self, queue: &DriverQueue) {
        assert_eq!(queue.in_flight(), 0);
        self.next = queue.end;
    }

    /// The bytes of a buffer.
    pub(crate) fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.length as usize];
        self.memory.read_slice(&mut bytes, buffer.address).unwrap();
        bytes
    }

    /// What a device with these queues is activated with.
    pub(crate) fn activation(&self, queues: &[&DriverQueue], features: u64) -> Activation {
        self.activation_with(queues.iter().map(|queue| queue.device_side()).collect(), features)
    }

    /// What a device is activated with when it gets queues back, as after a pause.
    pub(crate) fn activation_with(&self, queues: Vec<VirtQueue>, features: u64) -> Activation {
        Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features,
            thread: self.thread.clone(),
        }
    }

    /// Waits until the device raises its interrupt; says false when it does not for `timeout_ms`.
    pub(crate) fn interrupted_within(&self, timeout_ms: i32) -> bool {
        let mut waited = libc::pollfd {
            fd: self.interrupt.line().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd for the length of the call.
        let ready = unsafe { libc::poll(&mut waited, 1, timeout_ms) };
        if ready > 0 {
            let _ = self.interrupt.line().read();
            self.interrupt.acknowledge(u32::MAX);
        }
        ready > 0
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_until_failed(&self) {
        while !self.interrupt.needs_reset() {
            assert!(self.interrupted_within(PATIENCE_MS), "the device did not fail");
        }
    }
}

/// Where one descriptor points.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) address: GuestAddress,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

impl Buffer {
    pub(crate) fn readable(address: GuestAddress, length: usize) -> Self {
        Self {
            address,
            length: length.try_into().unwrap(),
            writable: false,
        }
    }

    pub(crate) fn writable(address: GuestAddress, length: usize) -> Self {
        Self {
            writable: true,
            ..Self::readable(address, length)
        }
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

/// How to make descriptors of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In the ring's own table.
    Direct,
    /// In a table of their own, behind one descriptor of the ring.
    Indirect,
}

/// A chain that the device has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// As [`DriverQueue::add`] gave it.
    pub(crate) head: u16,
    /// Bytes written by the device.
    pub(crate) length: u32,
}

/// The driver's side of one virtqueue.
pub(crate) struct DriverQueue {
    memory: GuestMemory,
    size: u16,
    event_idx: bool,
    descriptors: GuestAddress,
    available: GuestAddress,
    used: GuestAddress,
    kick: Arc<EventFd>,
    pub(crate) counters: Arc<Counters>,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    tables: Vec<GuestAddress>,
    next_available: u16,
    kicked_up_to: u16,
    next_used: u16,
    /// Where the guest's memory behind the rings begins.
    end: u64,
}

impl DriverQueue {
    /// Lays an empty ring of `size` entries into the guest.
    pub(crate) fn new(guest: &mut Guest, size: u16, event_idx: bool) -> Self {
        let entries = usize::from(size);
        let descriptors = guest.allocate(16 * entries);
        let available = guest.allocate(6 + 2 * entries);
        let used = guest.allocate(6 + 8 * entries);
        let tables = (0..size).map(|_| guest.allocate(16 * entries)).collect();
        Self {
            memory: guest.memory.clone(),
            size,
            event_idx,
            descriptors,
            available,
            used,
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            counters: Arc::default(),
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            tables,
            end: guest.next,
            next_available: 0,
            kicked_up_to: 0,
            next_used: 0,
        }
    }

    /// The device's side, as the transport builds it when the driver has set the queue up.
    pub(crate) fn device_side(&self) -> VirtQueue {
        let mut ring = Queue::new(self.size).unwrap();
        ring.try_set_desc_table_address(self.descriptors).unwrap();
        ring.try_set_avail_ring_address(self.available).unwrap();
        ring.try_set_used_ring_address(self.used).unwrap();
        ring.set_event_idx(self.event_idx);
        ring.set_ready(true);
        VirtQueue::new(ring, self.kick.clone(), self.counters.clone())
    }

    /// Makes a chain available and returns its head.
    pub(crate) fn add(&mut self, buffers: &[Buffer], layout: Layout) -> u16 {
        assert!(!buffers.is_empty());
        match layout {
            Layout::Direct => {
                let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
                let chained = chain(buffers, |position| indices[position]);
                for (index, descriptor) in indices.iter().zip(chained) {
                    self.write_descriptor(*index, descriptor);
                }
                let head = indices[0];
                self.chains.insert(head, indices);
                self.make_available(head);
                head
            }
            Layout::Indirect => {
                assert!(buffers.len() <= usize::from(self.size));
                let head = self.free.pop().unwrap();
                let table = self.tables[usize::from(head)];
                let chained = chain(buffers, |position| u16::try_from(position).unwrap());
                for (position, descriptor) in chained.into_iter().enumerate() {
                    let address = GuestAddress(table.0 + 16 * position as u64);
                    self.memory.write_obj(descriptor, address).unwrap();
                }
                let length = 16 * u32::try_from(buffers.len()).unwrap();
                self.write_descriptor(head, Descriptor::new(table.0, length, INDIRECT, 0));
                self.chains.insert(head, vec![head]);
                self.make_available(head);
                head
            }
        }
    }

    /// Writes an entry of the descriptor table as it is, for hostile chains.
    pub(crate) fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        let address = GuestAddress(self.descriptors.0 + 16 * u64::from(index));
        self.memory.write_obj(descriptor, address).unwrap();
    }

    /// Puts `head` on the available ring, whatever it is.
    pub(crate) fn make_available(&mut self, head: u16) {
        let entry = u64::from(self.next_available % self.size);
        self.memory
            .write_obj(head, GuestAddress(self.available.0 + 4 + 2 * entry))
            .unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.publish_available(self.next_available);
    }

    /// Sets the index of the available ring, for hostile values.
    pub(crate) fn publish_available(&self, index: u16) {
        let address = GuestAddress(self.available.0 + 2);
        self.memory.store(index, address, Ordering::Release).unwrap();
    }

    /// Notifies the device of what was added, if it wants to hear of it. Returns whether it did.
    pub(crate) fn kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.load(self.used, 4 + 8 * u64::from(self.size));
            // vring_need_event of the specification, section 2.7.7.
            self.next_available.wrapping_sub(event).wrapping_sub(1)
                < self.next_available.wrapping_sub(self.kicked_up_to)
        } else {
            self.load(self.used, 0) & 1 == 0
        };
        self.kicked_up_to = self.next_available;
        if wanted {
            self.force_kick();
        }
        wanted
    }

    /// Notifies the device, asked for or not.
    pub(crate) fn force_kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next used chain, if there is one.
    pub(crate) fn next_used(&mut self) -> Option<Used> {
        let index = self.load(self.used, 2);
        fence(Ordering::Acquire);
        if index == self.next_used {
            return None;
        }
        let entry = self.used.0 + 4 + 8 * u64::from(self.next_used % self.size);
        let [head, length]: [u32; 2] = [
            self.memory.read_obj(GuestAddress(entry)).unwrap(),
            self.memory.read_obj(GuestAddress(entry + 4)).unwrap(),
        ];
        self.next_used = self.next_used.wrapping_add(1);
        let head = u16::try_from(head).unwrap();
        let freed = self.chains.remove(&head);
        self.free
            .extend(freed.expect("the device used a chain that was not available, or twice"));
        Some(Used { head, length })
    }

    /// The next used chain, if there is one; otherwise there will be an interrupt when there is.
    pub(crate) fn next_used_or_interrupt(&mut self) -> Option<Used> {
        self.next_used().or_else(|| {
            let used_event = GuestAddress(self.available.0 + 4 + 2 * u64::from(self.size));
            self.memory
                .store(self.next_used, used_event, Ordering::SeqCst)
                .unwrap();
            fence(Ordering::SeqCst);
            self.next_used()
        })
    }

    /// Waits for the next used chain, asking for an interrupt as Linux does.
    pub(crate) fn wait(&mut self, guest: &Guest) -> Used {
        loop {
            if let Some(used) = self.next_used_or_interrupt() {
                return used;
            }
            assert!(
                guest.interrupted_within(PATIENCE_MS),
                "no interrupt came; the used ring stands at {} of {}",
                self.load(self.used, 2),
                self.next_available
            );
        }
    }

    /// Adds a chain, notifies, and waits until it is used.
    pub(crate) fn round_trip(&mut self, guest: &Guest, buffers: &[Buffer], layout: Layout) -> Used {
        let head = self.add(buffers, layout);
        self.kick();
        let used = self.wait(guest);
        assert_eq!(used.head, head);
        used
    }

    /// How many chains are with the device.
    pub(crate) fn in_flight(&self) -> usize {
        self.chains.len()
    }

    fn load(&self, ring: GuestAddress, offset: u64) -> u16 {
        self.memory
            .load(GuestAddress(ring.0 + offset), Ordering::SeqCst)
            .unwrap()
    }
}

/// Descriptors for `buffers`, linked by the indices that `index_of` gives to positions.
fn chain(buffers: &[Buffer], index_of: impl Fn(usize) -> u16) -> Vec<Descriptor> {
    let last = buffers.len() - 1;
    let link = |(position, buffer): (usize, &Buffer)| {
        let (flags, next) = if position < last {
            (buffer.flags() | NEXT, index_of(position + 1))
        } else {
            (buffer.flags(), 0)
        };
        Descriptor::new(buffer.address.0, buffer.length, flags, next)
    };
    buffers.iter().enumerate().map(link).collect()
}

/// The driver itself is tested against the library's own device side.
mod tests {
    use super::*;

    #[test]
    fn a_device_sees_what_the_driver_added_in_both_layouts() {
        for (layout, event_idx) in [(Layout::Direct, false), (Layout::Indirect, true)] {
            let mut guest = Guest::new(16);
            let mut driver = DriverQueue::new(&mut guest, 8, event_idx);
            let mut device = driver.device_side();
            // More rounds than entries: the rings wrap.
            for round in 0..20u8 {
                let buffers = [guest.readable(&[round; 3]), guest.writable(2)];
                let head = driver.add(&buffers, layout);
                assert!(driver.kick());
                let chain = device.pop(&guest.memory).unwrap().unwrap();
                let lengths: Vec<(u32, bool)> = chain.map(|d| (d.len(), d.is_write_only())).collect();
                assert_eq!(lengths, [(3, false), (2, true)]);
                device.push_used(&guest.memory, head, 2).unwrap();
                assert!(!device.enable_kicks(&guest.memory).unwrap());
                device.signal(&guest.memory, &guest.interrupt).unwrap();
                assert_eq!(driver.wait(&guest), Used { head, length: 2 });
                assert_eq!(driver.in_flight(), 0);
            }
        }
    }
}
