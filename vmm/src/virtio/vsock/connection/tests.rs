//! The state machine, one packet at a time and in any order.

use super::*;
use proptest::prelude::*;

const PORTS: Ports = Ports { local: 1, peer: 2 };

fn packet(op: u16) -> Header {
    Header {
        op,
        buf_alloc: 1000,
        kind: kind::STREAM,
        ..Header::default()
    }
}

fn shut(flags: u32) -> Header {
    Header {
        flags,
        ..packet(op::SHUTDOWN)
    }
}

fn control(op: u16) -> Option<Outgoing> {
    Some(Outgoing::Control { op, flags: 0 })
}

fn shutdown_packet(flags: u32) -> Option<Outgoing> {
    Some(Outgoing::Control {
        op: op::SHUTDOWN,
        flags,
    })
}

/// Sends what is owed without data, until there is nothing more.
fn send_all(connection: &mut Connection) {
    while let Some(Outgoing::Control { op, flags }) = connection.outgoing(false) {
        connection.send(3, op, flags, 0);
    }
}

fn open() -> Connection {
    let mut connection = Connection::accepted(&packet(op::REQUEST));
    send_all(&mut connection);
    connection
}

#[test]
fn a_request_is_answered_before_anything_else() {
    let mut connection = Connection::requested(PORTS);
    assert_eq!(connection.outgoing(true), control(op::REQUEST));
    let header = connection.send(3, op::REQUEST, 0, 0);
    assert_eq!((header.src_port, header.dst_port), (1, 2));
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, 3));
    assert_eq!(connection.outgoing(true), None);
    assert_eq!(connection.receive(&packet(op::RESPONSE)), Incoming::Accepted);
    assert_eq!(connection.outgoing(true), Some(Outgoing::Data { limit: 1000 }));
    assert_eq!(connection.outgoing(false), None);
}

#[test]
fn ends_before_the_guest_has_answered_are_said_after_it() {
    let mut connection = Connection::requested(PORTS);
    send_all(&mut connection);
    connection.host_received_all();
    connection.host_sent_all();
    assert_eq!(connection.outgoing(true), None);
    assert_eq!(connection.receive(&packet(op::RESPONSE)), Incoming::Accepted);
    assert_eq!(connection.outgoing(true), shutdown_packet(shutdown::BOTH));
}

#[test]
fn an_answer_to_a_request_that_was_not_sent_is_an_offence() {
    let mut connection = Connection::requested(PORTS);
    assert_eq!(connection.receive(&packet(op::RESPONSE)), Incoming::Abort);
    assert_eq!(connection.outgoing(true), control(op::RST));
}

#[test]
fn a_refused_request_is_over_without_an_answer() {
    let mut connection = Connection::requested(PORTS);
    send_all(&mut connection);
    assert_eq!(connection.receive(&packet(op::RST)), Incoming::Abort);
    assert_eq!(connection.state(), State::Over);
    assert_eq!(connection.outgoing(true), None);
}

#[test]
fn operations_out_of_place_reset() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let mut connection = open();
        assert_eq!(connection.receive(&packet(op)), Incoming::Abort);
        assert_eq!(connection.state(), State::Resetting);
        connection.send(3, op::RST, 0, 0);
        assert_eq!(connection.state(), State::Over);
    }
    for op in [op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
        let mut connection = Connection::requested(PORTS);
        send_all(&mut connection);
        assert_eq!(connection.receive(&packet(op)), Incoming::Abort);
    }
}

#[test]
fn the_end_of_the_hosts_direction_is_not_the_end_of_the_guests() {
    let mut connection = open();
    connection.host_sent_all();
    assert_eq!(connection.outgoing(false), shutdown_packet(shutdown::SEND));
    send_all(&mut connection);
    let data = Header {
        len: 5,
        ..packet(op::RW)
    };
    assert_eq!(connection.receive(&data), Incoming::Deliver);
    assert_eq!(connection.state(), State::Open);
    let end = Incoming::Shut {
        receive: false,
        send: true,
    };
    assert_eq!(connection.receive(&shut(shutdown::SEND)), end);
    assert_eq!(
        connection.state(),
        State::Open,
        "data may still wait for the host"
    );
    connection.host_received_all();
    assert_eq!(connection.state(), State::Closing);
    assert_eq!(connection.outgoing(false), shutdown_packet(shutdown::BOTH));
    send_all(&mut connection);
    assert_eq!(connection.receive(&packet(op::RST)), Incoming::Finish);
    assert_eq!(connection.state(), State::Over);
}

#[test]
fn the_end_of_the_guests_direction_is_not_the_end_of_the_hosts() {
    let mut connection = open();
    connection.receive(&shut(shutdown::SEND));
    connection.host_received_all();
    assert_eq!(connection.outgoing(true), Some(Outgoing::Data { limit: 1000 }));
    assert_eq!(connection.outgoing(false), None);
    connection.host_sent_all();
    assert_eq!(connection.outgoing(false), shutdown_packet(shutdown::BOTH));
}

