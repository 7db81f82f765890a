//! Time-outs and ports, with a clock of our own.

use super::*;
use crate::virtio::vsock::connection::Outgoing;
use crate::virtio::vsock::packet::shutdown;
use std::io::Read;

struct Fixture {
    muxer: Muxer,
    poller: Poller,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("muxer")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            muxer: Muxer::new(3, listener, HashMap::new()),
            poller: Poller::new().unwrap(),
            folder,
        }
    }

    fn client(&mut self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.folder.path().join("muxer")).unwrap();
        io::Write::write_all(&mut client, line.as_bytes()).unwrap();
        self.muxer.accept(&self.poller);
        client
    }

    fn sweep_in(&mut self, time: Duration) {
        self.muxer.sweep(Instant::now() + time, &self.poller);
    }

    /// Sends the packets that are owed, with no room for data.
    fn send_all(&mut self) -> Vec<u16> {
        let ready: Vec<u64> = self.muxer.ready.iter().copied().collect();
        let mut sent = vec![];
        for id in ready {
            let connection = &mut self.muxer.links.get_mut(&id).unwrap().connection;
            let Some(Outgoing::Control { op, flags }) = connection.outgoing(false) else {
                continue;
            };
            connection.send(3, op, flags, 0);
            sent.push(op);
            self.muxer.settle(id, &self.poller);
        }
        sent
    }

    fn guest_says(&mut self, header: Header) {
        let ports = self.muxer.ports()[0];
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: ports.peer,
            dst_port: ports.local,
            kind: kind::STREAM,
            ..header
        };
        self.muxer.guest_packet(&header, &Pieces::none(), &self.poller);
    }
}

fn is_closed(mut client: &UnixStream) -> bool {
    client.set_nonblocking(true).unwrap();
    matches!(client.read(&mut [0; 64]), Ok(0))
}

#[test]
fn a_client_without_a_line_is_closed_in_time() {
    let mut fixture = Fixture::new();
    let client = fixture.client("CONN");
    fixture.sweep_in(HANDSHAKE_TIMEOUT / 2);
    assert_eq!(fixture.muxer.handshakes.len(), 1);
    fixture.sweep_in(HANDSHAKE_TIMEOUT * 2);
    assert!(is_closed(&client));
    assert_eq!(fixture.muxer.next_sweep(), None);
}

#[test]
fn a_request_without_an_answer_is_taken_back_in_time() {
    let mut fixture = Fixture::new();
    let client = fixture.client("CONNECT 1\n");
    assert_eq!(fixture.send_all(), [op::REQUEST]);
    fixture.sweep_in(REQUEST_TIMEOUT / 2);
    assert!(!is_closed(&client));
    fixture.sweep_in(REQUEST_TIMEOUT * 2);
    assert!(is_closed(&client));
    assert_eq!(fixture.send_all(), [op::RST]);
    assert_eq!(fixture.muxer.connections(), 0);
    assert_eq!(fixture.muxer.ports(), []);
}

#[test]
fn a_close_that_the_guest_does_not_confirm_is_enforced_in_time() {
    let mut fixture = Fixture::new();
    let client = fixture.client("CONNECT 1\n");
    fixture.send_all();
    fixture.guest_says(Header {
        op: op::RESPONSE,
        ..Header::default()
    });
    fixture.sweep_in(REQUEST_TIMEOUT * 2);
    assert_eq!(
        fixture.muxer.connections(),
        1,
        "an open connection has no time-out"
    );
    fixture.guest_says(Header {
        op: op::SHUTDOWN,
        flags: shutdown::RECEIVE,
        ..Header::default()
    });
    drop(client);
    fixture
        .muxer
        .host_event(FIRST_ID, EventSet::HANG_UP, &fixture.poller);
    assert_eq!(fixture.send_all(), [op::SHUTDOWN]);
    fixture.sweep_in(CLOSE_TIMEOUT / 2);
    assert!(fixture.send_all().is_empty());
    fixture.sweep_in(CLOSE_TIMEOUT * 2);
    assert_eq!(fixture.send_all(), [op::RST]);
    assert_eq!(fixture.muxer.connections(), 0);
}

#[test]
fn local_ports_go_round_and_skip_those_in_use() {
    let mut fixture = Fixture::new();
    let _first = fixture.client("CONNECT 7\n");
    fixture.muxer.next_local_port = LAST_LOCAL_PORT;
    let _last = fixture.client("CONNECT 7\n");
    let _second = fixture.client("CONNECT 7\n");
    // Another port of the guest: the pair is free.
    fixture.muxer.next_local_port = FIRST_LOCAL_PORT;
    let _other = fixture.client("CONNECT 8\n");
    let ports = |local, peer| Ports { local, peer };
    assert_eq!(
        fixture.muxer.ports(),
        [
            ports(FIRST_LOCAL_PORT, 7),
            ports(FIRST_LOCAL_PORT, 8),
            ports(FIRST_LOCAL_PORT + 1, 7),
            ports(LAST_LOCAL_PORT, 7),
        ]
    );
}
