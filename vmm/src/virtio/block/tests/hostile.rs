//! Drivers that break the rules.

use super::*;
use crate::virtio::block::handler::Handler;
use crate::virtio::testing::{INDIRECT, NEXT, WRITE};
use crate::virtio::worker::Handler as _;
use std::sync::Arc;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

/// Deterministic random numbers (xorshift64*), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

const ENTRIES: u16 = 16;
const MEMORY: u64 = 1 << 20;

/// A descriptor that points at something more often than chance would have it.
fn descriptor(random: &mut Random, places: &[u64]) -> Descriptor {
    let address = match random.below(10) {
        0 => random.next(),
        1 => MEMORY - random.below(1024),
        2 => random.below(MEMORY),
        _ => random.pick(places),
    };
    let length = match random.below(10) {
        0 => random.next() as u32,
        1 => random.below(70_000) as u32,
        2 => 0,
        _ => random.pick(&[1, 16, 32, 512, 1024, 4096]),
    };
    let flags = match random.below(8) {
        0 => random.next() as u16,
        1 => INDIRECT,
        2 => 0,
        3 => WRITE,
        4 | 5 => NEXT,
        _ => NEXT | WRITE,
    };
    Descriptor::new(
        address,
        length,
        flags,
        random.below(u64::from(ENTRIES) + 1) as u16,
    )
}

/// The device's side without its thread, so that tens of thousands of rounds take seconds.
fn handler(kind: Kind, file: &File, layers: bool, guest: &Guest, driver: &DriverQueue) -> Handler {
    let sectors = file.metadata().unwrap().len() / 512;
    let mut disk = Disk::unchecked("data".into(), file.try_clone().unwrap(), sectors, false);
    if layers {
        disk.add_layer(layers::layer(sectors), None).unwrap();
    }
    Handler {
        name: "block data".into(),
        engine: kind.engine(&disk),
        disk: Arc::new(disk),
        memory: guest.memory.clone(),
        queue: driver.device_side(),
        interrupt: guest.interrupt.clone(),
        writethrough: layers && kind == Kind::Plain,
        unsignalled: false,
        flushes: false,
        waiting: vec![],
        again_ms: None,
    }
}

fn play(kind: Kind, layers: bool, seed: u64, chains: u32) {
    let sectors = 128;
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    let mut random = Random(seed);
    let (mut answered, mut broken) = (0, 0);
    let mut played = 0;
    while played < chains {
        let mut guest = Guest::new(MEMORY >> 20);
        let mut driver = DriverQueue::new(&mut guest, ENTRIES, random.below(2) == 0);
        let mut handler = handler(kind, &file, layers, &guest, &driver);
        let places: Vec<u64> = (0..12).map(|_| guest.allocate_aligned(4096, 4096).0).collect();
        loop {
            for place in &places {
                match random.below(4) {
                    0 => {
                        let type_ = random.pick(&[0, 1, 4, 8, 11, 13, 14, 99]);
                        let sector = random.pick(&[0, 1, 127, 128, u64::MAX, random.0]);
                        guest
                            .memory
                            .write_slice(&header(type_, sector), GuestAddress(*place))
                            .unwrap();
                    }
                    1 => {
                        // An indirect table.
                        for entry in 0..8 {
                            let descriptor = descriptor(&mut random, &places);
                            guest
                                .memory
                                .write_obj(descriptor, GuestAddress(place + 16 * entry))
                                .unwrap();
                        }
                    }
                    2 => {
                        let range = range(
                            random.below(200),
                            random.below(200) as u32,
                            random.below(3) as u32,
                        );
                        guest.memory.write_slice(&range, GuestAddress(*place)).unwrap();
                    }
                    _ => {}
                }
            }
            for index in 0..ENTRIES {
                driver.write_descriptor(index, descriptor(&mut random, &places));
            }
            // Mostly something like a request, so that what comes behind the first checks is reached too.
            let heads = random.below(u64::from(ENTRIES) / 4) + 1;
            for head in (0..heads as u16).map(|head| head * 4) {
                let status = Descriptor::new(random.pick(&places), 1, WRITE, 0);
                let data_flags = random.pick(&[NEXT, NEXT | WRITE]);
                let good = [
                    Descriptor::new(random.pick(&places), 16, NEXT, head + 1),
                    Descriptor::new(
                        random.pick(&places),
                        random.pick(&[16, 32, 512, 2048]),
                        data_flags,
                        head + 2,
                    ),
                    status,
                ];
                for (index, descriptor) in (head..).zip(good) {
                    if random.below(20) > 0 {
                        driver.write_descriptor(index, descriptor);
                    }
                }
                driver.make_available(if random.below(50) > 0 {
                    head
                } else {
                    random.next() as u16
                });
                played += 1;
            }
            let result = handler.work();
            handler.stop();
            for file in handler.disk.files().iter().skip(1) {
                assert_eq!(lighter_disk::size(file).unwrap(), sectors * 512);
            }
            if result.is_err() {
                broken += 1;
                break;
            }
            answered += 1;
        }
    }
    // Both ends of the device were reached, and it stayed within its file.
    assert!(
        answered > chains / 10 && broken > chains / 100,
        "{answered} rounds answered, {broken} broken"
    );
    assert_eq!(file.metadata().unwrap().len(), sectors * 512);
}

