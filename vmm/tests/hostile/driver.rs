//! A driver that keeps few rules: it sets a device up, sometimes as it should be, posts chains of descriptors that are right, wrong,
//! or wrong in one thing, and resets the device whenever it likes.

use super::devices::Device;
use super::guest::Script;
use lighter_tests::random::Random;

/// Rings and buffers of every device; what is before belongs to the guest's own code. All of it is the device's to ruin.
const AREA: u32 = 0x0380_0000;
/// Where guest memory ends.
pub const MEMORY_END: u32 = 64 << 20;
/// Between the rings of two queues of a device: descriptors, and these places in it.
const RING: u32 = 0x4000;
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;
const INDIRECT: u32 = 0x3000;
/// Where buffers are, of all devices.
pub const BUFFERS: u32 = AREA + 0x20_0000;
const BUFFERS_SIZE: u32 = 0x20_0000;

const WINDOWS: u32 = 0xd000_0000;

/// Registers of the transport.
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_SEL: u32 = 0x30;
const QUEUE_NUM: u32 = 0x38;
const QUEUE_READY: u32 = 0x44;
const QUEUE_NOTIFY: u32 = 0x50;
const INTERRUPT_ACK: u32 = 0x64;
const STATUS: u32 = 0x70;
const ADDRESSES: [u32; 3] = [0x80, 0x90, 0xa0];
const CONFIG: u32 = 0x100;

/// Flags of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_TABLE: u16 = 4;

/// VIRTIO_F_RING_INDIRECT_DESC and VIRTIO_F_RING_EVENT_IDX; VIRTIO_F_VERSION_1 in the upper half.
const RING_FEATURES: u32 = 3 << 28;
const VERSION_1: u32 = 1;

/// How long the guest waits for the device within a round: it shall not always be done.
const PATIENCE: u32 = 200;
/// How long it waits for an honest request.
const LONG: u32 = u32::MAX;

/// A descriptor's fields.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where buffers are that nobody may have: behind memory, at its end, where devices are, at the end of all addresses.
fn wild(random: &mut Random) -> u64 {
    let end = u64::from(MEMORY_END);
    match random.below(8) {
        0 => u64::MAX - u64::from(random.below(64)),
        1 => u64::from(WINDOWS) + u64::from(random.below(0x8000)),
        2 => end - u64::from(random.below(64)),
        3 => end,
        4 => 1 << (32 + random.below(32)),
        5 => 0xfee0_0000,
        6 => random.next() | 1 << 63,
        _ => u64::from(u32::MAX) - u64::from(random.below(0x1000)),
    }
}

fn buffer(random: &mut Random) -> u32 {
    BUFFERS + random.below(BUFFERS_SIZE - 0x2_0000)
}

/// One driver of one device.
pub struct Driver {
    device: Device,
    window: u32,
    rings: u32,
    /// What each available ring's index is.
    posted: Vec<u16>,
    /// How many chains were posted.
    pub chains: u64,
    /// Whether something was wrong since it was started: the device may be dead.
    spoiled: bool,
}

impl Driver {
    /// Of the device in window `number`.
    pub fn new(device: Device, number: u32) -> Self {
        Self {
            window: WINDOWS + number * 0x1000,
            rings: AREA + number * 0x4_0000,
            posted: vec![0; device.queues.len()],
            chains: 0,
            spoiled: false,
            device,
        }
    }

    fn ring(&self, queue: usize) -> u32 {
        self.rings + queue as u32 * RING
    }

    fn register(&self, script: &mut Script, register: u32, value: u32) {
        script.write(self.window + register, value);
    }

    /// Resets the device and starts it as it should be.
    pub fn start(&mut self, script: &mut Script, ring_features: u32) {
        self.register(script, STATUS, 0);
        self.register(script, STATUS, 3);
        for (half, features) in [(0, self.device.features | ring_features), (1, VERSION_1)] {
            self.register(script, DRIVER_FEATURES_SEL, half);
            self.register(script, DRIVER_FEATURES, features);
        }
        self.register(script, STATUS, 11);
        for queue in 0..self.device.queues.len() {
            self.set_up(script, queue);
        }
        self.register(script, STATUS, 15);
        self.spoiled = false;
    }

    fn set_up(&mut self, script: &mut Script, queue: usize) {
        let ring = self.ring(queue);
        self.posted[queue] = 0;
        for place in [AVAILABLE, USED] {
            script.write(ring + place, 0);
        }
        self.register(script, QUEUE_SEL, queue as u32);
        self.register(script, QUEUE_NUM, self.device.queues[queue].into());
        for (register, place) in ADDRESSES.into_iter().zip([0, AVAILABLE, USED]) {
            self.register(script, register, ring + place);
            self.register(script, register + 4, 0);
        }
        self.register(script, QUEUE_READY, 1);
    }

