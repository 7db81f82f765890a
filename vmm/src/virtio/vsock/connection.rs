//! One connection as a state machine (section 5.10.6.4 and 5.10.6.5): what a packet of the guest or an event of the host's
//! socket means, and which packet the guest gets next. Nothing here touches a socket or guest memory.
//!
//! ```text
//!   REQUEST sent ── Requested ──RESPONSE──▶ Open ◀── REQUEST received, RESPONSE owed
//!                       │                    │
//!                       │ RST, time-out      ├─ guest SHUTDOWN(both), or it broke a rule ─▶ Resetting ─RST sent─▶ Over
//!                       ▼                    ├─ both directions ended ─▶ Closing (SHUTDOWN(both) sent) ─RST──────▶ Over
//!                  Resetting / Over          └─ guest RST ─────────────────────────────────────────────────────▶ Over
//! ```
//!
//! What a connection owes the guest is a set of flags, so that a guest which takes no packets cannot make it grow.

use super::credit::Credit;
use super::packet::{HOST_CID, Header, Ports, kind, op, shutdown};

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A client of the host waits for the guest's answer.
    Requested,
    /// Both sides have agreed. Each direction may have ended.
    Open,
    /// Both directions have ended by the host's doing. The guest has to confirm it (RST) before the ports are free.
    Closing,
    /// The guest gets a RST, after which the ports are free.
    Resetting,
    /// The guest has no part in it any more. What it has sent may still wait for the host's program.
    Over,
}

/// What to do about a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// Nothing more.
    Nothing,
    /// Tell the client that the connection is there.
    Accepted,
    /// Pass the packet's data to the host.
    Deliver,
    /// The guest will receive (`true`) or send no more: shut the host's socket likewise, behind what waits for it.
    Shut {
        /// The guest will receive no more.
        receive: bool,
        /// The guest will send no more.
        send: bool,
    },
    /// The guest is through. Close the host's socket once it has taken what waits for it.
    Finish,
    /// The guest broke a rule, or refused the connection. Close the host's socket.
    Abort,
}

/// A packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// A packet without data.
    Control {
        /// See [`op`].
        op: u16,
        /// See [`shutdown`].
        flags: u32,
    },
    /// Data from the host's socket.
    Data {
        /// The guest has room for so many bytes.
        limit: u32,
    },
}

/// A connection.
#[derive(Clone, Debug)]
pub struct Connection {
    ports: Ports,
    state: State,
    credit: Credit,
    /// What the guest has said with SHUTDOWN.
    guest_shut: u32,
    /// What we have said with SHUTDOWN.
    told_shut: u32,
    /// The host's program sends no more, and everything it sent is with the guest.
    host_sent_all: bool,
    /// The host's program receives no more, or nothing more will come for it.
    host_received_all: bool,
    /// A REQUEST or RESPONSE that the guest is to get first.
    owes_opening: Option<u16>,
    owes_credit: bool,
    /// The guest was asked for credit, and has none given since.
    asked_credit: bool,
}

impl Connection {
    /// A connection that a client of the host wants.
    pub fn requested(ports: Ports) -> Self {
        Self::new(ports, State::Requested, op::REQUEST)
    }

    /// A connection that the guest wants by `request`, and that the host has taken.
    pub fn accepted(request: &Header) -> Self {
        let mut connection = Self::new(request.ports(), State::Open, op::RESPONSE);
        connection.credit.learn(request);
        connection
    }

