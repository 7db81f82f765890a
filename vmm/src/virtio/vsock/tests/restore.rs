//! A device that goes on where another was saved.

use super::guest::{Guest, Packet, SERVED};
use super::guest_socket::Socket;
use super::host::{read_exactly, read_ok};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::VsockState;
use crate::virtio::vsock::packet::op;
use std::io::Write;

fn assert_reset(packet: &Packet, socket: &Socket) {
    assert_eq!(packet.header.op, op::RST);
    assert_eq!(
        (packet.header.src_port, packet.header.dst_port),
        (socket.ports.local, socket.ports.peer)
    );
}

#[test]
fn the_guest_is_told_of_each_connection_and_the_source_keeps_them() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    let (other, _stream) = guest.connect(8);
    guest.pause();
    let (source, _source_host) = guest.move_to_new_device();
    // As the copy begins, a client is waiting already.
    let early = guest.host.connect(9, "");
    socket.send(&mut guest, op::RW, 0, b"into the void");
    guest.resume();
    for socket in [&socket, &other] {
        assert_reset(&guest.receive_of(socket.ports), socket);
    }
    let request = loop {
        let packet = guest.receive();
        if packet.header.op != op::RST {
            break packet;
        }
        // The answer to what was sent into the void.
        assert_reset(&packet, &socket);
    };
    // The port of no connection that the guest knew.
    assert_eq!(request.header.src_port, socket.ports.local + 1);
    let mut answered = guest.answer(&request);
    read_ok(&early);
    answered.send(&mut guest, op::RW, 0, b"hello");
    assert_eq!(read_exactly(&early, 5), b"hello");
    guest.connect(10);
    assert_eq!(source.state().unwrap().connections.len(), 2);
    client.write_all(b"still here").unwrap();
}

#[test]
fn a_copy_can_be_saved_before_its_driver_was_told() {
    let mut guest = Guest::without_buffers();
    guest.refill_some(1);
    let (socket, _client) = guest.accept(7);
    guest.refills = false;
    guest.pause();
    guest.move_to_new_device();
    let connections = vec![(socket.ports.local, socket.ports.peer)];
    assert_eq!(guest.device.state().unwrap().connections, connections);
    guest.move_to_new_device();
    guest.resume();
    assert_reset(&guest.receive_of(socket.ports), &socket);
}

#[test]
fn what_no_device_saved_is_refused_and_what_is_absurd_is_mended() {
    let mut guest = Guest::new();
    guest.pause();
    let state = guest.device.state().unwrap();
    let mut saved = |change: &dyn Fn(&mut VsockState)| {
        let mut state = state.clone();
        change(&mut state);
        guest.device.restore(&postcard::to_allocvec(&state).unwrap())
    };
    assert!(saved(&|state| state.guest_cid = 4).is_err());
    assert!(saved(&|state| state.next_local_port = SERVED).is_ok());
    assert!(saved(&|state| state.connections = vec![(1, 2); 100_000]).is_ok());
    let own = guest.device.save(&guest.machine.thread).unwrap();
    assert!(guest.device.restore(&own[..own.len() - 1]).is_err());
    assert!(guest.device.restore(&[]).is_err());
    let state = guest.device.state().unwrap();
    assert_eq!(state.next_local_port, 1 << 30);
    guest.resume();
    assert!(guest.device.restore(&own).is_err(), "it is active");
}
