//! Connections end, one direction at a time.

use super::guest::Guest;
use super::host::{pattern, read_exactly, read_to_end};
use crate::virtio::vsock::packet::{op, shutdown};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

const LARGE: usize = 700_000;

/// `echo hi | docker run -i … cat`.
#[test]
fn the_guest_answers_after_the_client_has_ended_its_direction() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(2375);
    client.write_all(b"hi\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 3), b"hi\n");
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::SEND);

    socket.send(&mut guest, op::RW, 0, b"hi\n");
    assert_eq!(read_exactly(&client, 3), b"hi\n");
    socket.send_all(&mut guest, b"bye");
    socket.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
    socket.expect(&mut guest, op::RST, 0);
    assert_eq!(read_to_end(&client), b"bye");
}

#[test]
fn the_client_goes_on_sending_after_the_guest_has_ended_its_direction() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    socket.send(&mut guest, op::RW, 0, b"that is all");
    socket.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    assert_eq!(read_to_end(&client), b"that is all");

    let data = pattern(LARGE);
    let sender = {
        let data = data.clone();
        std::thread::spawn(move || {
            client.write_all(&data).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client
        })
    };
    assert!(socket.receive_bytes(&mut guest, LARGE) == data);
    // Both directions have ended: the connection is through.
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::BOTH);
    let client = sender.join().unwrap();
    socket.send(&mut guest, op::RST, 0, &[]);
    guest.await_taken();
    assert_eq!(read_to_end(&client), b"");
    guest.pause();
    assert_eq!(guest.device.state().unwrap().connections, []);
}

#[test]
fn the_end_of_a_direction_comes_behind_its_data_while_the_other_flows() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(4000);
    let data = pattern(LARGE);
    socket.hoards = true;
    // More than the device buffers, so that its end has to wait for the client.
    let window = socket.room();
    socket.send_all(&mut guest, &data[..window]);
    socket.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    guest.await_taken();
    let client = std::thread::spawn(move || {
        (&client).write_all(&pattern(LARGE)).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        read_to_end(&client)
    });
    socket.hoards = false;
    assert!(socket.receive_bytes(&mut guest, LARGE) == data);
    assert!(client.join().unwrap() == data[..window]);
    socket.expect_close(&mut guest);
}

#[test]
fn a_client_that_closes_ends_both_directions_behind_its_data() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    client.write_all(b"last words").unwrap();
    drop(client);
    assert_eq!(socket.receive_bytes(&mut guest, 10), b"last words");
    socket.expect_close(&mut guest);
    // Nobody takes it, but it is no offence.
    socket.send(&mut guest, op::RW, 0, b"too late");
    socket.send(&mut guest, op::RST, 0, &[]);
    guest.await_taken();
    guest.pause();
    assert_eq!(guest.device.state().unwrap().connections, []);
}

#[test]
fn a_half_closed_client_that_goes_away_later_is_noticed() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    client.shutdown(Shutdown::Write).unwrap();
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::SEND);
    drop(client);
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::BOTH);
}

#[test]
fn a_client_that_closes_with_data_of_the_guest_unread_is_noticed() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.accept(7);
    socket.send_all(&mut guest, b"never read");
    guest.await_taken();
    drop(client);
    socket.expect_close(&mut guest);
}

#[test]
fn a_guest_that_closes_is_answered_at_once_and_all_it_sent_is_delivered() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(4000);
    let data = pattern(socket.room());
    socket.send_all(&mut guest, &data);
    socket.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
    // The client has read nothing yet, but the guest may use its port again.
    socket.expect(&mut guest, op::RST, 0);
    let (mut again, second) = guest.connect(4000);
    again.send(&mut guest, op::RW, 0, b"second");
    assert_eq!(read_exactly(&second, 6), b"second");
    assert!(read_to_end(&client) == data);
}

#[test]
fn what_a_guest_sent_before_it_reset_the_connection_is_delivered() {
    let mut guest = Guest::new();
    let (mut socket, client) = guest.connect(4000);
    let data = pattern(socket.room());
    socket.send_all(&mut guest, &data);
    socket.send(&mut guest, op::RST, 0, &[]);
    guest.await_taken();
    assert!(read_to_end(&client) == data);
}

#[test]
fn a_guest_that_receives_no_more_stops_the_client_but_goes_on_sending() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    socket.send(&mut guest, op::SHUTDOWN, shutdown::RECEIVE, &[]);
    guest.await_taken();
    assert_eq!(client.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    socket.send_all(&mut guest, b"still here");
    socket.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    socket.expect(&mut guest, op::RST, 0);
    assert_eq!(read_to_end(&client), b"still here");
}

#[test]
fn a_client_that_receives_no_more_is_told_to_the_guest_but_goes_on_sending() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    client.shutdown(Shutdown::Read).unwrap();
    socket.send(&mut guest, op::RW, 0, b"anyone?");
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::RECEIVE);
    client.write_all(b"still here").unwrap();
    assert_eq!(socket.receive_bytes(&mut guest, 10), b"still here");
    client.shutdown(Shutdown::Write).unwrap();
    socket.expect(&mut guest, op::SHUTDOWN, shutdown::BOTH);
}

#[test]
fn data_behind_the_guests_own_end_resets_the_connection() {
    let mut guest = Guest::new();
    let (mut socket, mut client) = guest.accept(7);
    socket.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    socket.send(&mut guest, op::RW, 0, b"oops");
    socket.expect(&mut guest, op::RST, 0);
    let mut data = vec![];
    assert!(matches!(client.read_to_end(&mut data), Ok(0)));
}
