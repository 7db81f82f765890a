use super::*;
use crate::virtio::testing::{Buffer, DriverQueue, Guest, Layout};
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use vm_memory::GuestAddress;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const MRG: u64 = F_MRG_RXBUF | F_GUEST_CSUM;
const HEADER: usize = 12;

struct Bench {
    guest: Guest,
    rx: DriverQueue,
    tx: DriverQueue,
    net: Net,
    /// The other end of the stream, blocking.
    host: UnixStream,
}

fn bench(size: u16, event_idx: bool, features: u64) -> Bench {
    let (ours, host) = UnixStream::pair().unwrap();
    bench_of(NetKind::Stream, ours.into(), host, size, event_idx, features)
}

/// A device whose tap is a socket that keeps packets apart: as a tap does, it gives and takes one in each call.
fn tap_bench(features: u64) -> Bench {
    let mut ends = [-1; 2];
    // SAFETY: it writes two descriptors, which nobody else knows of, into the array.
    let (ours, host) = unsafe {
        let done = libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr());
        assert_eq!(done, 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    };
    bench_of(NetKind::Tap, ours, host.into(), 32, true, features)
}

fn bench_of(
    kind: NetKind,
    plug: OwnedFd,
    host: UnixStream,
    size: u16,
    event_idx: bool,
    features: u64,
) -> Bench {
    let mut guest = Guest::new(64);
    let rx = DriverQueue::new(&mut guest, size, event_idx);
    let tx = DriverQueue::new(&mut guest, size, event_idx);
    let config = NetConfig {
        mac: MAC,
        mtu: 1500,
        kind,
        plug: Some(plug),
    };
    let mut net = Net::new(config).unwrap();
    net.activate(guest.activation(&[&rx, &tx], features)).unwrap();
    Bench {
        guest,
        rx,
        tx,
        net,
        host,
    }
}

fn frame(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect()
}

impl Bench {
    /// The other end sends a frame.
    fn host_sends(&mut self, frame: &[u8]) {
        let length = u32::try_from(frame.len()).unwrap();
        self.host.write_all(&length.to_be_bytes()).unwrap();
        self.host.write_all(frame).unwrap();
    }

    /// The next frame that the other end gets.
    fn host_gets(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.host.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.host.read_exact(&mut frame).unwrap();
        frame
    }

    /// The guest sends a frame, cut into two buffers.
    fn guest_sends(&mut self, frame: &[u8], layout: Layout) {
        let cut = frame.len() / 2;
        let head = [&[0; HEADER], &frame[..cut]].concat();
        let buffers = [self.guest.readable(&head), self.guest.readable(&frame[cut..])];
        assert_eq!(self.tx.round_trip(&self.guest, &buffers, layout).length, 0);
    }

    fn give_buffer(&mut self, length: usize) -> Buffer {
        let buffer = self.guest.writable(length);
        self.rx.add(&[buffer], Layout::Direct);
        self.rx.kick();
        buffer
    }

    /// Header and frame from the buffers, in the order they were given.
    fn guest_gets(&mut self, buffers: &[Buffer]) -> (Vec<u8>, Vec<u8>) {
        let mut bytes = vec![];
        for buffer in buffers {
            let used = self.rx.wait(&self.guest);
            bytes.extend(&self.guest.bytes(*buffer)[..used.length as usize]);
        }
        let frame = bytes.split_off(HEADER);
        (bytes, frame)
    }
}

