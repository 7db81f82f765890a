//! The device's thread: moves packets between the queues and the connections.

use super::muxer::{LISTENER, Muxer, SWEEP_INTERVAL};
use super::packet::{HEADER_LEN, Header};
use super::pieces::{Direction, Pieces};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{Handler, Poller};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;
use vmm_sys_util::epoll::EventSet;

/// Queue with buffers for packets to the guest; its token too.
pub const RX: usize = 0;
/// Queue with packets from the guest; its token too.
pub const TX: usize = 1;
/// Number of queues. The third is for events, of which there are none.
pub const QUEUES: usize = 3;
/// Largest size of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// Most chains taken from a queue before the other events get their turn.
const BATCH: usize = QUEUE_SIZE as usize;

/// Connections, with the queues and the memory of the driver that is active.
#[derive(Debug)]
pub struct SocketHandler {
    muxer: Muxer,
    memory: GuestMemory,
    queues: [VirtQueue; QUEUES],
    interrupt: Interrupt,
    /// The guest may have sent packets.
    tx_work: bool,
    /// There may be packets for the guest, and buffers for them.
    rx_work: bool,
}

impl SocketHandler {
    /// Joins connections with the queues of a driver.
    pub fn new(muxer: Muxer, memory: GuestMemory, queues: [VirtQueue; QUEUES], interrupt: Interrupt) -> Self {
        Self {
            muxer,
            memory,
            queues,
            interrupt,
            // Packets and buffers may have come before the thread did.
            tx_work: true,
            rx_work: true,
        }
    }

    /// Takes them apart again.
    pub fn into_parts(self) -> (Muxer, [VirtQueue; QUEUES]) {
        (self.muxer, self.queues)
    }

    fn work(&mut self, poller: &Poller) -> Result<(), QueueError> {
        if self.muxer.next_sweep().is_some_and(|due| due <= Instant::now()) {
            self.muxer.sweep(Instant::now(), poller);
        }
        if self.muxer.clients_wait() {
            self.muxer.accept(poller);
        }
        let mut used = [false; QUEUES];
        if self.tx_work {
            used[TX] = self.take_packets(poller)?;
        }
        used[RX] = self.give_packets(poller)?;
        // One interrupt for all of a batch.
        for (queue, _) in self.queues.iter_mut().zip(used).filter(|(_, used)| *used) {
            queue.signal(&self.memory, &self.interrupt)?;
        }
        Ok(())
    }

    /// Takes packets of the guest; returns whether there were any.
    fn take_packets(&mut self, poller: &Poller) -> Result<bool, QueueError> {
        let queue = &mut self.queues[TX];
        let mut used = false;
        queue.disable_kicks(&self.memory)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop_or_listen(&self.memory)? else {
                self.tx_work = false;
                break;
            };
            let head = chain.head_index();
            // A packet without a whole header is no packet: there is nobody to answer.
            if let Some((header, data)) = packet(&self.memory, chain) {
                self.muxer.guest_packet(&header, &data, poller);
            }
            queue.push_used(&self.memory, head, 0)?;
            used = true;
        }
        Ok(used)
    }

    /// Gives packets to the guest, as long as there are some and it has buffers; returns whether there were any.
    fn give_packets(&mut self, poller: &Poller) -> Result<bool, QueueError> {
        let queue = &mut self.queues[RX];
        let mut used = false;
        self.rx_work = false;
        if !self.muxer.may_fill() {
            return Ok(false);
        }
        queue.disable_kicks(&self.memory)?;
        for _ in 0..BATCH {
            if !self.muxer.may_fill() {
                return Ok(used);
            }
            let Some(chain) = queue.pop_or_listen(&self.memory)? else {
                // The kick that comes with new buffers goes on from here.
                return Ok(used);
            };
            let head = chain.head_index();
            let written = match room(&self.memory, chain) {
                Some((header, data)) => self.muxer.fill(&header, &data, poller),
                None => Some(0),
            };
            let Some(written) = written else {
                queue.undo_pop();
                return Ok(used);
            };
            // At most a header and the largest data.
            queue.push_used(&self.memory, head, written as u32)?;
            used = true;
        }
        self.rx_work = true;
        Ok(used)
    }
}

/// A packet of the guest.
fn packet(memory: &GuestMemory, chain: Chain) -> Option<(Header, Pieces<'_>)> {
    let mut data = Pieces::new(memory, chain, Direction::FromGuest)?;
    let mut header = [0; HEADER_LEN];
    data.take_header()?.copy_to(0, &mut header);
    Some((Header::from_bytes(&header), data))
}

/// Room for a header and data.
fn room(memory: &GuestMemory, chain: Chain) -> Option<(Pieces<'_>, Pieces<'_>)> {
    let mut data = Pieces::new(memory, chain, Direction::ToGuest)?;
    let header = data.take_header()?;
    Some((header, data))
}

impl Handler for SocketHandler {
    type Error = QueueError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        for queue in [RX, TX] {
            let kick = self.queues[queue].kick().as_raw_fd();
            poller.add(kick, queue as u64, EventSet::IN)?;
        }
        self.muxer.register(poller)
    }

    fn start(&mut self, poller: &Poller) -> Result<(), QueueError> {
        self.after_batch(poller)
    }

    fn handle(&mut self, token: u64, events: EventSet, poller: &Poller) -> Result<(), QueueError> {
        match token {
            LISTENER => self.muxer.listener_event(),
            token if token == RX as u64 => self.queues[RX].consume_kick(),
            token if token == TX as u64 => {
                self.queues[TX].consume_kick();
                self.tx_work = true;
            }
            token => self.muxer.host_event(token, events, poller),
        }
        Ok(())
    }

    fn after_batch(&mut self, poller: &Poller) -> Result<(), QueueError> {
        // A dead device must not leave clients waiting for it.
        self.work(poller).inspect_err(|_| self.muxer.reset())
    }

    fn timeout_ms(&self) -> i32 {
        if self.tx_work || self.rx_work || self.muxer.clients_wait() {
            return 0;
        }
        match self.muxer.next_sweep() {
            Some(_) => SWEEP_INTERVAL.as_millis() as i32,
            None => -1,
        }
    }
}
