//! A guest that keeps to no rule.

use super::guest::{CID, Guest, SERVED};
use super::guest_socket::Socket;
use super::host::read_to_end;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{Buffer, Layout, NEXT};
use crate::virtio::vsock::muxer::{FIRST_LOCAL_PORT, MAX_CONNECTIONS, MAX_REFUSALS};
use crate::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Ports, kind, op, shutdown};
use std::io::Write;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

/// A small generator of numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }
}

fn works(guest: &mut Guest) {
    let (mut socket, client) = guest.connect(4_000_000);
    socket.send(guest, op::RW, 0, b"alive");
    socket.send(guest, op::SHUTDOWN, shutdown::BOTH, &[]);
    socket.expect(guest, op::RST, 0);
    assert_eq!(read_to_end(&client), b"alive");
}

#[test]
fn a_hundred_thousand_random_packets() {
    let mut guest = Guest::new();
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    // Programs of the host that come and go meanwhile.
    let mut clients = std::collections::VecDeque::new();
    for step in 0..100_000u32 {
        if step % 100 == 0 {
            clients.push_back(guest.host.connect(numbers.below(4) as u32, "some data"));
            if clients.len() > 50 {
                clients.pop_front();
            }
        }
        let length = numbers.one_of(&[0, 0, 0, 1, 100, 5000]);
        let header = Header {
            src_cid: numbers.one_of(&[CID, CID, CID, CID, CID, CID, CID, 0, 9]),
            dst_cid: numbers.one_of(&[HOST_CID, HOST_CID, HOST_CID, HOST_CID, HOST_CID, 7]),
            src_port: numbers.below(4) as u32,
            dst_port: match numbers.below(3) {
                0 => SERVED,
                1 => FIRST_LOCAL_PORT + step / 100 - numbers.below(3) as u32,
                _ => numbers.next() as u32,
            },
            len: numbers.one_of(&[length as u32, length as u32, length as u32, 0, u32::MAX]),
            kind: numbers.one_of(&[kind::STREAM, kind::STREAM, kind::STREAM, kind::STREAM, 2, 0]),
            op: numbers.below(10) as u16,
            flags: numbers.one_of(&[0, 1, 2, 3, u32::MAX]),
            buf_alloc: numbers.one_of(&[0, 1, 65536, u32::MAX]),
            fwd_cnt: numbers.one_of(&[0, 1, 100, u32::MAX]),
        };
        guest.send(&header, &[0xaa; 5000][..length]);
    }
    guest.await_taken();
    assert!(!guest.machine.interrupt.needs_reset());
    guest.pause();
    let state = guest.device.state().unwrap();
    assert!(state.connections.len() <= MAX_CONNECTIONS);
    guest.resume();
    drop(clients);
    // Programs of the host still get their turn.
    while guest.host.try_accept().is_some() {}
    works(&mut guest);
}

#[test]
fn packets_that_nobody_takes_are_bounded() {
    let mut guest = Guest::without_buffers();
    // No receive buffers at all, and every packet would be answered.
    for peer in 0..3 * MAX_REFUSALS as u32 {
        Socket::new(Ports { local: 1, peer }).send(&mut guest, op::REQUEST, 0, &[]);
    }
    guest.await_taken();
    guest.refill();
    for peer in 0..MAX_REFUSALS as u32 {
        let refusal = guest.receive().header;
        assert_eq!((refusal.op, refusal.dst_port), (op::RST, peer));
    }
    works(&mut guest);
}

#[test]
fn a_flood_of_connections_that_are_not_answered_is_bounded() {
    let mut guest = Guest::without_buffers();
    // Each is opened and closed, and the answers to both wait for buffers.
    let ports = |peer| Ports { local: SERVED, peer };
    for peer in 0..2 * MAX_CONNECTIONS as u32 {
        let mut socket = Socket::new(ports(peer));
        socket.send(&mut guest, op::REQUEST, 0, &[]);
        socket.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
        if peer % 8 == 0 {
            guest.await_taken();
            while guest.host.try_accept().is_some() {}
        }
    }
    guest.await_taken();
    guest.pause();
    // Those that were refused, too: it is not told yet.
    let known = guest.device.state().unwrap().connections.len();
    assert!((MAX_CONNECTIONS + 1..=MAX_CONNECTIONS + MAX_REFUSALS).contains(&known));
    guest.resume();
    guest.refill();
    for _ in 0..MAX_CONNECTIONS + MAX_REFUSALS {
        assert_eq!(guest.receive().header.op, op::RST);
    }
    while guest.host.try_accept().is_some() {}
    works(&mut guest);
}

