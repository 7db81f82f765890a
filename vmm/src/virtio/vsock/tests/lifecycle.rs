//! Many connections, pauses, resets.

use super::guest::{Guest, SERVED};
use super::guest_socket::Socket;
use super::host::{pattern, read_exactly, read_ok, read_to_end};
use crate::virtio::VirtioDevice;
use crate::virtio::vsock::muxer::MAX_CONNECTIONS;
use crate::virtio::vsock::packet::{HOST_CID, Ports, op, shutdown};
use crate::virtio::vsock::{Vsock, VsockConfig, VsockError};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

#[test]
fn the_configuration_space_is_the_cid() {
    let guest = Guest::new();
    let mut data = [0; 8];
    guest.device.read_config(0, &mut data);
    assert_eq!(data, [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.device.name(), "vsock");
    assert_eq!(guest.device.device_type(), 19);
}

#[test]
fn a_bad_configuration_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("muxer")).unwrap();
    let port = || (7, UnixStream::pair().unwrap().0.into());
    let config = |guest_cid, host_ports| VsockConfig {
        guest_cid,
        muxer: listener.try_clone().unwrap(),
        host_ports,
    };
    for cid in [0, 1, HOST_CID, 0xffff_ffff, 1 << 32, u64::MAX] {
        let error = Vsock::new(config(cid, vec![])).unwrap_err();
        assert!(matches!(error, VsockError::GuestCid(refused) if refused == cid));
    }
    let folder = std::fs::File::open(folder.path()).unwrap();
    let no_socket = Vsock::new(config(3, vec![(7, folder.into())]));
    assert!(matches!(no_socket, Err(VsockError::HostPort { port: 7, .. })));
    let error = Vsock::new(config(3, vec![port(), port()])).unwrap_err();
    assert!(matches!(error, VsockError::PortTwice(7)));
}

#[test]
fn eleven_hundred_connections_at_once() {
    const EACH_WAY: u32 = 550;
    let mut guest = Guest::new();
    let mut connections: Vec<_> = (0..EACH_WAY).map(|port| guest.accept(port)).collect();
    connections.extend((0..EACH_WAY).map(|port| guest.connect(10_000 + port)));
    for (index, (socket, client)) in connections.iter_mut().enumerate() {
        let text = format!("connection {index:5}");
        client.write_all(text.as_bytes()).unwrap();
        socket.send(&mut guest, op::RW, 0, text.as_bytes());
    }
    for (index, (socket, client)) in connections.iter_mut().enumerate() {
        let text = format!("connection {index:5}");
        assert_eq!(read_exactly(client, text.len()), text.as_bytes());
        assert_eq!(socket.receive_bytes(&mut guest, text.len()), text.as_bytes());
    }
    guest.pause();
    assert_eq!(guest.device.state().unwrap().connections.len(), 1100);
}

#[test]
fn beyond_the_limit_connections_are_refused_until_others_end() {
    let mut guest = Guest::new();
    let mut held = vec![];
    for port in 0..MAX_CONNECTIONS as u32 {
        held.push(guest.connect(port));
    }
    let mut socket = Socket::new(Ports {
        local: SERVED,
        peer: 1_000_000,
    });
    socket.send(&mut guest, op::REQUEST, 0, &[]);
    socket.expect(&mut guest, op::RST, 0);
    assert_eq!(read_to_end(&guest.host.connect(5, "")), b"");

    let (mut socket, _client) = held.pop().unwrap();
    socket.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
    socket.expect(&mut guest, op::RST, 0);
    guest.accept(5);
}

#[test]
fn a_storm_of_connections_leaves_nothing_behind() {
    let mut guest = Guest::new();
    for round in 0..500 {
        let (mut ours, client) = guest.connect(round);
        let (mut theirs, mut stream) = guest.accept(round);
        ours.send(&mut guest, op::RW, 0, b"x");
        stream.write_all(b"y").unwrap();
        ours.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
        ours.expect(&mut guest, op::RST, 0);
        assert_eq!(read_to_end(&client), b"x");
        drop(stream);
        assert_eq!(theirs.receive_bytes(&mut guest, 1), b"y");
        theirs.expect_close(&mut guest);
        theirs.send(&mut guest, op::RST, 0, &[]);
    }
    guest.await_taken();
    guest.pause();
    let state = guest.device.state().unwrap();
    assert_eq!(state.connections, []);
    assert_eq!(state.next_local_port, (1 << 30) + 500);
}

