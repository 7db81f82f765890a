//! All connections of a guest, and the host's sockets at their ends.
//!
//! Every host socket is waited for *edge-triggered*: an event says "there may be more now", is noted in the link, and holds
//! until the socket says that it would block. So a socket that cannot be read now, for want of credit or of the guest's
//! buffers, costs nothing and needs no call to the kernel when that changes; a level-triggered wait would need one each
//! way, or spin on the hang-up of a socket that nobody reads. Only room to write is waited for on demand: a program that
//! reads would wake us at each of its reads otherwise.
//!
//! Bounds: [`MAX_CONNECTIONS`] connections, each with at most [`super::credit::BUFFER`] bytes that the host's program has
//! not read; [`MAX_HANDSHAKES`] clients that have not said what they want; [`MAX_REFUSALS`] RSTs that belong to no
//! connection.

use super::VsockState;
use super::connection::{Connection, State};
use super::handshake::{ConnectLine, MAX_LINE, Progress};
use super::link::{Link, interest};
use super::packet::{HEADER_LEN, HOST_CID, Header, Ports, kind, op};
use super::pieces::Pieces;
use super::socket;
use crate::virtio::worker::Poller;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;

/// Most connections at once, with those that are being opened or closed.
pub const MAX_CONNECTIONS: usize = 4096;

/// Most clients that have not sent their CONNECT line. One more, and the oldest is closed: a client that sends its line at
/// once always gets through, however many others hold a connection open and say nothing.
pub const MAX_HANDSHAKES: usize = 1024;

/// Most RSTs that wait for the guest to take them and belong to no connection. Those beyond are dropped: the guest then
/// finds out by its own time-out.
pub const MAX_REFUSALS: usize = 1024;

/// How long a client may take for its CONNECT line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the guest may take to answer a REQUEST.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the guest may take to confirm a SHUTDOWN of both directions, before it gets a RST.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often time-outs are looked at, if there are any.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The host's ports of connections that clients of the host want: 2^30 to 2^31, which nobody listens on.
pub const FIRST_LOCAL_PORT: u32 = 1 << 30;
const LAST_LOCAL_PORT: u32 = (1 << 31) - 1;

/// Most clients taken from the listener at once.
const ACCEPT_BATCH: usize = 64;

/// Tokens below are the device's own.
pub const FIRST_ID: u64 = 16;

/// Token of the listener.
pub const LISTENER: u64 = 2;

/// A client that has not said what it wants.
#[derive(Debug)]
struct Handshake {
    stream: UnixStream,
    line: ConnectLine,
    deadline: Instant,
}

/// The connections of a guest.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    listener: UnixListener,
    host_ports: HashMap<u32, UnixStream>,
    /// Handshakes and links share one sequence of ids, which are their tokens too and never used twice.
    next_id: u64,
    handshakes: BTreeMap<u64, Handshake>,
    links: HashMap<u64, Link>,
    by_ports: HashMap<Ports, u64>,
    next_local_port: u32,
    /// Links that may have a packet for the guest.
    ready: BTreeSet<u64>,
    /// The link that was last asked for one.
    last_served: u64,
    refusals: VecDeque<Header>,
    clients_wait: bool,
    /// The host has no descriptor for another client now.
    accept_later: bool,
    next_sweep: Option<Instant>,
}

impl Muxer {
    /// No connections yet. `listener` and the sockets of `host_ports` do not block.
    pub fn new(guest_cid: u64, listener: UnixListener, host_ports: HashMap<u32, UnixStream>) -> Self {
        Self {
            guest_cid,
            listener,
            host_ports,
            next_id: FIRST_ID,
            handshakes: BTreeMap::new(),
            links: HashMap::new(),
            by_ports: HashMap::new(),
            next_local_port: FIRST_LOCAL_PORT,
            ready: BTreeSet::new(),
            last_served: 0,
            refusals: VecDeque::new(),
            clients_wait: true,
            accept_later: false,
            next_sweep: None,
        }
    }

    /// Goes on where a saved muxer was: the guest is told that its connections are over.
    pub fn restore(&mut self, state: &VsockState) {
        if (FIRST_LOCAL_PORT..=LAST_LOCAL_PORT).contains(&state.next_local_port) {
            self.next_local_port = state.next_local_port;
        }
        let over = state.connections.iter().take(MAX_CONNECTIONS + MAX_REFUSALS);
        self.refusals = over
            .map(|&(local, peer)| lost(self.guest_cid, local, peer))
            .collect();
    }

    /// Closes everything but what other connections will come from.
    pub fn reset(&mut self) {
        self.handshakes.clear();
        self.links.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.refusals.clear();
    }

    /// The next local port, to be saved.
    pub fn next_local_port(&self) -> u32 {
        self.next_local_port
    }

