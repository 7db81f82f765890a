//! A driver that does to a device what the input says: rings with any descriptors, any bytes in memory, pauses, and resets.
//!
//! A device's thread works off what is in its rings before it hears that it is to stop. So activating and deactivating it is all that
//! takes: nothing waits, and the same bytes are the same story.

use crate::Input;
use lighter_vmm::memory::{self, GuestMemory};
use lighter_vmm::virtio::interrupt::Interrupt;
use lighter_vmm::virtio::mmio::MmioTransport;
use lighter_vmm::virtio::queue::VirtQueue;
use lighter_vmm::virtio::worker::{self, DeviceThread};
use lighter_vmm::virtio::{Activation, VirtioDevice};
use std::sync::{Arc, LazyLock};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Entries of each ring.
const SIZE: u16 = 16;
/// Each queue has a page: its descriptors at the beginning, then both rings.
const PAGE: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Where buffers are: what descriptors can name in two bytes.
const BUFFERS: u64 = 0x1_0000;
/// As far as stories reach, but for wild addresses.
const END: u64 = BUFFERS + 0x2_0000;

/// struct virtq_desc's flags, section 2.7.5.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Memory, made once: it lasts as long as the process.
pub static MEMORY: LazyLock<GuestMemory> = LazyLock::new(|| {
    worker::report_to(Arc::new(|_, _, _| {}));
    memory::create(2).expect("guest memory")
});

/// Fills the part of guest memory that stories use with zeros.
pub fn clear_memory() {
    const ZEROS: [u8; END as usize] = [0; END as usize];
    MEMORY.write_slice(&ZEROS, GuestAddress(0)).expect("write");
}

/// An eventfd.
pub fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("an eventfd")
}

/// Has `device` run as `input` says, some times; `outside` happens before each.
pub fn drive(device: &mut dyn VirtioDevice, input: &mut Input<'_>, mut outside: impl FnMut(&mut Input<'_>)) {
    clear_memory();
    let prepare = device.prepare().expect("the device is new");
    let (thread, _) = DeviceThread::start("fuzzed", prepare).expect("a thread");
    let interrupt = Interrupt::new(event());
    let count = device.queue_sizes().len();
    let mut available = vec![0u16; count];
    let mut queues = new_queues(device);
    // Those of the rings are the transport's.
    let rings = u64::from(input.byte()) << 28;
    let features = (device.features() | 3 << 28) & (input.word() as u64 | rings | 1 << 32);
    for queue in &mut queues {
        queue.set_event_idx(features & 1 << 29 != 0);
    }
    let mut queues: Vec<VirtQueue> = queues
        .into_iter()
        .map(|queue| VirtQueue::new(queue, Arc::new(event()), Arc::default()))
        .collect();
    for _ in 0..4 {
        let (offset, mut config) = (input.byte().into(), [0; 8]);
        device.write_config(offset, input.take(4));
        device.read_config(offset, &mut config);
        for (number, available) in (0..).zip(&mut available) {
            write_chains(number, available, input);
        }
        let content = input.blob();
        MEMORY.write_slice(content, GuestAddress(BUFFERS)).expect("write");
        outside(input);
        let activated = device.activate(Activation {
            memory: MEMORY.clone(),
            queues,
            interrupt: interrupt.clone(),
            features,
            thread: thread.clone(),
        });
        activated.expect("all queues are ready");
        queues = device.deactivate();
        assert_eq!(queues.len(), count, "the device's thread is gone");
        if interrupt.needs_reset() || input.is_empty() {
            break;
        }
        // As for a snapshot.
        if let Ok(own) = device.save(&thread) {
            let _ = device.restore(&own);
        }
    }
    device.reset();
}

fn new_queues(device: &dyn VirtioDevice) -> Vec<Queue> {
    let queue = |(number, size): (u64, &u16)| {
        let mut queue = Queue::new(*size).expect("a queue");
        queue.set_size(SIZE);
        let page = number * PAGE;
        queue.set_desc_table_address(Some(page as u32), Some(0));
        queue.set_avail_ring_address(Some((page + AVAILABLE) as u32), Some(0));
        queue.set_used_ring_address(Some((page + USED) as u32), Some(0));
        queue.set_ready(true);
        queue
    };
    (0..).zip(device.queue_sizes()).map(queue).collect()
}

/// Makes some chains available in queue `number`, of which `available` were already.
fn write_chains(number: u64, available: &mut u16, input: &mut Input<'_>) {
    let page = number * PAGE;
    let mut next = 0;
    for _ in 0..input.below(8) {
        let count = input.below(6) + 1;
        let slot = page + AVAILABLE + 4 + 2 * u64::from(*available % SIZE);
        MEMORY.write_obj(next % SIZE, GuestAddress(slot)).expect("write");
        *available = available.wrapping_add(1);
        write_table(page, SIZE, next, count, true, input);
        next += count;
    }
    // Now and then more than there are.
    if input.byte() == 0xff {
        *available = input.half();
    }
    let flags = u16::from(input.byte() & 1);
    let used_event = input.half();
    for (at, value) in [(0, flags), (2, *available), (4 + 2 * u64::from(SIZE), used_event)] {
        let address = GuestAddress(page + AVAILABLE + at);
        MEMORY.write_obj(value, address).expect("write");
    }
}

/// Writes a chain of `count` descriptors to the table at `table` that has `size` of them, beginning at the one of number `first`.
fn write_table(table: u64, size: u16, first: u16, count: u16, outer: bool, input: &mut Input<'_>) {
    for number in first..first + count {
        let kind = input.byte();
        let mut flags = if kind & 1 == 0 { 0 } else { WRITE };
        let mut following = (number + 1) % size;
        let (mut address, mut length) = (BUFFERS + u64::from(input.half()), u32::from(input.half()));
        if number + 1 < first + count {
            flags |= NEXT;
        }
        match kind >> 4 {
            // Anything at all.
            15 => {
                (address, length) = (input.long(), input.word());
                (flags, following) = (input.half(), input.half());
            }
            // Around the end of memory.
            14 => address = memory::size(&MEMORY) - 0x1000 + address % 0x2000,
            13 if outer => {
                let inner = input.below(4) + 1;
                address = address.min(END - 0x100);
                length = u32::from(inner) * 16;
                flags |= INDIRECT;
                write_table(address, inner, 0, inner, false, input);
            }
            _ => {}
        }
        let at = table + 16 * u64::from(number % size);
        let [low, high] = [
            address.to_le(),
            u64::from(length) | u64::from(flags) << 32 | u64::from(following) << 48,
        ];
        MEMORY.write_obj([low, high], GuestAddress(at)).expect("write");
    }
}

/// A device behind its registers.
pub fn transport(device: Box<dyn VirtioDevice>) -> MmioTransport {
    MmioTransport::new(device, MEMORY.clone(), event(), Box::new(|| Ok(()))).expect("a transport")
}
