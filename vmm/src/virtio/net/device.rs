//! The device's thread: moves packets between the queues and the link.

use super::link::{HEADER, Link, LinkError, MAX_FRAME, Packet};
use super::{F_GUEST_CSUM, F_MRG_RXBUF, LinkStatus, NAME, QUEUE_SIZE, QUEUES, RX, TX};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{Handler, Poller, Severity, report};
use lighter_protocol::causes::chain;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use vmm_sys_util::epoll::EventSet;

/// Token of the link; those of the queues are their numbers.
const LINK: u64 = QUEUES as u64;

/// Where in a packet's header the number of buffers is.
const NUM_BUFFERS: usize = 10;

/// Most packets moved in one direction before the other events get their turn.
const BATCH: usize = QUEUE_SIZE as usize;

/// The link, with the queues and the memory of the driver that is active.
#[derive(Debug)]
pub(super) struct NetHandler {
    link: Link,
    status: LinkStatus,
    memory: GuestMemory,
    queues: [VirtQueue; QUEUES],
    interrupt: Interrupt,
    features: u64,
    /// The guest may have sent packets.
    tx_work: bool,
    /// There may be packets for the guest, and buffers for them.
    rx_work: bool,
    /// The other end takes no more for now.
    blocked: bool,
    /// A packet waits for the guest's buffers.
    starved: bool,
    /// What the poller waits for on the link.
    interest: EventSet,
}

impl NetHandler {
    pub(super) fn new(
        link: Link,
        status: LinkStatus,
        memory: GuestMemory,
        queues: [VirtQueue; QUEUES],
        interrupt: Interrupt,
        features: u64,
    ) -> Self {
        Self {
            link,
            status,
            memory,
            queues,
            interrupt,
            features,
            // Packets and buffers may have come before the thread did.
            tx_work: true,
            rx_work: true,
            blocked: false,
            starved: false,
            interest: EventSet::IN,
        }
    }

    /// Takes it apart again.
    pub(super) fn into_parts(self) -> (Link, [VirtQueue; QUEUES]) {
        (self.link, self.queues)
    }

    /// Takes packets of the guest; returns whether there were any.
    fn take_packets(&mut self) -> Result<bool, QueueError> {
        let mut used = false;
        let queue = &mut self.queues[TX];
        queue.disable_kicks(&self.memory)?;
        for _ in 0..BATCH {
            if !self.link.has_room() {
                return Ok(used);
            }
            let Some(chain) = queue.pop_or_listen(&self.memory)? else {
                self.tx_work = false;
                break;
            };
            let head = chain.head_index();
            send(&mut self.link, &self.memory, chain)?;
            queue.push_used(&self.memory, head, 0)?;
            used = true;
        }
        Ok(used)
    }

    /// Gives packets to the guest, as long as there are some and it has buffers; returns whether there were any.
    fn give_packets(&mut self) -> Result<bool, PassError> {
        let merge = self.features & F_MRG_RXBUF != 0;
        let unchecked = self.features & F_GUEST_CSUM != 0;
        let mut used = false;
        for _ in 0..BATCH {
            let Some(packet) = self.link.next_packet(unchecked)? else {
                self.rx_work = false;
                break;
            };
            match receive(&mut self.queues[RX], &self.memory, packet, merge)? {
                Received::Done => used = true,
                Received::NoBuffers => {
                    self.starved = true;
                    self.rx_work = false;
                    break;
                }
            }
            self.link.consume();
        }
        Ok(used)
    }

    fn work(&mut self, poller: &Poller) -> Result<(), QueueError> {
        let mut used = [false; QUEUES];
        if self.tx_work && !self.blocked {
            used[TX] = self.take_packets()?;
        }
        match self.link.flush() {
            Ok(all) => self.blocked = !all,
            Err(error) => self.lose(&error),
        }
        if self.rx_work {
            match self.give_packets() {
                Ok(any) => used[RX] = any,
                Err(PassError::Queue(error)) => return Err(error),
                Err(PassError::Link(error)) => self.lose(&error),
            }
        }
        for (queue, _) in self.queues.iter_mut().zip(used).filter(|(_, used)| *used) {
            queue.signal(&self.memory, &self.interrupt)?;
        }
        self.wait_for_link(poller);
        Ok(())
    }

    /// The guest goes on without a network: what it sends is thrown away, as by a cable that was pulled. Whoever put the cable in
    /// hears of it, and may put in another.
    fn lose(&mut self, error: &LinkError) {
        // Closed, it is waited for no more.
        self.link = Link::Unplugged;
        (self.blocked, self.rx_work, self.tx_work) = (false, false, true);
        self.status.set(false);
        self.interrupt.config_changed();
        report(Severity::Trouble, NAME, &chain(error));
    }