    fn new(ports: Ports, state: State, opening: u16) -> Self {
        Self {
            ports,
            state,
            credit: Credit::default(),
            guest_shut: 0,
            told_shut: 0,
            host_sent_all: false,
            host_received_all: false,
            owes_opening: Some(opening),
            owes_credit: false,
            asked_credit: false,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether data from the host may still go to the guest.
    pub fn wants_host_data(&self) -> bool {
        self.state == State::Open && !self.host_sent_all && self.guest_shut & shutdown::RECEIVE == 0
    }

    /// Whether data from the guest may still go to the host.
    pub fn host_receives(&self) -> bool {
        !self.host_received_all
    }

    /// Whether the guest will send no more.
    pub fn guest_sends_no_more(&self) -> bool {
        self.guest_shut & shutdown::SEND != 0
    }

    /// Takes a packet of the guest. The chain of a packet with data is known to hold them all.
    pub fn receive(&mut self, header: &Header) -> Incoming {
        if header.op == op::RST {
            return match self.state {
                State::Requested => self.end(State::Over, Incoming::Abort),
                _ => self.end(State::Over, Incoming::Finish),
            };
        }
        self.credit.learn(header);
        self.asked_credit &= self.credit.room() == 0;
        match (self.state, header.op) {
            // The RST that is on its way answers everything.
            (State::Resetting | State::Over, _) => Incoming::Nothing,
            (State::Requested, op::RESPONSE) if self.owes_opening.is_none() => {
                self.state = State::Open;
                self.close_if_ended();
                Incoming::Accepted
            }
            (State::Open, op::RW) if self.guest_sends_no_more() || !self.credit.receive(header.len) => {
                self.reset()
            }
            (State::Open, op::RW) if header.len == 0 => Incoming::Nothing,
            (State::Open, op::RW) => Incoming::Deliver,
            (State::Open, op::SHUTDOWN) => self.guest_shuts(header.flags & shutdown::BOTH),
            (State::Open, op::CREDIT_REQUEST) => {
                self.owes_credit = true;
                Incoming::Nothing
            }
            (State::Open, op::CREDIT_UPDATE) => Incoming::Nothing,
            // Sent before the guest saw our SHUTDOWN. Nobody takes it.
            (State::Closing, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST) => Incoming::Nothing,
            (State::Closing, op::SHUTDOWN) => self.guest_shuts(header.flags & shutdown::BOTH),
            _ => self.reset(),
        }
    }

    fn guest_shuts(&mut self, flags: u32) -> Incoming {
        let new = flags & !self.guest_shut;
        self.guest_shut |= flags;
        if self.guest_shut == shutdown::BOTH {
            // The clean end of a connection: the guest waits for a RST, and the ports are free then.
            return self.end(State::Resetting, Incoming::Finish);
        }
        self.close_if_ended();
        match new {
            0 => Incoming::Nothing,
            _ => Incoming::Shut {
                receive: new & shutdown::RECEIVE != 0,
                send: new & shutdown::SEND != 0,
            },
        }
    }

    /// Ends the connection with a RST for the guest.
    pub fn reset(&mut self) -> Incoming {
        self.end(State::Resetting, Incoming::Abort)
    }

    fn end(&mut self, state: State, what: Incoming) -> Incoming {
        self.state = state;
        what
    }

    /// The host has taken `bytes` of what the guest sent, or never will.
    pub fn forwarded(&mut self, bytes: usize) {
        // The backlog is bounded by the credit, so this is no more than its size.
        self.credit.forward(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// The host's program will send no more, and everything it sent is with the guest.
    pub fn host_sent_all(&mut self) {
        self.host_sent_all = true;
        self.close_if_ended();
    }

    /// The host's program will receive no more, or has received all that the guest sent before it ended its direction.
    pub fn host_received_all(&mut self) {
        self.host_received_all = true;
        self.close_if_ended();
    }

    fn close_if_ended(&mut self) {
        let to_guest_ended = self.host_sent_all || self.guest_shut & shutdown::RECEIVE != 0;
        if self.state == State::Open && to_guest_ended && self.host_received_all {
            self.state = State::Closing;
        }
    }

    /// The next packet for the guest. `readable` says that the host's socket may have data.
    pub fn outgoing(&self, readable: bool) -> Option<Outgoing> {
        let control = |op, flags| Some(Outgoing::Control { op, flags });
        match self.state {
            State::Resetting => return control(op::RST, 0),
            State::Over => return None,
            State::Requested | State::Open | State::Closing => {}
        }
        if let Some(opening) = self.owes_opening {
            return control(opening, 0);
        }
        if self.state == State::Requested {
            return None;
        }
        let reads = readable && self.wants_host_data();
        let limit = self.credit.room();
        // Data first: they carry credit with them, and have to come before the end that a SHUTDOWN says.
        if reads && limit > 0 {
            return Some(Outgoing::Data { limit });
        }
        let shut = self.shut();
        if shut & !self.told_shut != 0 {
            return control(op::SHUTDOWN, shut);
        }
        if self.state != State::Open {
            return None;
        }
        if self.owes_credit || self.credit.update_due() {
            return control(op::CREDIT_UPDATE, 0);
        }
        if reads && !self.asked_credit {
            return control(op::CREDIT_REQUEST, 0);
        }
        None
    }

    /// What the guest is to know of the host's ends.
    fn shut(&self) -> u32 {
        match self.state {
            State::Closing => shutdown::BOTH,
            _ if self.host_sent_all => shutdown::SEND,
            // Nothing to tell a guest that has said itself that it sends no more.
            _ if self.host_received_all && !self.guest_sends_no_more() => shutdown::RECEIVE,
            _ => 0,
        }
    }

    /// The header of a packet that the guest gets now.
    pub fn send(&mut self, guest_cid: u64, op: u16, flags: u32, len: u32) -> Header {
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.local,
            dst_port: self.ports.peer,
            len,
            kind: kind::STREAM,
            op,
            flags,
            ..Header::default()
        };
        self.credit.tell(&mut header);
        self.credit.send(len);
        self.owes_credit = false;
        match op {
            op::REQUEST | op::RESPONSE => self.owes_opening = None,
            op::SHUTDOWN => self.told_shut |= flags,
            op::CREDIT_REQUEST => self.asked_credit = true,
            op::RST => self.state = State::Over,
            _ => {}
        }
        header
    }
}

#[cfg(test)]
mod tests;
