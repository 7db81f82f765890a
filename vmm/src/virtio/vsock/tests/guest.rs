//! A guest's driver of the socket device.

use super::guest_socket::Socket;
use super::host::{Host, read_ok};
use crate::virtio::VirtioDevice;
use crate::virtio::queue::VirtQueue;
use crate::virtio::testing::{Buffer, DriverQueue, Guest as Machine, Layout, Used};
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::device::{QUEUE_SIZE, QUEUES};
use crate::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Ports, op};
use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

pub const CID: u64 = 3;
/// A port of the host that is served.
pub const SERVED: u32 = 1024;
/// Nothing here takes that long; a wait that does has failed.
pub const PATIENCE: Duration = Duration::from_secs(120);

const RX_BUFFER: usize = 4096;
/// Each receive buffer is cut in two inside the header, so that both header and data lie in pieces.
const RX_CUT: usize = 20;
const RX_BUFFERS: u16 = QUEUE_SIZE / 2;
const TX_BUFFER: usize = 0x1_1000;
/// A packet lies in at most four descriptors.
const TX_BUFFERS: u16 = QUEUE_SIZE / 4;

/// A packet that the guest got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub header: Header,
    pub data: Vec<u8>,
}

/// A guest with its device.
pub struct Guest {
    pub machine: Machine,
    pub device: Vsock,
    pub host: Host,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    events: DriverQueue,
    /// Which buffer a chain is.
    rx_buffers: HashMap<u16, GuestAddress>,
    tx_buffers: HashMap<u16, GuestAddress>,
    /// Receive buffers are given back at once.
    pub refills: bool,
    /// Receive buffers that the device does not have.
    empty: Vec<GuestAddress>,
    free_tx: Vec<GuestAddress>,
    /// Packets that came while another was waited for.
    inbox: VecDeque<Packet>,
    /// Queues that came back for a pause.
    paused: Vec<VirtQueue>,
}

impl Guest {
    /// A guest whose driver is ready, with all receive buffers offered.
    pub fn new() -> Self {
        let mut guest = Self::without_buffers();
        guest.refill();
        guest
    }

    /// A guest whose driver is ready but has offered no receive buffers.
    pub fn without_buffers() -> Self {
        let mut machine = Machine::new(64);
        let (host, config) = Host::new();
        let mut queue = || DriverQueue::new(&mut machine, QUEUE_SIZE, true);
        let (rx, tx, events) = (queue(), queue(), queue());
        let empty = (0..RX_BUFFERS).map(|_| machine.allocate(RX_BUFFER)).collect();
        let free_tx = (0..TX_BUFFERS).map(|_| machine.allocate(TX_BUFFER)).collect();
        let mut guest = Self {
            machine,
            device: Vsock::new(config).unwrap(),
            host,
            rx,
            tx,
            events,
            rx_buffers: HashMap::new(),
            tx_buffers: HashMap::new(),
            refills: true,
            empty,
            free_tx,
            inbox: VecDeque::new(),
            paused: vec![],
        };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let queues = [&self.rx, &self.tx, &self.events];
        let activation = self.machine.activation(&queues, 0);
        self.device.activate(activation).unwrap();
    }

    /// What a driver does after it has reset the device: new rings, all buffers offered.
    pub fn start_again(&mut self) {
        let mut queue = || DriverQueue::new(&mut self.machine, QUEUE_SIZE, true);
        (self.rx, self.tx, self.events) = (queue(), queue(), queue());
        self.empty
            .extend(self.rx_buffers.drain().map(|(_, buffer)| buffer));
        self.free_tx
            .extend(self.tx_buffers.drain().map(|(_, buffer)| buffer));
        self.inbox.clear();
        self.activate();
        self.refill();
    }

    pub fn pause(&mut self) {
        self.paused = self.device.deactivate();
        assert_eq!(self.paused.len(), QUEUES);
    }

    pub fn resume(&mut self) {
        let queues = std::mem::take(&mut self.paused);
        let activation = self.machine.activation_with(queues, 0);
        self.device.activate(activation).unwrap();
    }

    /// Goes on with another device, made from what this paused one saves; returns this one with its host.
    pub fn move_to_new_device(&mut self) -> (Vsock, Host) {
        let (host, config) = Host::new();
        let mut device = Vsock::new(config).unwrap();
        device
            .restore(&self.device.save(&self.machine.thread).unwrap())
            .unwrap();
        (
            std::mem::replace(&mut self.device, device),
            std::mem::replace(&mut self.host, host),
        )
    }

    /// Offers all receive buffers that the device does not have.
    pub fn refill(&mut self) {
        self.refill_some(usize::MAX);
    }

    /// Offers `count` of the receive buffers that the device does not have.
    pub fn refill_some(&mut self, count: usize) {
        let rest = self.empty.split_off(count.min(self.empty.len()));
        for buffer in std::mem::replace(&mut self.empty, rest) {
            self.offer(buffer);
        }
    }