    /// Resets the device and starts it, in one thing or another not as it should be.
    fn start_badly(&mut self, script: &mut Script, random: &mut Random) {
        let queues = self.device.queues.len() as u32;
        match random.below(10) {
            // Features that were never offered, and none at all.
            0 => {
                self.register(script, STATUS, 0);
                self.register(script, STATUS, 3);
                for half in 0..3 {
                    self.register(script, DRIVER_FEATURES_SEL, half);
                    self.register(script, DRIVER_FEATURES, random.word());
                }
                self.register(script, STATUS, 15);
            }
            // Started before anything was agreed on, and twice.
            1 => {
                self.register(script, STATUS, 0);
                self.register(script, STATUS, 7);
                self.register(script, STATUS, 15);
                self.register(script, STATUS, 15);
            }
            // Queues somewhere, of some size.
            2..5 => {
                self.register(script, STATUS, 0);
                self.register(script, STATUS, 3);
                self.register(script, DRIVER_FEATURES_SEL, 1);
                self.register(script, DRIVER_FEATURES, VERSION_1);
                self.register(script, STATUS, 11);
                for queue in 0..queues {
                    self.register(script, QUEUE_SEL, queue + random.below(2) * random.word());
                    self.register(
                        script,
                        QUEUE_NUM,
                        random.pick(&[0, 1, 2, 3, 64, 256, 32768, 65536, u32::MAX]),
                    );
                    for register in ADDRESSES {
                        let place = match random.once_in(2) {
                            true => u64::from(buffer(random)),
                            false => wild(random),
                        };
                        self.register(script, register, place as u32);
                        self.register(script, register + 4, (place >> 32) as u32);
                    }
                    self.register(script, QUEUE_READY, random.pick(&[0, 1, 1, 2, u32::MAX]));
                }
                self.register(script, STATUS, 15);
                self.register(script, QUEUE_NOTIFY, random.below(queues));
            }
            // Rings on top of each other, or one for all queues.
            5 => {
                self.start(script, 0);
                self.register(script, STATUS, 0);
                self.register(script, STATUS, 11);
                for queue in 0..queues {
                    self.register(script, QUEUE_SEL, queue);
                    self.register(script, QUEUE_NUM, 16);
                    let ring = self.ring(0) & !0xf;
                    for register in ADDRESSES {
                        self.register(script, register, ring);
                        self.register(script, register + 4, 0);
                    }
                    self.register(script, QUEUE_READY, 1);
                }
                self.register(script, STATUS, 15);
            }
            // Everything changed while it runs.
            6 => {
                self.start(script, RING_FEATURES);
                for _ in 0..8 {
                    let register = random.below(0x40) * 4;
                    // But for the status, which would only reset it.
                    if register != STATUS {
                        self.register(script, register, random.word());
                    }
                }
            }
            // Registers of other widths and its configuration.
            7 => {
                for _ in 0..8 {
                    let address = self.window + random.below(0x1000);
                    match random.below(3) {
                        0 => script.write8(address, random.word() as u8),
                        1 => script.write16(address & !1, random.word() as u16),
                        _ => script.read(address & !3),
                    }
                    self.register(script, CONFIG + random.below(0x40) * 4, random.word());
                }
            }
            // Reset again and again, in flight.
            8 => {
                for _ in 0..4 {
                    self.start(script, RING_FEATURES);
                    self.register(script, QUEUE_NOTIFY, random.below(queues));
                }
            }
            _ => {
                self.register(script, STATUS, random.pick(&[0, 64, 128, 255, u32::MAX]));
                self.register(script, STATUS, 0);
            }
        }
    }

    /// A few chains in one queue, most of them as they should be.
    pub fn round(&mut self, script: &mut Script, random: &mut Random) {
        let badly = random.once_in(16);
        if badly {
            self.start_badly(script, random);
        }
        if (badly || self.spoiled) && !random.once_in(8) {
            let features = random.pick(&[0, 1 << 28, 1 << 29, RING_FEATURES]);
            self.start(script, features);
        }
        let queue = random.below(self.device.queues.len() as u32) as usize;
        let size = self.device.queues[queue];
        let ring = self.ring(queue);
        let mut table = vec![];
        let mut heads = vec![];
        for _ in 0..1 + random.below(8) {
            heads.push(table.len() as u16);
            self.chain(script, random, queue, &mut table);
        }
        table.truncate(size.into());
        let bytes: Vec<u8> = table.iter().flat_map(|descriptor| descriptor.bytes()).collect();
        script.place(ring, &bytes);
        for head in heads {
            let head = match random.once_in(64) {
                true => {
                    self.spoiled = true;
                    random.word() as u16
                }
                false => head % size,
            };
            let slot = u32::from(self.posted[queue] % size);
            script.write16(ring + AVAILABLE + 4 + 2 * slot, head);
            self.posted[queue] = self.posted[queue].wrapping_add(1);
            self.chains += 1;
        }
        if random.once_in(64) {
            // More than the ring holds, or fewer than there were.
            self.spoiled = true;
            self.posted[queue] = random.word() as u16;
        }
        script.write16(ring + AVAILABLE, random.below(2) as u16);
        script.write16(ring + AVAILABLE + 2, self.posted[queue]);
        self.register(script, QUEUE_NOTIFY, queue as u32);
        if random.once_in(16) {
            self.register(script, QUEUE_NOTIFY, random.word());
        }
        if random.once_in(4) {
            self.register(script, INTERRUPT_ACK, random.pick(&[1, 2, 3, u32::MAX]));
        }
        if !random.once_in(4) {
            script.wait(ring + USED + 2, self.posted[queue], PATIENCE);
        }
    }