#[test]
fn random_chains_neither_panic_nor_leave_the_file() {
    play(Kind::Plain, false, 0x5eed, 50_000);
    play(Kind::Best, false, 0xfeed, 20_000);
    play(Kind::Plain, true, 0x1eed, 20_000);
    play(Kind::Best, true, 0x2eed, 20_000);
}

#[test]
fn a_broken_chain_fails_the_device_and_a_reset_revives_it() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        // A good request before it is completed all the same.
        let good = [
            setup.guest.readable(&header(abi::VIRTIO_BLK_T_OUT, 0)),
            setup.guest.readable(&[5; 512]),
            setup.guest.writable(1),
        ];
        setup.guest.fill(good[2], 0xff);
        setup.queue.add(&good, Layout::Direct);
        let no_status = [setup.guest.readable(&header(abi::VIRTIO_BLK_T_FLUSH, 0))];
        setup.queue.add(&no_status, Layout::Direct);
        setup.queue.kick();
        setup.guest.wait_until_failed();
        assert_eq!(setup.block.deactivate().len(), 1);
        assert_eq!(setup.guest.bytes(good[2]), [OK]);
        assert_eq!(setup.on_file(0, 512), [5; 512]);
        setup.block.reset();
        setup.guest.interrupt.reset();
        setup.queue = DriverQueue::new(&mut setup.guest, 16, true);
        let activation = setup.guest.activation(&[&setup.queue], FLUSH);
        setup.block.activate(activation).unwrap();
        assert_eq!(setup.read(0, 512), (OK, vec![5; 512]));
    }
}

#[test]
fn a_ring_that_runs_away_fails_the_device() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        setup.queue.publish_available(QUEUE_SIZE + 1);
        setup.queue.force_kick();
        setup.guest.wait_until_failed();
        assert_eq!(setup.block.deactivate().len(), 1);
    }
}

#[test]
fn one_chain_made_available_many_times_takes_no_more_than_the_queue() {
    for (kind, layers) in KINDS.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let mut guest = Guest::new(16);
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 512).unwrap();
        let mut driver = DriverQueue::new(&mut guest, QUEUE_SIZE, false);
        let mut handler = handler(kind, &file, layers, &guest, &driver);
        let buffers = [
            guest.readable(&header(abi::VIRTIO_BLK_T_FLUSH, 0)),
            guest.readable(&[]),
            guest.writable(1),
        ];
        let head = driver.add(&buffers, Layout::Direct);
        // More than the queue holds are under way only if the device takes them: it would panic for want of room.
        for round in 1..=8 {
            for _ in 0..200 {
                driver.make_available(head);
            }
            while handler.queue.save().next_avail != 1 + 200 * round {
                handler.work().unwrap();
            }
        }
        handler.stop();
        let state = handler.queue.save();
        assert_eq!(state.next_avail, 1601);
        assert_eq!(state.next_used, 1601);
    }
}
