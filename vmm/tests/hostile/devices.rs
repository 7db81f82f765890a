//! What each device is asked: requests that are nearly right.

use super::driver::{BUFFERS, MEMORY_END};
use lighter_tests::random::Random;

/// A device, as its hostile driver knows it.
#[derive(Clone, Copy)]
pub struct Device {
    /// In the monitor's messages.
    pub name: &'static str,
    /// Sizes of its queues.
    pub queues: &'static [u16],
    /// Features of its own that it offers.
    pub features: u32,
    /// What a chain for the queue holds for the device to read.
    pub payload: fn(&mut Random, usize) -> Vec<u8>,
    pub honest: Honest,
}

/// A request that a device always answers.
#[derive(Clone, Copy)]
pub struct Honest {
    pub queue: usize,
    pub request: &'static [u8],
    /// Bytes of room for the answer.
    pub answer: u32,
}

/// In the order of their windows.
pub const DEVICES: [Device; 6] = [
    Device {
        name: "block test",
        queues: &[256],
        // VIRTIO_BLK_F_FLUSH, DISCARD, WRITE_ZEROES.
        features: 1 << 9 | 1 << 13 | 1 << 14,
        payload: block,
        honest: Honest {
            queue: 0,
            // VIRTIO_BLK_T_GET_ID: 20 bytes and a status.
            request: &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            answer: 21,
        },
    },
    Device {
        name: "net",
        queues: &[256, 256],
        // VIRTIO_NET_F_GUEST_CSUM, MRG_RXBUF.
        features: 1 << 1 | 1 << 15,
        payload: net,
        honest: Honest {
            queue: 1,
            request: &[0; 12 + 60],
            answer: 0,
        },
    },
    Device {
        name: "fs",
        queues: &[128, 128],
        features: 0,
        payload: fuse,
        honest: Honest {
            queue: 1,
            request: &FUSE_INIT,
            answer: 16 + 64,
        },
    },
    Device {
        name: "vsock",
        queues: &[256, 256, 256],
        features: 0,
        payload: vsock,
        honest: Honest {
            queue: 1,
            request: &[0; 44],
            answer: 0,
        },
    },
    Device {
        name: "rng",
        queues: &[64],
        features: 0,
        payload: |_, _| vec![],
        honest: Honest {
            queue: 0,
            request: &[],
            answer: 16,
        },
    },
    Device {
        name: "balloon",
        queues: &[128, 128, 128],
        // VIRTIO_BALLOON_F_REPORTING.
        features: 1 << 5,
        payload: balloon,
        honest: Honest {
            queue: 1,
            request: &[0; 4],
            answer: 0,
        },
    },
];

fn filled(random: &mut Random, length: u32) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length.div_ceil(8))
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    bytes.truncate(length as usize);
    bytes
}

/// `struct virtio_blk_req`, and data or ranges.
fn block(random: &mut Random, _queue: usize) -> Vec<u8> {
    let kind: u32 = random.pick(&[0, 0, 1, 1, 4, 8, 11, 13, 2, 5, u32::MAX]);
    let sectors: u64 = 2048;
    let sector = match random.below(4) {
        0 => sectors - u64::from(random.below(3)),
        1 => u64::MAX - u64::from(random.below(1024)),
        _ => u64::from(random.below(sectors as u32)),
    };
    let mut bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    match kind {
        1 => {
            let length = random.pick(&[512, 512, 4096, 511, 513, 0]);
            bytes.extend(filled(random, length));
        }
        11 | 13 => {
            for _ in 0..1 + random.below(3) {
                let count = random.pick(&[1, 8, 2048, 2049, u32::MAX]);
                bytes.extend(sector.to_le_bytes());
                bytes.extend(count.to_le_bytes());
                bytes.extend(random.pick(&[0_u32, 1, u32::MAX]).to_le_bytes());
            }
        }
        _ => {}
    }
    if random.once_in(16) {
        bytes.truncate(random.below(24) as usize);
    }
    bytes
}

/// `struct virtio_net_hdr_v1` and a frame, for sending; nothing for receiving.
fn net(random: &mut Random, queue: usize) -> Vec<u8> {
    if queue == 0 {
        return vec![];
    }
    let mut bytes = filled(random, 12);
    if !random.once_in(4) {
        bytes.fill(0);
    }
    let length = match random.once_in(16) {
        true => random.pick(&[9000, 65_550, 65_560]),
        false => random.pick(&[0, 1, 14, 60, 60, 60, 1514]),
    };
    bytes.extend(filled(random, length));
    bytes
}