#[test]
fn packets_cross_in_both_directions_unchanged() {
    for (layout, event_idx) in [(Layout::Direct, false), (Layout::Indirect, true)] {
        let mut bench = bench(8, event_idx, MRG);
        // More rounds than entries: the rings wrap.
        for round in 0..20 {
            let sent = frame(60 + 70 * round, round as u8);
            bench.guest_sends(&sent, layout);
            assert_eq!(bench.host_gets(), sent);
            let buffer = bench.give_buffer(2048);
            bench.host_sends(&sent);
            let (header, got) = bench.guest_gets(&[buffer]);
            assert_eq!(got, sent);
            assert_eq!(
                header,
                [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
                "checked, in one buffer"
            );
        }
        assert_eq!(bench.net.deactivate().len(), 2);
    }
}

#[test]
fn a_large_packet_takes_several_buffers_that_appear_at_once() {
    for event_idx in [false, true] {
        let mut bench = bench(32, event_idx, MRG);
        let sent = frame(65_534, 3);
        // The second lot wraps around the ring.
        for _ in 0..3 {
            let buffers: Vec<Buffer> = (0..17).map(|_| bench.give_buffer(4096)).collect();
            bench.host_sends(&sent);
            let (header, got) = bench.guest_gets(&buffers);
            assert_eq!(got, sent);
            assert_eq!(header[10..], [17, 0]);
        }
        let written = bench.rx.counters.snapshot().written_bytes;
        assert_eq!(written, 3 * (HEADER + sent.len()) as u64);
    }
}

#[test]
fn packets_wait_for_buffers_and_come_in_order() {
    let mut bench = bench(8, true, MRG);
    for seed in 0..4 {
        bench.host_sends(&frame(1000, seed));
    }
    // Half of what the first one needs.
    let first = bench.give_buffer(600);
    assert!(!bench.guest.interrupted_within(200));
    let second = bench.give_buffer(600);
    assert_eq!(bench.guest_gets(&[first, second]).1, frame(1000, 0));
    for seed in 1..4 {
        let buffer = bench.give_buffer(1200);
        assert_eq!(bench.guest_gets(&[buffer]).1, frame(1000, seed));
    }
}

#[test]
fn what_the_only_buffer_cannot_hold_is_dropped() {
    // A driver that takes one buffer for each packet.
    let mut single = bench(8, false, 0);
    single.give_buffer(100);
    single.host_sends(&frame(1000, 1));
    assert_eq!(single.rx.wait(&single.guest).length, 0);
    let buffer = single.give_buffer(1100);
    single.host_sends(&frame(1000, 2));
    let (header, got) = single.guest_gets(&[buffer]);
    assert_eq!((got, header[0]), (frame(1000, 2), 0));
}

#[test]
fn no_packet_and_too_long_a_packet_are_thrown_away() {
    let mut bench = bench(8, false, MRG);
    for length in [1, HEADER, HEADER + link::MAX_FRAME + 1] {
        let buffer = bench.guest.readable(&vec![1; length]);
        bench.tx.round_trip(&bench.guest, &[buffer], Layout::Direct);
    }
    let writable = bench.guest.writable(100);
    bench.tx.round_trip(&bench.guest, &[writable], Layout::Direct);
    bench.guest_sends(&frame(64, 9), Layout::Direct);
    assert_eq!(bench.host_gets(), frame(64, 9));
}

#[test]
fn a_full_stream_holds_packets_back_and_loses_none() {
    let mut bench = bench(256, true, MRG);
    let packet = [&[0; HEADER][..], &frame(60_000, 5)].concat();
    let buffer = bench.guest.readable(&packet);
    const PACKETS: usize = 40;
    for _ in 0..PACKETS {
        bench.tx.add(&[buffer], Layout::Direct);
    }
    bench.tx.kick();
    let mut host = bench.host.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; PACKETS * (4 + 60_000)];
        host.read_exact(&mut bytes).unwrap();
        bytes
    });
    for _ in 0..PACKETS {
        bench.tx.wait(&bench.guest);
    }
    for packet in reader.join().unwrap().chunks(4 + 60_000) {
        assert_eq!(packet[..4], 60_000u32.to_be_bytes());
        assert!(packet[4..] == frame(60_000, 5));
    }
}

#[test]
fn frames_are_found_however_the_stream_is_cut() {
    let mut bench = bench(8, false, MRG);
    let sent = frame(300, 7);
    let bytes = [&300u32.to_be_bytes()[..], &sent].concat();
    for size in [1, 3, 4, 5, 150] {
        let buffer = bench.give_buffer(512);
        for piece in bytes.chunks(size) {
            bench.host.write_all(piece).unwrap();
        }
        assert_eq!(bench.guest_gets(&[buffer]).1, sent);
    }
}

#[test]
fn a_guest_goes_on_without_the_other_end() {
    for nonsense in [&[][..], &[0, 0, 0, 0], &[0xff; 4]] {
        let mut bench = bench(8, false, MRG);
        bench.host.write_all(nonsense).unwrap();
        bench.host.shutdown(std::net::Shutdown::Both).unwrap();
        // More than the ring holds: they are taken, and go nowhere.
        for _ in 0..20 {
            bench.guest_sends(&frame(100, 1), Layout::Direct);
        }
        assert!(!bench.guest.interrupt.needs_reset());
        assert_eq!(bench.net.deactivate().len(), 2);
    }
}

#[test]
fn a_pause_loses_no_packet_that_was_taken() {
    let mut bench = bench(8, true, MRG);
    bench.guest_sends(&frame(100, 1), Layout::Direct);
    let queues = bench.net.deactivate();
    bench.host_sends(&frame(200, 2));
    bench
        .net
        .activate(bench.guest.activation_with(queues, MRG))
        .unwrap();
    let buffer = bench.give_buffer(512);
    assert_eq!(bench.guest_gets(&[buffer]).1, frame(200, 2));
    assert_eq!(bench.host_gets(), frame(100, 1));
}

#[test]
fn buffers_outside_memory_fail_the_device() {
    for queue in [RX, TX] {
        let mut bench = bench(8, false, MRG);
        let outside = GuestAddress(u64::MAX - 8);
        if queue == RX {
            bench.rx.add(&[Buffer::writable(outside, 64)], Layout::Direct);
            bench.rx.kick();
            bench.host_sends(&frame(40, 1));
        } else {
            bench.tx.add(&[Buffer::readable(outside, 64)], Layout::Direct);
            bench.tx.kick();
        }
        bench.guest.wait_until_failed();
        assert_eq!(bench.net.deactivate().len(), 2);
    }
}