    fn offer(&mut self, buffer: GuestAddress) {
        let pieces = [
            Buffer::writable(buffer, RX_CUT),
            Buffer::writable(GuestAddress(buffer.0 + RX_CUT as u64), RX_BUFFER - RX_CUT),
        ];
        let head = self.rx.add(&pieces, Layout::Direct);
        self.rx_buffers.insert(head, buffer);
        self.rx.kick();
    }

    pub fn wait_for_interrupt(&self) {
        let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
        assert!(self.machine.interrupted_within(patience), "the device is silent");
    }

    /// Moves what the device has used into the inbox and the free buffers; false if that was nothing.
    fn look(&mut self) -> bool {
        let mut any = false;
        while let Some(used) = self.tx.next_used_or_interrupt() {
            any = true;
            assert_eq!(used.length, 0);
            self.free_tx.extend(self.tx_buffers.remove(&used.head));
        }
        while let Some(used) = self.rx.next_used_or_interrupt() {
            any = true;
            self.take(used);
        }
        any
    }

    fn take(&mut self, used: Used) {
        let Some(buffer) = self.rx_buffers.remove(&used.head) else {
            return;
        };
        if used.length > 0 {
            let mut bytes = vec![0; used.length as usize];
            self.machine.memory.read_slice(&mut bytes, buffer).unwrap();
            let data = bytes.split_off(HEADER_LEN);
            let header = Header::from_bytes(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
            self.inbox.push_back(Packet { header, data });
        }
        if self.refills {
            self.offer(buffer);
        } else {
            self.empty.push(buffer);
        }
    }

    /// The next packet of all.
    pub fn receive(&mut self) -> Packet {
        self.receive_if(|_| true)
    }

    /// The next packet of a connection; those of others are kept.
    pub fn receive_of(&mut self, ports: Ports) -> Packet {
        self.receive_if(|header| (header.src_port, header.dst_port) == (ports.local, ports.peer))
    }

    fn receive_if(&mut self, wanted: impl Fn(&Header) -> bool) -> Packet {
        loop {
            if let Some(at) = self.inbox.iter().position(|packet| wanted(&packet.header)) {
                return self.inbox.remove(at).unwrap();
            }
            if !self.look() {
                self.wait_for_interrupt();
            }
        }
    }

    /// The packets that have come, without waiting.
    pub fn received(&mut self) -> Vec<Packet> {
        while self.look() {}
        self.inbox.drain(..).collect()
    }

    /// Waits until the device has taken all packets.
    pub fn await_taken(&mut self) {
        while self.tx.in_flight() > 0 {
            if !self.look() {
                self.wait_for_interrupt();
            }
        }
    }

    /// Sends a packet with its header cut in two and its data in up to three pieces, in descriptors of the ring or in an
    /// indirect table by turns. The header is sent as it is.
    pub fn send(&mut self, header: &Header, data: &[u8]) {
        while self.free_tx.is_empty() {
            if !self.look() {
                self.wait_for_interrupt();
            }
        }
        let buffer = self.free_tx.pop().unwrap();
        let bytes = [&header.to_bytes()[..], data].concat();
        self.machine.memory.write_slice(&bytes, buffer).unwrap();
        let third = data.len() / 3;
        let ends = [
            HEADER_LEN - 7,
            HEADER_LEN + third,
            bytes.len() - third,
            bytes.len(),
        ];
        let mut start = 0;
        let mut pieces = vec![];
        for end in ends.into_iter().filter(|_| third > 0).chain([bytes.len()]) {
            if end > start {
                pieces.push(Buffer::readable(
                    GuestAddress(buffer.0 + start as u64),
                    end - start,
                ));
            }
            start = end;
        }
        let layout = match data.len() % 2 {
            0 => Layout::Direct,
            _ => Layout::Indirect,
        };
        let head = self.tx.add(&pieces, layout);
        self.tx_buffers.insert(head, buffer);
        self.tx.kick();
    }

    /// A connection of the guest with [`SERVED`].
    pub fn connect(&mut self, port: u32) -> (Socket, UnixStream) {
        let mut socket = Socket::new(Ports {
            local: SERVED,
            peer: port,
        });
        socket.send(self, op::REQUEST, 0, &[]);
        let response = socket.receive(self);
        assert_eq!(response.header.op, op::RESPONSE);
        (socket, self.host.accept())
    }

    /// A connection of a client of the host, accepted by the guest.
    pub fn accept(&mut self, port: u32) -> (Socket, UnixStream) {
        let client = self.host.connect(port, "");
        let request = self.receive();
        let socket = self.answer(&request);
        assert_eq!(read_ok(&client), request.header.src_port);
        (socket, client)
    }

    /// Accepts a REQUEST.
    pub fn answer(&mut self, request: &Packet) -> Socket {
        assert_eq!(request.header.op, op::REQUEST);
        let mut socket = Socket::new(Ports {
            local: request.header.src_port,
            peer: request.header.dst_port,
        });
        socket.learn(&request.header);
        socket.send(self, op::RESPONSE, 0, &[]);
        socket
    }
}
