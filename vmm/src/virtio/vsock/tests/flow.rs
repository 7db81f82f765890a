//! Data and credit.

use super::guest::Guest;
use super::host::{pattern, read_exactly, read_to_end};
use crate::virtio::vsock::credit::BUFFER;
use crate::virtio::vsock::packet::{Header, op, shutdown};
use std::io::Write;
use std::net::Shutdown;

const MIB: usize = 1 << 20;

#[test]
fn data_in_many_pieces_arrives_whole_both_ways() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    let mut writer = client.try_clone().unwrap();
    let data = pattern(3 * MIB + 17);
    let sent = data.clone();
    let host = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    assert!(socket.receive_bytes(&mut guest, data.len()) == data);
    host.join().unwrap();

    let length = data.len();
    let host = std::thread::spawn(move || read_exactly(&client, length));
    socket.send_all(&mut guest, &data);
    assert!(host.join().unwrap() == data);
}

#[test]
fn packets_of_every_small_length_arrive_whole() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    for length in 0..200 {
        let data = pattern(length);
        socket.send(&mut guest, op::RW, 0, &data);
        assert_eq!(read_exactly(&client, length), data);
    }
}

#[test]
fn a_slow_reader_stalls_the_guest_and_loses_nothing() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(1);
    let data = pattern(MIB);
    // As much as the guest may send while the client reads nothing: the device takes it, whatever the socket takes.
    let window = socket.room();
    assert_eq!(window, BUFFER as usize);
    socket.send_all(&mut guest, &data[..window]);
    guest.await_taken();
    let reader = std::thread::spawn(move || {
        let mut data = vec![];
        for length in [1, 10, 100, 1000].into_iter().cycle() {
            let length = length.min(MIB - data.len());
            if length == 0 {
                return (data, client);
            }
            data.extend(read_exactly(&client, length));
        }
        unreachable!()
    });
    socket.send_all(&mut guest, &data[window..]);
    let (received, client) = reader.join().unwrap();
    assert!(received == data);
    socket.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    assert_eq!(read_to_end(&client), b"");
}

#[test]
fn one_stalled_client_stalls_no_other() {
    let mut guest = Guest::new();
    let (mut stalled, sleeper) = guest.connect(1);
    let data = pattern(BUFFER as usize);
    stalled.send_all(&mut guest, &data);
    let (mut socket, client) = guest.connect(2);
    let reader = std::thread::spawn(move || read_exactly(&client, MIB));
    socket.send_all(&mut guest, &pattern(MIB));
    assert!(reader.join().unwrap() == pattern(MIB));
    assert!(read_exactly(&sleeper, data.len()) == data);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stalled, mut client) = guest.accept(1);
    stalled.hoards = true;
    let room = stalled.buffer as usize;
    let data = pattern(room + 1000);
    client.write_all(&data).unwrap();
    let mut received = vec![];
    let asked = loop {
        let packet = stalled.receive(&mut guest);
        match packet.header.op {
            op::RW => received.extend(packet.data),
            op => break op,
        }
    };
    assert!(received == data[..room]);
    // It says why nothing comes any more, once.
    assert_eq!(asked, op::CREDIT_REQUEST);

    // Another connection does not suffer from it.
    let (mut socket, mut other) = guest.accept(2);
    other.write_all(b"through").unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 7), b"through");

    assert_eq!(guest.received(), []);
    stalled.forwarded = 1000;
    stalled.send(&mut guest, op::CREDIT_UPDATE, 0, &[]);
    assert!(stalled.receive_bytes(&mut guest, 1000) == data[room..]);
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(1);
    socket.send_all(&mut guest, &[7; 5000]);
    read_exactly(&client, 5000);
    socket.send(&mut guest, op::CREDIT_REQUEST, 0, &[]);
    let update = socket.receive(&mut guest).header;
    assert_eq!(
        (update.op, update.fwd_cnt, update.buf_alloc),
        (op::CREDIT_UPDATE, 5000, BUFFER)
    );
}

#[test]
fn a_guest_that_sends_more_than_it_may_loses_that_connection_only() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(1);
    let (mut greedy, victim) = guest.connect(2);
    // More than the device buffers and the socket takes together.
    for _ in 0..20 {
        greedy.send(&mut guest, op::RW, 0, &[1; 65536]);
    }
    greedy.expect(&mut guest, op::RST, 0);
    assert!(read_to_end(&victim).len() < 20 * 65536);
    client.write_all(b"unharmed").unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 8), b"unharmed");
}

#[test]
fn a_length_beyond_the_chain_resets_the_connection() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(1);
    for len in [101, u32::MAX] {
        let header = Header {
            len,
            ..socket.header(op::RW, 0, 0)
        };
        guest.send(&header, &[0; 100]);
        socket.expect(&mut guest, op::RST, 0);
    }
    assert_eq!(read_to_end(&client), b"");
}

#[test]
fn host_data_waits_for_receive_buffers_and_connections_share_them() {
    let mut guest = Guest::new();
    let sockets: Vec<_> = (0..4).map(|port| guest.accept(port)).collect();
    // Take all buffers away: the device fills them, and none are given back.
    guest.refills = false;
    let mut filler = guest.accept(99);
    filler.0.buffer = 4 * MIB as u32;
    filler.0.send(&mut guest, op::CREDIT_UPDATE, 0, &[]);
    filler.1.set_nonblocking(true).unwrap();
    let mut filled = 0;
    while let Ok(length) = filler.1.write(&[0; 65536]) {
        filled += length;
    }
    filler.1.set_nonblocking(false).unwrap();
    for (_, client) in &sockets {
        let mut client = client;
        client.write_all(&[1; 20_000]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
    }
    // With four buffers at a time, nobody gets all of them.
    let mut got = std::collections::HashMap::<u32, usize>::new();
    let mut ended = 0;
    let mut most = 0;
    while ended < sockets.len() {
        guest.refill_some(4);
        let packet = guest.receive();
        *got.entry(packet.header.dst_port).or_default() += packet.data.len();
        ended += usize::from(packet.header.op == op::SHUTDOWN);
        let counts: Vec<usize> = (0..4).map(|port| got.get(&port).copied().unwrap_or(0)).collect();
        let spread = counts.iter().max().unwrap() - counts.iter().min().unwrap();
        most = most.max(spread);
    }
    assert!(most <= 3 * 4096, "a connection was {most} bytes ahead of another");
    assert!((0..4).all(|port| got[&port] == 20_000));
    assert!(filled > 0);
}