    /// Waits for what can be dealt with, and for nothing else.
    fn wait_for_link(&mut self, poller: &Poller) {
        let Some(fd) = self.link.fd() else { return };
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, !self.starved);
        interest.set(EventSet::OUT, self.blocked);
        if interest != self.interest {
            // Only the descriptor could be wrong, and it is the one that was added.
            let _ = poller.modify(fd, LINK, interest);
            self.interest = interest;
        }
    }
}

/// Why packets to the guest cannot be passed on.
#[derive(Debug, thiserror::Error)]
enum PassError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Adds a packet of the guest to the link. One that is no packet, or too long, is nobody's.
fn send(link: &mut Link, memory: &GuestMemory, packet: Chain) -> Result<(), QueueError> {
    let mut reader = packet.reader(memory).map_err(QueueError::Chain)?;
    let Some(length) = reader.available_bytes().checked_sub(HEADER) else {
        return Ok(());
    };
    if !(1..=MAX_FRAME).contains(&length) {
        return Ok(());
    }
    let mut header = [0; HEADER];
    // The chain was found to lie in memory; a packet that cannot be read all the same is none.
    if reader.read_exact(&mut header).is_ok() {
        let _ = link.add(header, length, |frame| reader.read_exact(frame));
    }
    Ok(())
}

/// What became of a packet for the guest.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    /// The driver has it, or its buffer back that was too small for it.
    Done,
    /// There is no room now.
    NoBuffers,
}

/// Writes a packet into as few of the driver's buffers as hold it: one, unless it agreed on more.
fn receive(
    queue: &mut VirtQueue,
    memory: &GuestMemory,
    packet: Packet<'_>,
    merge: bool,
) -> Result<Received, QueueError> {
    let Packet { mut header, frame } = packet;
    let needed = HEADER + frame.len();
    let mut buffers = vec![];
    let mut room = 0;
    while room < needed {
        let Some(chain) = queue.pop_or_listen(memory)? else {
            for _ in &buffers {
                queue.undo_pop();
            }
            return Ok(Received::NoBuffers);
        };
        let head = chain.head_index();
        let writer = chain.writer(memory).map_err(QueueError::Chain)?;
        room += writer.available_bytes();
        if !merge && room < needed {
            queue.push_used(memory, head, 0)?;
            return Ok(Received::Done);
        }
        buffers.push((head, writer));
    }
    // At most a ring's worth.
    header[NUM_BUFFERS..].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
    let mut used = vec![];
    let mut parts = [&header[..], frame];
    for (head, mut writer) in buffers {
        let mut written = 0;
        for part in &mut parts {
            let fits = part.len().min(writer.available_bytes());
            let (now, later) = part.split_at(fits);
            writer.write_all(now).map_err(|_| {
                // Checked when the writer was made.
                QueueError::Chain(virtio_queue::Error::InvalidChain)
            })?;
            *part = later;
            written += fits;
        }
        // At most a packet.
        used.push((head, written as u32));
    }
    queue.push_used_together(memory, &used)?;
    Ok(Received::Done)
}

impl Handler for NetHandler {
    type Error = QueueError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        for (number, queue) in (0..).zip(&self.queues) {
            poller.add(queue.kick().as_raw_fd(), number, EventSet::IN)?;
        }
        match self.link.fd() {
            Some(fd) => poller.add(fd, LINK, self.interest),
            None => Ok(()),
        }
    }

    fn start(&mut self, poller: &Poller) -> Result<(), QueueError> {
        self.work(poller)
    }

    fn handle(&mut self, token: u64, events: EventSet, _poller: &Poller) -> Result<(), QueueError> {
        match token {
            // This is told whatever is waited for, and reading finds out only when there are buffers to read into.
            LINK if self.starved && events.intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                self.lose(&LinkError::Ended);
            }
            LINK => {
                self.rx_work = true;
                // If it is for reading only, the next flush finds that out.
                self.blocked = false;
            }
            token if token == RX as u64 => {
                self.queues[RX].consume_kick();
                (self.rx_work, self.starved) = (true, false);
            }
            _ => {
                self.queues[TX].consume_kick();
                self.tx_work = true;
            }
        }
        Ok(())
    }

    fn after_batch(&mut self, poller: &Poller) -> Result<(), QueueError> {
        self.work(poller)
    }

    fn timeout_ms(&self) -> i32 {
        if (self.tx_work && !self.blocked) || self.rx_work {
            0
        } else {
            -1
        }
    }
}
