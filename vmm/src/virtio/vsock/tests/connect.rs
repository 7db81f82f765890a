//! Connections come about, or do not.

use super::guest::{Guest, SERVED};
use super::guest_socket::Socket;
use super::host::{read_exactly, read_ok, read_to_end};
use crate::virtio::vsock::credit::BUFFER;
use crate::virtio::vsock::muxer::{FIRST_LOCAL_PORT, MAX_HANDSHAKES};
use crate::virtio::vsock::packet::{Header, Ports, kind, op, shutdown};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[test]
fn a_client_of_the_host_connects_and_its_early_data_is_kept() {
    let mut guest = Guest::new();
    let mut client = guest.host.connect(2375, "hello");
    let request = guest.receive();
    assert_eq!(request.header.op, op::REQUEST);
    assert_eq!(request.header.kind, kind::STREAM);
    assert_eq!(request.header.dst_port, 2375);
    assert_eq!(request.header.buf_alloc, BUFFER);
    assert!((FIRST_LOCAL_PORT..1 << 31).contains(&request.header.src_port));

    let mut socket = guest.answer(&request);
    assert_eq!(read_ok(&client), request.header.src_port);
    assert_eq!(socket.receive_bytes(&mut guest, 5), b"hello");
    socket.send(&mut guest, op::RW, 0, b"and back");
    assert_eq!(read_exactly(&client, 8), b"and back");
    client.write_all(b"again").unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 5), b"again");
}

#[test]
fn a_client_is_closed_without_a_word_when_nobody_listens_in_the_guest() {
    let mut guest = Guest::new();
    let client = guest.host.connect(1, "");
    let request = guest.receive();
    guest.send(&request.header.refusal(), &[]);
    assert_eq!(read_to_end(&client), b"");
}

#[test]
fn each_connection_has_a_port_of_its_own() {
    let mut guest = Guest::new();
    let (first, _client) = guest.accept(7);
    let (second, _other) = guest.accept(7);
    assert_eq!(second.ports.local, first.ports.local + 1);
}

#[test]
fn a_client_that_leaves_before_the_guest_has_answered_is_taken_back() {
    let mut guest = Guest::new();
    let client = guest.host.connect(7, "");
    let request = guest.receive();
    drop(client);
    let reset = guest.receive();
    assert_eq!(reset.header.op, op::RST);
    assert_eq!(reset.header.src_port, request.header.src_port);
}

#[test]
fn a_client_may_end_its_direction_with_its_line() {
    let mut guest = Guest::new();
    let client = guest.host.connect(7, "all");
    client.shutdown(Shutdown::Write).unwrap();
    let request = guest.receive();
    let mut socket = guest.answer(&request);
    read_ok(&client);
    assert_eq!(socket.receive_bytes(&mut guest, 3), b"all");
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::SEND);
    socket.send(&mut guest, op::RW, 0, b"answer");
    assert_eq!(read_exactly(&client, 6), b"answer");
}

#[test]
fn the_line_may_come_in_pieces() {
    let mut guest = Guest::new();
    let mut client = guest.host.connect_silently();
    let mut other = guest.host.connect_silently();
    for piece in ["C", "ONNECT ", "12", "34", "\nab"] {
        client.write_all(piece.as_bytes()).unwrap();
        // A whole exchange between the pieces, so that the device has looked at each of them.
        other.write_all(b"nonsense\n").unwrap();
        read_closed(&other);
        other = guest.host.connect_silently();
    }
    let request = guest.receive();
    assert_eq!(request.header.dst_port, 1234);
    let mut socket = guest.answer(&request);
    read_ok(&client);
    assert_eq!(socket.receive_bytes(&mut guest, 2), b"ab");
}