#[test]
fn what_the_guest_has_shut_stays_shut() {
    let mut connection = open();
    connection.receive(&shut(shutdown::RECEIVE));
    assert!(!connection.wants_host_data());
    assert_eq!(connection.receive(&shut(0)), Incoming::Nothing);
    assert_eq!(connection.receive(&shut(shutdown::RECEIVE)), Incoming::Nothing);
    assert_eq!(connection.receive(&shut(shutdown::SEND)), Incoming::Finish);
    assert_eq!(connection.outgoing(true), control(op::RST));
}

#[test]
fn a_guest_that_receives_no_more_and_a_host_that_does_neither_are_through() {
    for guest_first in [true, false] {
        let mut connection = open();
        if !guest_first {
            connection.host_received_all();
        }
        connection.receive(&shut(shutdown::RECEIVE));
        if guest_first {
            connection.host_received_all();
        }
        assert_eq!(connection.outgoing(true), shutdown_packet(shutdown::BOTH));
    }
}

#[test]
fn credit_is_asked_for_once_and_given_when_asked() {
    let mut connection = open();
    connection.send(3, op::RW, 0, 1000);
    assert_eq!(connection.outgoing(true), control(op::CREDIT_REQUEST));
    connection.send(3, op::CREDIT_REQUEST, 0, 0);
    assert_eq!(connection.outgoing(true), None);
    connection.receive(&packet(op::CREDIT_UPDATE));
    assert_eq!(connection.outgoing(true), None, "that was no news");
    let news = Header {
        fwd_cnt: 1,
        ..packet(op::CREDIT_UPDATE)
    };
    connection.receive(&news);
    assert_eq!(connection.outgoing(true), Some(Outgoing::Data { limit: 1 }));
    connection.send(3, op::RW, 0, 1);
    assert_eq!(connection.outgoing(true), control(op::CREDIT_REQUEST));

    connection.receive(&packet(op::CREDIT_REQUEST));
    assert_eq!(connection.outgoing(false), control(op::CREDIT_UPDATE));
}

#[derive(Clone, Debug)]
enum Step {
    Guest(Header),
    HostSentAll,
    HostReceivedAll,
    Take { readable: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let header = (0u16..9, 0u32..5, 0u32..3000, 0u32..3000, 0u32..3000);
    prop_oneof![
        6 => header.prop_map(|(op, flags, len, buf_alloc, fwd_cnt)| Step::Guest(Header {
            op, flags, len, buf_alloc, fwd_cnt, ..Header::default()
        })),
        1 => Just(Step::HostSentAll),
        1 => Just(Step::HostReceivedAll),
        6 => any::<bool>().prop_map(|readable| Step::Take { readable }),
    ]
}

proptest! {
    /// Whatever comes in whatever order: no data goes to the guest after the end was said, what was said is never
    /// taken back, and a connection that is over stays over.
    #[test]
    fn ends_are_final(requested: bool, steps in prop::collection::vec(step(), 0..60)) {
        let mut connection = if requested { Connection::requested(PORTS) } else { open() };
        let mut said = 0;
        let mut over = false;
        for step in steps {
            match step {
                Step::Guest(header) => {
                    connection.receive(&header);
                }
                Step::HostSentAll => connection.host_sent_all(),
                Step::HostReceivedAll => connection.host_received_all(),
                Step::Take { readable } => match connection.outgoing(readable) {
                    Some(Outgoing::Control { op, flags }) => {
                        if op == op::SHUTDOWN {
                            prop_assert_eq!(flags & said, said);
                            prop_assert_ne!(flags, said);
                            said = flags;
                        }
                        connection.send(3, op, flags, 0);
                    }
                    Some(Outgoing::Data { limit }) => {
                        prop_assert_eq!(said & shutdown::SEND, 0);
                        prop_assert!(limit > 0);
                        connection.send(3, op::RW, 0, limit);
                    }
                    None => {}
                },
            }
            over |= connection.state() == State::Over;
            prop_assert!(!over || connection.state() == State::Over);
            prop_assert!(!over || connection.outgoing(true).is_none());
        }
    }

    /// Taking packets comes to an end when nothing new happens.
    #[test]
    fn what_is_owed_is_finite(steps in prop::collection::vec(step(), 0..60)) {
        let mut connection = open();
        for step in steps {
            if let Step::Guest(header) = step {
                connection.receive(&header);
            }
        }
        let mut packets = 0;
        while let Some(Outgoing::Control { op, flags }) = connection.outgoing(false) {
            connection.send(3, op, flags, 0);
            packets += 1;
            prop_assert!(packets <= 3);
        }
    }
}
