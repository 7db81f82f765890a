use super::*;
use crate::virtio::testing::{Buffer, DriverQueue, Guest, Layout};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Pages of the rings may be touched for the first time in the middle of a test.
const RINGS: u64 = 16 * PAGE;

struct Setup {
    guest: Guest,
    queues: Vec<DriverQueue>,
    balloon: Balloon,
}

fn active(event_idx: bool) -> Setup {
    let mut guest = Guest::new(64);
    let queues: Vec<_> = (0..3)
        .map(|_| DriverQueue::new(&mut guest, 32, event_idx))
        .collect();
    let mut balloon = Balloon::new();
    let sides: Vec<_> = queues.iter().collect();
    balloon.activate(guest.activation(&sides, F_REPORTING)).unwrap();
    Setup {
        guest,
        queues,
        balloon,
    }
}

impl Setup {
    /// Bytes of the host's memory behind the guest's.
    fn host_bytes(&self) -> u64 {
        let region = self.guest.memory.iter().next().unwrap();
        let pages = usize::try_from(region.len()).unwrap() / 4096;
        let mut resident = vec![0u8; pages];
        // SAFETY: the region is mapped, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(region.as_ptr().cast(), pages * 4096, resident.as_mut_ptr()) };
        assert_eq!(result, 0);
        resident.iter().map(|page| u64::from(page & 1) * 4096).sum()
    }

    fn returned(&self) -> u64 {
        self.balloon.returned_bytes().load(Ordering::Relaxed)
    }

    fn send(&mut self, queue: usize, buffers: &[Buffer], layout: Layout) {
        let used = self.queues[queue].round_trip(&self.guest, buffers, layout);
        assert_eq!(used.length, 0);
    }

    fn fails_with(&mut self, queue: usize, buffers: &[Buffer]) {
        self.queues[queue].add(buffers, Layout::Direct);
        self.queues[queue].kick();
        self.guest.wait_until_failed();
        assert_eq!(self.balloon.deactivate().len(), 3);
    }
}

#[test]
fn a_reported_range_goes_back_to_the_host_and_reads_as_zeros() {
    for (layout, event_idx) in [(Layout::Direct, false), (Layout::Indirect, true)] {
        let mut setup = active(event_idx);
        let length = 4 << 20;
        let ranges: Vec<_> = (0..3)
            .map(|_| Buffer::writable(setup.guest.allocate_aligned(length, PAGE), length))
            .collect();
        for range in &ranges {
            setup
                .guest
                .memory
                .write_slice(&vec![5; length], range.address)
                .unwrap();
        }
        let before = setup.host_bytes();
        setup.send(REPORTING, &ranges[..2], layout);
        assert!(setup.host_bytes() <= before - 2 * length as u64 + RINGS);
        assert_eq!(setup.returned(), 2 * length as u64);
        assert_eq!(setup.guest.bytes(ranges[0]), vec![0; length]);
        assert_eq!(setup.guest.bytes(ranges[2]), vec![5; length]);
        // And it can be used again.
        setup.guest.memory.write_obj(6u8, ranges[1].address).unwrap();
        assert_eq!(setup.guest.bytes(ranges[1])[..2], [6, 0]);
    }
}

#[test]
fn inflated_pages_go_back_and_deflated_ones_can_be_used() {
    let mut setup = active(true);
    let pages = 256u32;
    let start = setup.guest.allocate_aligned(pages as usize * 4096, PAGE);
    let filled = vec![5; pages as usize * 4096];
    setup.guest.memory.write_slice(&filled, start).unwrap();
    let before = setup.host_bytes();
    // Every page but each eighth, downwards.
    let goes = |page: u32| !page.is_multiple_of(8);
    let first = (start.0 / PAGE) as u32;
    let given: Vec<u32> = (0..pages).rev().filter(|page| goes(*page)).collect();
    let numbers: Vec<u8> = given
        .iter()
        .flat_map(|page| (first + page).to_le_bytes())
        .collect();
    // The array is cut in the middle of a number.
    let array = [
        setup.guest.readable(&numbers[..6]),
        setup.guest.readable(&numbers[6..]),
    ];
    setup.send(INFLATE, &array, Layout::Direct);
    let bytes = given.len() as u64 * PAGE;
    assert_eq!(setup.returned(), bytes);
    assert!(setup.host_bytes() <= before - bytes + RINGS);
    for page in 0..pages {
        let address = GuestAddress(start.0 + u64::from(page) * PAGE);
        let byte: u8 = setup.guest.memory.read_obj(address).unwrap();
        assert_eq!(byte, if goes(page) { 0 } else { 5 }, "page {page}");
    }
    setup.send(DEFLATE, &array, Layout::Direct);
    assert_eq!(setup.returned(), bytes);
}

#[test]
fn page_numbers_and_ranges_outside_memory_fail_the_device() {
    for number in [64 << 8, u32::MAX] {
        let mut setup = active(false);
        let array = setup.guest.readable(&number.to_le_bytes());
        setup.fails_with(INFLATE, &[array]);
        assert_eq!(setup.returned(), 0);
    }
    for address in [(64 << 20) - 4096, u64::MAX - 4096, 1 << 40] {
        let mut setup = active(false);
        setup.fails_with(REPORTING, &[Buffer::writable(GuestAddress(address), 8192)]);
        assert_eq!(setup.returned(), 0);
    }
}

#[test]
fn an_endless_array_is_worked_for_only_so_long() {
    let mut setup = active(false);
    // Numbers of one page again and again, more than are taken.
    let page = setup.guest.allocate_aligned(4096, PAGE);
    let number = ((page.0 / PAGE) as u32).to_le_bytes();
    let array = setup.guest.readable(&number.repeat(2 * MOST_PAGES));
    setup.send(INFLATE, &[array], Layout::Direct);
    assert_eq!(setup.returned(), MOST_PAGES as u64 * PAGE);
}

#[test]
fn a_driver_without_reporting_sets_up_two_queues() {
    let mut guest = Guest::new(16);
    let mut queues: Vec<_> = (0..2).map(|_| DriverQueue::new(&mut guest, 32, false)).collect();
    let mut balloon = Balloon::new();
    let sides = queues.iter().map(DriverQueue::device_side);
    let unused = VirtQueue::new(
        virtio_queue::QueueT::new(QUEUE_SIZE).unwrap(),
        Arc::new(vmm_sys_util::eventfd::EventFd::new(0).unwrap()),
        Arc::default(),
    );
    balloon
        .activate(guest.activation_with(sides.chain([unused]).collect(), 0))
        .unwrap();
    let array = guest.readable(&1u32.to_le_bytes());
    queues[DEFLATE].round_trip(&guest, &[array], Layout::Direct);
    assert_eq!(balloon.deactivate().len(), 3);
}

#[test]
fn the_configuration_shows_an_empty_target_and_what_the_driver_says() {
    let mut balloon = Balloon::new();
    balloon.write_config(0, &7u32.to_le_bytes());
    balloon.write_config(4, &9u32.to_le_bytes());
    balloon.write_config(6, &9u32.to_le_bytes());
    balloon.write_config(4, &[1]);
    let mut config = [1; 12];
    balloon.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 9, 0, 0, 0, 1, 1, 1, 1]);
    assert_eq!(balloon.state(), BalloonState { actual_pages: 9 });
    balloon.reset();
    assert_eq!(balloon.state(), BalloonState::default());
}