    /// The ports of all connections the guest knows of, also of those that are over, if it is still to be told; sorted.
    pub fn ports(&self) -> Vec<Ports> {
        let over = self.refusals.iter().map(|header| Ports {
            local: header.src_port,
            peer: header.dst_port,
        });
        let mut ports: Vec<_> = self.by_ports.keys().copied().chain(over).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// How many connections there are, with those whose data still waits for the host's program.
    pub fn connections(&self) -> usize {
        self.links.len()
    }

    /// Waits for all sockets, on a poller that knows none of them.
    ///
    /// # Errors
    /// As epoll_ctl.
    pub fn register(&mut self, poller: &Poller) -> io::Result<()> {
        poller.add(
            self.listener.as_raw_fd(),
            LISTENER,
            EventSet::IN | EventSet::EDGE_TRIGGERED,
        )?;
        for (&id, handshake) in &self.handshakes {
            poller.add(handshake.stream.as_raw_fd(), id, interest(false))?;
        }
        for (&id, link) in &self.links {
            if let Some(host) = &link.host {
                poller.add(host.fd(), id, interest(link.awaits_room))?;
            }
        }
        Ok(())
    }

    /// Whether clients wait to be taken by [`Self::accept`].
    pub fn clients_wait(&self) -> bool {
        self.clients_wait && !self.accept_later
    }

    /// Notes that clients wait.
    pub fn listener_event(&mut self) {
        self.clients_wait = true;
    }

    /// Takes some of the clients that wait.
    pub fn accept(&mut self, poller: &Poller) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                Ok((stream, _)) => self.add_client(stream, poller),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    self.clients_wait = error.kind() != ErrorKind::WouldBlock;
                    // Out of descriptors or memory; the clients stay in the listener's queue until there are some.
                    self.accept_later = self.clients_wait;
                    self.sweep_soon();
                    return;
                }
            }
        }
    }

    fn add_client(&mut self, stream: UnixStream, poller: &Poller) {
        let id = self.new_id();
        if poller.add(stream.as_raw_fd(), id, interest(false)).is_err() {
            return;
        }
        if self.handshakes.len() >= MAX_HANDSHAKES {
            self.handshakes.pop_first();
        }
        let handshake = Handshake {
            stream,
            line: ConnectLine::default(),
            deadline: Instant::now() + HANDSHAKE_TIMEOUT,
        };
        self.handshakes.insert(id, handshake);
        self.sweep_soon();
        self.shake_hands(id);
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Reads a client's line as far as it has come.
    fn shake_hands(&mut self, id: u64) {
        let Some(handshake) = self.handshakes.get_mut(&id) else {
            return;
        };
        match read_line(handshake) {
            Ok(None) => {}
            Ok(Some(port)) => {
                if let Some(handshake) = self.handshakes.remove(&id) {
                    self.request(id, port, handshake.stream);
                }
            }
            Err(_) => {
                self.handshakes.remove(&id);
            }
        }
    }

    /// Asks the guest for a connection.
    fn request(&mut self, id: u64, port: u32, stream: UnixStream) {
        // Dropping the stream tells the client.
        if self.links.len() >= MAX_CONNECTIONS {
            return;
        }
        let ports = self.free_ports(port);
        let mut link = Link::new(Connection::requested(ports), stream);
        link.deadline = Some(Instant::now() + REQUEST_TIMEOUT);
        self.add_link(id, link);
        self.sweep_soon();
    }

    /// The next local port that has no connection with the guest's `peer` port. There are far fewer connections than ports.
    fn free_ports(&mut self, peer: u32) -> Ports {
        loop {
            let local = self.next_local_port;
            self.next_local_port = match local {
                LAST_LOCAL_PORT => FIRST_LOCAL_PORT,
                _ => local + 1,
            };
            let ports = Ports { local, peer };
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }

    fn add_link(&mut self, id: u64, link: Link) {
        self.by_ports.insert(link.connection.ports(), id);
        self.links.insert(id, link);
        self.ready.insert(id);
    }

    /// Something happened on a host's socket.
    pub fn host_event(&mut self, id: u64, events: EventSet, poller: &Poller) {
        let Some(link) = self.links.get_mut(&id) else {
            self.shake_hands(id);
            return;
        };
        link.host_event(events);
        self.settle(id, poller);
    }

    /// Takes a packet of the guest. `data` is what its chain has behind the header.
    pub fn guest_packet(&mut self, header: &Header, data: &Pieces<'_>, poller: &Poller) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let known = match header.kind {
            kind::STREAM => self.by_ports.get(&header.ports()).copied(),
            _ => return self.refuse(header),
        };
        match known {
            Some(id) => {
                if let Some(link) = self.links.get_mut(&id) {
                    link.guest_packet(header, data);
                }
                self.settle(id, poller);
            }
            None if header.op == op::REQUEST => self.guest_request(header, poller),
            None => self.refuse(header),
        }
    }

    /// The guest wants a connection with one of the host's ports.
    fn guest_request(&mut self, header: &Header, poller: &Poller) {
        let full = self.links.len() >= MAX_CONNECTIONS;
        let Some(connections) = self.host_ports.get(&header.dst_port).filter(|_| !full) else {
            return self.refuse(header);
        };
        // Whoever serves the port may be slow or gone; the guest sees that nobody listens.
        let Ok(stream) = socket::hand_over(connections) else {
            return self.refuse(header);
        };
        let id = self.new_id();
        if poller.add(stream.as_raw_fd(), id, interest(false)).is_err() {
            return self.refuse(header);
        }
        self.add_link(id, Link::new(Connection::accepted(header), stream));
    }

    fn refuse(&mut self, header: &Header) {
        // A RST answered by a RST would never end.
        if header.op != op::RST && self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(header.refusal());
        }
    }

    /// Whether [`Self::fill`] may have a packet.
    pub fn may_fill(&self) -> bool {
        !self.refusals.is_empty() || !self.ready.is_empty()
    }

    /// Puts the next packet for the guest into its buffers, those of a header and what is behind. Returns how many bytes
    /// that are, 0 if the buffers are too small for the packet, `None` if there is no packet.
    ///
    /// Connections take turns, one packet each.
    pub fn fill(&mut self, room: &Pieces<'_>, data_room: &Pieces<'_>, poller: &Poller) -> Option<usize> {
        if let Some(header) = self.refusals.pop_front() {
            room.copy_from(&header.to_bytes());
            return Some(HEADER_LEN);
        }
        while let Some(id) = self.next_ready() {
            let filled = match self.links.get_mut(&id) {
                Some(link) => link.fill(self.guest_cid, room, data_room),
                None => None,
            };
            self.settle(id, poller);
            if filled.is_some() {
                return filled;
            }
        }
        None
    }

    fn next_ready(&mut self) -> Option<u64> {
        let next = self.ready.range(self.last_served + 1..).next();
        let id = *next.or(self.ready.first())?;
        self.last_served = id;
        Some(id)
    }

    /// Draws the conclusions from whatever happened to a link.
    fn settle(&mut self, id: u64, poller: &Poller) {
        let Some(link) = self.links.get_mut(&id) else {
            self.ready.remove(&id);
            return;
        };
        link.await_room(id, poller);
        let state = link.connection.state();
        match state {
            State::Requested => {}
            State::Open => link.deadline = None,
            State::Closing => {
                link.host = None;
                if link.deadline.is_none() {
                    link.deadline = Some(Instant::now() + CLOSE_TIMEOUT);
                }
            }
            State::Resetting | State::Over => {
                link.deadline = None;
                link.host.take_if(|host| host.waiting() == 0);
            }
        }
        if link.connection.outgoing(link.readable).is_some() {
            self.ready.insert(id);
        } else {
            self.ready.remove(&id);
        }
        let timed = link.deadline.is_some();
        if state == State::Over {
            let through = link.host.is_none();
            let ports = link.connection.ports();
            // The guest may use the ports again while a program of the host still reads.
            if self.by_ports.get(&ports) == Some(&id) {
                self.by_ports.remove(&ports);
            }
            if through {
                self.links.remove(&id);
            }
        }
        if timed {
            self.sweep_soon();
        }
    }

    fn sweep_soon(&mut self) {
        self.next_sweep
            .get_or_insert_with(|| Instant::now() + SWEEP_INTERVAL);
    }

    /// When [`Self::sweep`] is due, if anything waits for a time.
    pub fn next_sweep(&self) -> Option<Instant> {
        self.next_sweep
    }

    /// Ends what has waited too long at the time `now`.
    pub fn sweep(&mut self, now: Instant, poller: &Poller) {
        self.accept_later = false;
        self.handshakes.retain(|_, handshake| now < handshake.deadline);
        let late = |link: &Link| link.deadline.is_some_and(|deadline| deadline <= now);
        let late: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, link)| late(link))
            .map(|(&id, _)| id)
            .collect();
        for id in late {
            if let Some(link) = self.links.get_mut(&id) {
                link.reset();
            }
            self.settle(id, poller);
        }
        let timed = !self.handshakes.is_empty() || self.links.values().any(|link| link.deadline.is_some());
        self.next_sweep = timed.then(|| now + SWEEP_INTERVAL);
    }
}

/// The end of a connection that is not there any more.
fn lost(guest_cid: u64, local: u32, peer: u32) -> Header {
    let last = Header {
        src_cid: guest_cid,
        dst_cid: HOST_CID,
        src_port: peer,
        dst_port: local,
        kind: kind::STREAM,
        ..Header::default()
    };
    last.refusal()
}

/// Reads a client's line up to its end, and not a byte behind it.
fn read_line(handshake: &mut Handshake) -> io::Result<Option<u32>> {
    let mut bytes = [0; MAX_LINE];
    loop {
        let missing = handshake.line.missing();
        let seen = match socket::peek(&handshake.stream, &mut bytes[..missing]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            seen => seen?,
        };
        let progress = handshake.line.push(&bytes[..seen]).map_err(io::Error::other)?;
        let (taken, port) = match progress {
            Progress::Partial => (seen, None),
            Progress::Complete { port, taken } => (taken, Some(port)),
        };
        if socket::take(&handshake.stream, &mut bytes[..taken])? != taken {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        if port.is_some() {
            return Ok(port);
        }
    }
}

#[cfg(test)]
mod tests;
