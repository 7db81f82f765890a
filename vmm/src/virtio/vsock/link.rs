//! A connection with the host's socket at its end: carries out what the state machine says.

use super::connection::{Connection, Incoming, Outgoing, State};
use super::handshake::ok_line;
use super::packet::{HEADER_LEN, Header, op};
use super::pieces::Pieces;
use super::socket::{self, HostSocket};
use crate::virtio::worker::Poller;
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vmm_sys_util::epoll::EventSet;

/// Most data in one packet for the guest, bytes.
const MAX_DATA: usize = 64 * 1024;

/// A connection with the host's socket at its end.
#[derive(Debug)]
pub struct Link {
    /// Its state machine.
    pub connection: Connection,
    /// `None` when the host is through with it.
    pub host: Option<HostSocket>,
    /// The host's socket may have data, or its end.
    pub readable: bool,
    /// Room to write is waited for.
    pub awaits_room: bool,
    /// When the guest must have answered.
    pub deadline: Option<Instant>,
}

/// What is waited for on a host's socket. A hang-up always is.
pub fn interest(room: bool) -> EventSet {
    let always = EventSet::IN | EventSet::EDGE_TRIGGERED;
    if room { always | EventSet::OUT } else { always }
}

impl Link {
    /// A connection and its socket, which is waited for already.
    pub fn new(connection: Connection, stream: UnixStream) -> Self {
        Self {
            connection,
            host: Some(HostSocket::new(stream)),
            // What came before the socket was waited for made no event.
            readable: true,
            awaits_room: false,
            deadline: None,
        }
    }

    /// Something happened on the host's socket.
    pub fn host_event(&mut self, events: EventSet) {
        self.readable = true;
        if events.contains(EventSet::HANG_UP) {
            if self.connection.state() == State::Requested {
                // The client did not wait for the guest's answer.
                self.reset();
            }
            self.host_gone();
        } else if events.contains(EventSet::OUT) {
            self.flush();
        }
    }

    /// Takes a packet of the guest.
    pub fn guest_packet(&mut self, header: &Header, data: &Pieces<'_>) {
        // 64 bits: no length is too long for an usize.
        let length = header.len as usize;
        if header.op == op::RW && length > data.len() {
            return self.reset();
        }
        match self.connection.receive(header) {
            Incoming::Nothing => {}
            Incoming::Accepted => self.tell_client(),
            Incoming::Deliver => self.deliver(data, length),
            Incoming::Shut { receive, send } => self.shut(receive, send),
            // The socket goes when it has taken what waits for it.
            Incoming::Finish => {}
            Incoming::Abort => self.host = None,
        }
    }

    /// Ends the connection for both sides now.
    pub fn reset(&mut self) {
        self.connection.reset();
        self.host = None;
    }

    fn tell_client(&mut self) {
        let line = ok_line(self.connection.ports().local);
        let told = match &self.host {
            Some(host) => socket::send_bytes(host.fd(), line.as_bytes()).ok(),
            None => None,
        };
        // An empty socket has room for the line, so it is taken whole if there is a client.
        if told != Some(line.len()) {
            self.reset();
        }
    }

    fn deliver(&mut self, data: &Pieces<'_>, length: usize) {
        let Some(host) = self.host.as_mut().filter(|_| self.connection.host_receives()) else {
            return self.connection.forwarded(length);
        };
        match host.deliver(data, length) {
            Ok(taken) => self.connection.forwarded(taken),
            Err(_) => {
                self.connection.forwarded(length);
                self.host_gone();
            }
        }
    }

    fn shut(&mut self, receive: bool, send: bool) {
        let Some(host) = &self.host else {
            return;
        };
        if receive {
            host.shutdown(Shutdown::Read);
        }
        if send && host.waiting() == 0 {
            host.shutdown(Shutdown::Write);
            self.connection.host_received_all();
        }
    }

    /// The host's program reads no more: what waits for it, and what comes, is thrown away.
    fn host_gone(&mut self) {
        if let Some(host) = &mut self.host {
            let thrown = host.discard();
            self.connection.forwarded(thrown);
        }
        self.connection.host_received_all();
    }

    fn flush(&mut self) {
        let Some(host) = &mut self.host else {
            return;
        };
        match host.flush() {
            Ok(taken) => {
                self.connection.forwarded(taken);
                if host.waiting() == 0 && self.connection.guest_sends_no_more() {
                    host.shutdown(Shutdown::Write);
                    self.connection.host_received_all();
                }
            }
            Err(_) => self.host_gone(),
        }
    }

    /// Puts the next packet for the guest into its buffers, as [`super::muxer::Muxer::fill`].
    pub fn fill(&mut self, guest_cid: u64, room: &Pieces<'_>, data_room: &Pieces<'_>) -> Option<usize> {
        loop {
            let (op, flags, length) = match self.connection.outgoing(self.readable)? {
                Outgoing::Control { op, flags } => (op, flags, 0),
                Outgoing::Data { .. } if data_room.is_empty() => return Some(0),
                Outgoing::Data { limit } => match self.read_host(data_room, limit as usize) {
                    Some(length) => (op::RW, 0, length),
                    None => continue,
                },
            };
            // Not above MAX_DATA.
            let header = self.connection.send(guest_cid, op, flags, length as u32);
            room.copy_from(&header.to_bytes());
            return Some(HEADER_LEN + length);
        }
    }

    /// Reads data of the host for the guest; `None` if there is none, now or for ever.
    fn read_host(&mut self, room: &Pieces<'_>, limit: usize) -> Option<usize> {
        let limit = limit.min(MAX_DATA);
        let host = self.host.as_ref();
        let received = host.map_or(Ok(0), |host| host.receive(room, limit));
        if let Ok(length @ 1..) = received {
            return Some(length);
        }
        self.readable = false;
        match received {
            Ok(_) => self.connection.host_sent_all(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => {
                self.connection.host_sent_all();
                self.host_gone();
            }
        }
        None
    }

    /// Waits for room to write if something waits for it, and no longer.
    pub fn await_room(&mut self, id: u64, poller: &Poller) {
        let Some(host) = &self.host else {
            return;
        };
        let wanted = host.waiting() > 0;
        if wanted == self.awaits_room {
            return;
        }
        self.awaits_room = wanted;
        if poller.modify(host.fd(), id, interest(wanted)).is_err() {
            self.reset();
        }
    }
}