#[test]
fn addresses_of_groups_and_odd_sizes_are_refused() {
    let config = |mac, mtu| NetConfig {
        mac,
        mtu,
        kind: NetKind::Stream,
        plug: None,
    };
    assert!(matches!(Net::new(config([1; 6], 1500)), Err(NetError::Mac(_))));
    assert!(matches!(Net::new(config(MAC, 100)), Err(NetError::Mtu(100))));
    assert!(matches!(Net::new(config(MAC, 65_535)), Err(NetError::Mtu(_))));
    let mut data = [0; 12];
    Net::new(config(MAC, 9000)).unwrap().read_config(0, &mut data);
    assert_eq!(data[..6], MAC);
    assert_eq!(data[10..], 9000u16.to_le_bytes());
}

#[test]
fn a_tap_s_packets_keep_their_headers() {
    let features = MRG | F_OFFLOADS;
    let mut bench = tap_bench(features);
    // A TCP packet to be cut into segments and summed up, as a driver writes it.
    let header = [1, 1, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0];
    for seed in 0..40 {
        let sent = [&header[..], &frame(60_000, seed)].concat();
        let buffer = bench.guest.readable(&sent);
        bench.tx.round_trip(&bench.guest, &[buffer], Layout::Direct);
        let mut got = vec![0; 100_000];
        let length = bench.host.read(&mut got).unwrap();
        assert!(got[..length] == sent);
        let buffers: Vec<Buffer> = (0..16).map(|_| bench.give_buffer(4096)).collect();
        bench.host.write_all(&sent).unwrap();
        let (got, frame) = bench.guest_gets(&buffers[..15]);
        assert_eq!(got, [&header[..10], &[15, 0]].concat());
        assert!(frame == sent[HEADER..]);
        // The last one is for the next packet.
        bench
            .host
            .write_all(&[&[0; HEADER][..], &sent[..100]].concat())
            .unwrap();
        assert_eq!(bench.guest_gets(&buffers[15..]).1, sent[..100]);
    }
}

#[test]
fn a_tap_is_given_nothing_that_was_not_offered() {
    let mut bench = tap_bench(MRG | F_OFFLOADS);
    // UDP fragments, UDP segments, and what nobody knows.
    for gso_type in [2, 3, 5, 0x7f] {
        let mut packet = vec![0; HEADER + 100];
        packet[1] = gso_type;
        let buffer = bench.guest.readable(&packet);
        bench.tx.round_trip(&bench.guest, &[buffer], Layout::Direct);
    }
    let mut packet = [&[0xff, 0x81][..], &[0; HEADER - 2], &frame(100, 1)].concat();
    let buffer = bench.guest.readable(&packet);
    bench.tx.round_trip(&bench.guest, &[buffer], Layout::Direct);
    packet[0] = 1;
    let mut got = vec![0; 1000];
    let length = bench.host.read(&mut got).unwrap();
    assert_eq!(got[..length], packet);
}

/// The link's status, as the driver reads it.
fn status(net: &Net) -> u16 {
    let mut status = [0; 2];
    net.read_config(6, &mut status);
    u16::from_le_bytes(status)
}

fn wait_until_unplugged(net: &Net) {
    while status(net) != 0 {
        std::thread::yield_now();
    }
}

#[test]
fn an_end_is_noticed_though_packets_wait_for_buffers() {
    let mut bench = bench(8, true, MRG);
    bench.host_sends(&frame(100, 1));
    assert!(!bench.guest.interrupted_within(100));
    bench.host.shutdown(std::net::Shutdown::Both).unwrap();
    wait_until_unplugged(&bench.net);
    bench.guest_sends(&frame(100, 1), Layout::Direct);
}

#[test]
fn another_cable_can_be_plugged_in() {
    let mut bench = bench(8, true, MRG);
    assert_eq!(status(&bench.net), 1);
    bench.host.shutdown(std::net::Shutdown::Both).unwrap();
    bench.guest_sends(&frame(100, 1), Layout::Direct);
    wait_until_unplugged(&bench.net);
    // As the transport does it.
    let queues = bench.net.deactivate();
    let (ours, host) = UnixStream::pair().unwrap();
    bench.host = host;
    bench.net.plug(Some(ours.into())).unwrap();
    assert_eq!(status(&bench.net), 1);
    bench
        .net
        .activate(bench.guest.activation_with(queues, MRG))
        .unwrap();
    bench.guest_sends(&frame(100, 2), Layout::Direct);
    assert_eq!(bench.host_gets(), frame(100, 2));
    assert!(matches!(bench.net.plug(None), Err(NetError::Lost)), "it runs");
    let queues = bench.net.deactivate();
    bench.net.plug(None).unwrap();
    assert_eq!(status(&bench.net), 0);
    bench
        .net
        .activate(bench.guest.activation_with(queues, MRG))
        .unwrap();
    bench.guest_sends(&frame(100, 3), Layout::Direct);
    // The end of the other one.
    assert_eq!(bench.host.read(&mut [0; 100]).unwrap(), 0);
}