#[test]
fn a_request_for_a_connection_that_is_there_resets_it() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(1);
    socket.send(&mut guest, op::REQUEST, 0, &[]);
    socket.expect(&mut guest, op::RST, 0);
    assert_eq!(read_to_end(&client), b"");
    guest.connect(1);
}

#[test]
fn chains_that_hold_no_packet_are_given_back() {
    let mut guest = Guest::without_buffers();
    let page = guest.machine.allocate(4096);
    let far = GuestAddress(1 << 40);
    for buffer in [
        Buffer::readable(far, 100),
        Buffer::readable(GuestAddress(u64::MAX - 10), 100),
        Buffer::readable(page, HEADER_LEN - 1),
        Buffer::readable(page, 0),
        Buffer::readable(page, u32::MAX as usize),
        Buffer::writable(page, 4096),
    ] {
        for layout in [Layout::Direct, Layout::Indirect] {
            let used = guest.tx.round_trip(&guest.machine, &[buffer], layout);
            assert_eq!(used.length, 0, "{buffer:?}");
        }
    }
    // A chain that goes round in a circle.
    let pieces = [Buffer::readable(page, 10); 2];
    let head = guest.tx.add(&pieces, Layout::Direct);
    guest
        .tx
        .write_descriptor(head, Descriptor::new(page.0, 10, NEXT, head));
    guest.tx.kick();
    assert_eq!(guest.tx.wait(&guest.machine).length, 0);

    // Receive buffers of the same kinds, while there is a packet for them.
    Socket::new(Ports { local: 1, peer: 1 }).send(&mut guest, op::REQUEST, 0, &[]);
    for (buffer, written) in [
        (Buffer::writable(far, 4096), 0),
        (Buffer::writable(page, HEADER_LEN - 1), 0),
        (Buffer::readable(page, 4096), 0),
        (Buffer::writable(page, HEADER_LEN), HEADER_LEN as u32),
    ] {
        let used = guest.rx.round_trip(&guest.machine, &[buffer], Layout::Direct);
        assert_eq!(used.length, written, "{buffer:?}");
    }
    guest.refill();
    works(&mut guest);
}

#[test]
fn a_receive_buffer_without_room_for_data_is_given_back_and_the_data_waits() {
    let mut guest = Guest::without_buffers();
    let page = guest.machine.allocate(4096);
    let small = Buffer::writable(page, HEADER_LEN);
    let mut socket = Socket::new(Ports {
        local: SERVED,
        peer: 1,
    });
    socket.send(&mut guest, op::REQUEST, 0, &[]);
    let mut server = guest.host.accept();
    let response = guest.rx.round_trip(&guest.machine, &[small], Layout::Direct);
    assert_eq!(response.length, HEADER_LEN as u32);
    server.write_all(b"data").unwrap();
    let nothing = guest.rx.round_trip(&guest.machine, &[small], Layout::Direct);
    assert_eq!(nothing.length, 0);
    guest.refill();
    assert_eq!(socket.receive_bytes(&mut guest, 4), b"data");
}

#[test]
fn a_broken_ring_kills_the_device_until_a_reset_and_clients_notice() {
    let mut guest = Guest::new();
    let (_socket, client) = guest.accept(1);
    guest.tx.publish_available(30_000);
    guest.tx.force_kick();
    assert_eq!(read_to_end(&client), b"");
    guest.machine.wait_until_failed();
    guest.pause();
    guest.device.reset();
    guest.machine.interrupt.reset();
    guest.start_again();
    works(&mut guest);
}

#[test]
fn a_head_beyond_the_ring_kills_the_device() {
    let mut guest = Guest::new();
    guest.tx.make_available(256);
    guest.tx.force_kick();
    guest.machine.wait_until_failed();
}