    /// Adds a chain to the table: what the device is asked, room for its answer, and now and then one thing that is wrong.
    fn chain(&mut self, script: &mut Script, random: &mut Random, queue: usize, table: &mut Vec<Descriptor>) {
        let mut chain = vec![];
        let at = buffer(random);
        let payload = (self.device.payload)(random, queue);
        let mut from = 0;
        while from < payload.len() {
            // In pieces, of which the first is seldom the header alone.
            let rest = (payload.len() - from) as u32;
            let length = match random.once_in(3) {
                true => 1 + random.below(rest),
                false => rest,
            };
            chain.push(Descriptor {
                address: u64::from(at) + from as u64,
                length,
                flags: NEXT,
                next: 0,
            });
            from += length as usize;
        }
        if !payload.is_empty() {
            script.place(at, &payload);
        }
        for _ in 0..random.below(4) {
            chain.push(Descriptor {
                address: buffer(random).into(),
                length: random.pick(&[1, 1, 16, 44, 512, 4096, 0x1_0000]),
                flags: NEXT | WRITE,
                next: 0,
            });
        }
        if let Some(last) = chain.last_mut() {
            last.flags &= !NEXT;
        }
        let indirect = random.once_in(6);
        let first = match indirect {
            true => 0,
            false => table.len() as u16,
        };
        for (number, descriptor) in (1..).zip(&mut chain) {
            descriptor.next = first + number;
        }
        if random.once_in(12) {
            self.spoiled = true;
            spoil(random, &mut chain);
        }
        if !indirect {
            table.extend(chain);
            return;
        }
        let bytes: Vec<u8> = chain.iter().flat_map(|descriptor| descriptor.bytes()).collect();
        let place = self.ring(queue) + INDIRECT + random.below(4) * 0x400;
        script.place(place, &bytes);
        let mut pointer = Descriptor {
            address: place.into(),
            length: bytes.len() as u32,
            flags: INDIRECT_TABLE,
            next: 0,
        };
        if random.once_in(8) {
            self.spoiled = true;
            pointer.length = random.pick(&[0, 1, 15, 17, u32::MAX]);
        }
        if random.once_in(16) {
            // Both, and into itself.
            self.spoiled = true;
            pointer.flags |= NEXT | WRITE;
            pointer.next = table.len() as u16;
        }
        table.push(pointer);
    }

    /// Starts it as it should be, asks one thing that it always answers, and writes `letter` to the console when it has.
    pub fn honest(&mut self, script: &mut Script, letter: u8) {
        self.start(script, 0);
        let (queue, request, answer) = (
            self.device.honest.queue,
            self.device.honest.request,
            self.device.honest.answer,
        );
        let ring = self.ring(queue);
        let mut table = vec![];
        if !request.is_empty() {
            script.place(BUFFERS, request);
            table.push(Descriptor {
                address: BUFFERS.into(),
                length: request.len() as u32,
                flags: if answer > 0 { NEXT } else { 0 },
                next: 1,
            });
        }
        if answer > 0 {
            table.push(Descriptor {
                address: u64::from(BUFFERS) + 0x1000,
                length: answer,
                flags: WRITE,
                next: 0,
            });
        }
        let bytes: Vec<u8> = table.iter().flat_map(|descriptor| descriptor.bytes()).collect();
        script.place(ring, &bytes);
        script.write(ring + AVAILABLE + 4, 0);
        script.write(ring + AVAILABLE, 1 << 16);
        self.register(script, QUEUE_NOTIFY, queue as u32);
        script.wait(ring + USED + 2, 1, LONG);
        script.tell(letter, ring + USED + 2, 1);
        script.say(b'\n');
    }
}

/// Makes one thing of a chain wrong.
fn spoil(random: &mut Random, chain: &mut [Descriptor]) {
    if chain.is_empty() {
        return;
    }
    let number = random.below(chain.len() as u32) as usize;
    let descriptor = &mut chain[number];
    match random.below(7) {
        0 => descriptor.address = wild(random),
        1 => descriptor.length = random.pick(&[0, 1 << 31, u32::MAX, MEMORY_END, 0x100_0000]),
        // A loop, or out of the table.
        2 => {
            (descriptor.flags, descriptor.next) =
                (descriptor.flags | NEXT, random.pick(&[0, 1, 255, 256, u16::MAX]))
        }
        3 => descriptor.flags = random.word() as u16,
        4 => descriptor.flags ^= WRITE,
        5 => descriptor.flags |= INDIRECT_TABLE,
        _ => {
            descriptor.address = u64::from(MEMORY_END) - u64::from(random.below(32));
            descriptor.length = 16 + random.below(64);
        }
    }
}