/// The other side has closed, perhaps with bytes of ours unread.
fn read_closed(mut stream: &UnixStream) {
    let mut byte = [0];
    match std::io::Read::read(&mut stream, &mut byte) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_connect_line_is_closed() {
    let guest = Guest::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"1".repeat(200)] {
        let mut client = guest.host.connect_silently();
        client.write_all(line.as_bytes()).unwrap();
        read_closed(&client);
    }
}

#[test]
fn clients_that_say_nothing_keep_nobody_out() {
    let mut guest = Guest::new();
    let silent: Vec<_> = (0..MAX_HANDSHAKES + 1)
        .map(|_| guest.host.connect_silently())
        .collect();
    let (_socket, _client) = guest.accept(5);
    // The oldest had to make room.
    read_closed(&silent[0]);
}

#[test]
fn the_guest_connects_to_a_served_port() {
    let mut guest = Guest::new();
    let (mut socket, mut stream) = guest.connect(5000);
    stream.write_all(b"welcome").unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 7), b"welcome");
    socket.send(&mut guest, op::RW, 0, b"thanks");
    assert_eq!(read_exactly(&stream, 6), b"thanks");
}

#[test]
fn other_ports_of_the_host_refuse() {
    let mut guest = Guest::new();
    for port in [0, SERVED + 1, FIRST_LOCAL_PORT, u32::MAX] {
        let mut socket = Socket::new(Ports {
            local: port,
            peer: 5000,
        });
        socket.send(&mut guest, op::REQUEST, 0, &[]);
        socket.expect(&mut guest, op::RST, 0);
    }
}

#[test]
fn a_served_port_whose_server_is_gone_refuses() {
    let mut guest = Guest::new();
    guest.host.stop_serving();
    let mut socket = Socket::new(Ports {
        local: SERVED,
        peer: 5000,
    });
    socket.send(&mut guest, op::REQUEST, 0, &[]);
    socket.expect(&mut guest, op::RST, 0);
}

#[test]
fn a_server_that_takes_no_connections_makes_the_guest_see_refusals() {
    let mut guest = Guest::new();
    let mut refused = 0;
    let mut asked = 0;
    while refused == 0 {
        asked += 1;
        assert!(asked < 5000, "nothing bounds what waits for the server");
        let mut socket = Socket::new(Ports {
            local: SERVED,
            peer: asked,
        });
        socket.send(&mut guest, op::REQUEST, 0, &[]);
        refused += u32::from(socket.receive(&mut guest).header.op == op::RST);
    }
    // Those before are there once the server gets to them.
    for _ in 1..asked {
        guest.host.accept();
    }
    guest.connect(6000);
}

#[test]
fn only_streams_are_spoken_and_only_with_the_host() {
    let mut guest = Guest::new();
    let ports = Ports {
        local: SERVED,
        peer: 9,
    };
    let request = Socket::new(ports).header(op::REQUEST, 0, 0);
    // Of another guest, or to one: not for us, no answer.
    for (src_cid, dst_cid) in [(4, 2), (3, 3), (0, 2), (2, 3), (u64::MAX, u64::MAX)] {
        guest.send(
            &Header {
                src_cid,
                dst_cid,
                ..request
            },
            &[],
        );
    }
    for kind in [0, 2, 3, u16::MAX] {
        guest.send(&Header { kind, ..request }, &[]);
        let answer = guest.receive().header;
        assert_eq!((answer.op, answer.kind), (op::RST, kind));
        assert_eq!((answer.src_port, answer.dst_port), (SERVED, 9));
    }
}

#[test]
fn packets_of_no_connection_are_answered_by_rst_but_a_rst_is_not() {
    let mut guest = Guest::new();
    let mut socket = Socket::new(Ports {
        local: SERVED,
        peer: 9,
    });
    socket.send(&mut guest, op::RST, 0, &[]);
    for op in [
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        0,
        99,
    ] {
        socket.send(&mut guest, op, 0, b"data");
        socket.expect(&mut guest, op::RST, 0);
    }
    assert_eq!(guest.received(), []);
}