/// `struct virtio_vsock_hdr` and data, mostly from us to the host's one port.
fn vsock(random: &mut Random, queue: usize) -> Vec<u8> {
    if queue != 1 {
        return vec![];
    }
    let data = match random.once_in(16) {
        true => random.pick(&[4096, 65_536]),
        false => random.pick(&[0, 0, 1, 100]),
    };
    let said = match random.once_in(16) {
        true => random.pick(&[0, 1, u32::MAX, 1 << 31, data + 1]),
        false => data,
    };
    let source: u64 = if random.once_in(32) { random.next() } else { 3 };
    let destination: u64 = if random.once_in(32) { random.next() } else { 2 };
    let op = match random.once_in(16) {
        true => random.word() as u16,
        false => random.pick(&[1, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7]),
    };
    let kind: u16 = if random.once_in(32) {
        random.word() as u16
    } else {
        1
    };
    let mut bytes = vec![];
    bytes.extend(source.to_le_bytes());
    bytes.extend(destination.to_le_bytes());
    bytes.extend((1000 + random.below(8)).to_le_bytes());
    bytes.extend(random.pick(&[1024_u32, 1024, 1024, 9]).to_le_bytes());
    bytes.extend(said.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    bytes.extend(random.pick(&[0_u32, 1, 2, 3, u32::MAX]).to_le_bytes());
    bytes.extend(random.pick(&[0, 1, 4096, 1 << 20, u32::MAX]).to_le_bytes());
    bytes.extend(random.pick(&[0, 1, 4096, u32::MAX, 1 << 31]).to_le_bytes());
    bytes.extend(filled(random, data));
    bytes
}

/// A FUSE_INIT of protocol 7.31, with FUSE_SUBMOUNTS.
const FUSE_INIT: [u8; 56] = {
    let mut bytes = [0; 56];
    bytes[0] = 56;
    bytes[4] = 26;
    bytes[8] = 1;
    bytes[40] = 7;
    bytes[44] = 31;
    bytes[55] = 1 << 3;
    bytes
};

/// `struct fuse_in_header` and arguments, with names that lead out of the folder among them.
fn fuse(random: &mut Random, _queue: usize) -> Vec<u8> {
    if random.once_in(8) {
        return FUSE_INIT.to_vec();
    }
    let names: [&[u8]; 8] = [
        b"a\0",
        b"../outside\0",
        b"..\0",
        b".\0",
        b"/etc/passwd\0",
        b"b\0c\0",
        b"\0",
        b"no end",
    ];
    let opcode = match random.once_in(16) {
        true => random.word(),
        false => 1 + random.below(52),
    };
    let length = random.pick(&[0, 4, 8, 16, 24, 40, 64, 128, 1000]);
    let mut arguments = filled(random, length);
    if random.once_in(2) {
        for argument in &mut arguments {
            *argument &= 7;
        }
    }
    arguments.extend(random.pick(&names));
    arguments.extend(random.pick(&names));
    let length = 40 + arguments.len() as u32;
    let length = match random.once_in(16) {
        true => random.pick(&[0, 39, 40, length + 1, u32::MAX]),
        false => length,
    };
    let node = match random.once_in(8) {
        true => random.next(),
        false => u64::from(random.below(6)),
    };
    let mut bytes = vec![];
    bytes.extend(length.to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(random.next().to_le_bytes());
    bytes.extend(node.to_le_bytes());
    for id in [random.pick(&[0, 1000, u32::MAX]), 0, 1, 0] {
        bytes.extend(id.to_le_bytes());
    }
    bytes.extend(arguments);
    bytes
}

/// Page numbers, of buffers and of nothing. A page of the guest's own code would end its game.
fn balloon(random: &mut Random, queue: usize) -> Vec<u8> {
    if queue == 2 {
        return vec![];
    }
    let mut bytes = vec![];
    for _ in 0..random.pick(&[1, 1, 2, 2, 16, 16, 256, 1024]) {
        let page = match random.once_in(64) {
            true => random.pick(&[MEMORY_END >> 12, u32::MAX, 0xd_0000, 1 << 31]),
            false => (BUFFERS >> 12) + random.below(0x100),
        };
        bytes.extend(page.to_le_bytes());
    }
    if random.once_in(16) {
        bytes.pop();
    }
    bytes
}