#[test]
fn a_pause_in_the_middle_of_traffic_keeps_every_byte() {
    const LENGTH: usize = 2 << 20;
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    let mut writer = client.try_clone().unwrap();
    let host_writes = std::thread::spawn(move || writer.write_all(&pattern(LENGTH)).unwrap());
    let host_reads = std::thread::spawn(move || read_exactly(&client, LENGTH));
    let data = pattern(LENGTH);
    let mut received = vec![];
    let mut sent = 0;
    for step in 0.. {
        if received.len() == LENGTH && sent == LENGTH {
            break;
        }
        let length = socket.room().min(LENGTH - sent).min(30_000);
        if length > 0 {
            socket.send(&mut guest, op::RW, 0, &data[sent..sent + length]);
            sent += length;
        }
        if step % 16 == 0 {
            guest.pause();
            assert_eq!(guest.device.state().unwrap().connections.len(), 1);
            guest.resume();
        }
        if received.len() < LENGTH || socket.room() == 0 {
            let packet = socket.receive(&mut guest);
            received.extend(packet.data);
            socket.send(&mut guest, op::CREDIT_UPDATE, 0, &[]);
        }
    }
    assert!(received == data);
    host_writes.join().unwrap();
    assert!(host_reads.join().unwrap() == data);
}

#[test]
fn what_happens_during_a_pause_is_seen_after_it() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    let (mut ending, leaver) = guest.accept(8);
    guest.pause();
    client.write_all(b"while you slept").unwrap();
    drop(leaver);
    let early = guest.host.connect(9, "");
    socket.send(&mut guest, op::RW, 0, b"me too");
    guest.resume();
    assert_eq!(socket.receive_bytes(&mut guest, 15), b"while you slept");
    assert_eq!(read_exactly(&client, 6), b"me too");
    ending.expect_close(&mut guest);
    let request = guest.receive();
    guest.answer(&request);
    read_ok(&early);
}

#[test]
fn a_reset_in_the_middle_of_traffic_closes_every_connection_and_new_ones_come() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    let (_, stream) = guest.connect(8);
    let mut writer = client.try_clone().unwrap();
    let writes = std::thread::spawn(move || {
        // Ends when the device closes the connection.
        while writer.write_all(&[0; 10_000]).is_ok() {}
    });
    socket.send_all(&mut guest, b"before the end");
    socket.receive(&mut guest);
    guest.await_taken();
    guest.pause();
    guest.device.reset();
    writes.join().unwrap();
    let mut rest = vec![];
    // Perhaps an error, since what the client has sent was not read.
    let _ = (&client).read_to_end(&mut rest);
    assert_eq!(rest, b"before the end");
    assert_eq!(read_to_end(&stream), b"");
    assert_eq!(guest.device.state().unwrap().connections, []);

    guest.start_again();
    let (mut socket, client) = guest.accept(7);
    socket.send(&mut guest, op::RW, 0, b"again");
    assert_eq!(read_exactly(&client, 5), b"again");
    guest.connect(8);
}

#[test]
fn a_device_that_is_active_or_lacks_a_queue_does_not_start() {
    let mut guest = Guest::new();
    let activation = || crate::virtio::Activation {
        memory: guest.machine.memory.clone(),
        queues: vec![],
        interrupt: guest.machine.interrupt.clone(),
        features: 0,
        thread: guest.machine.thread.clone(),
    };
    assert!(guest.device.activate(activation()).is_err());
    assert!(guest.device.state().is_none());
    assert_eq!(guest.device.deactivate().len(), 3);
    assert!(guest.device.deactivate().is_empty());
}
