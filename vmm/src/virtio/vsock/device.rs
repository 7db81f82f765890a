//! The device's thread: moves packets between the queues and the connections.

use super::muxer::{LISTENER, Muxer, SWEEP_INTERVAL};
use super::packet::{HEADER_LEN, Header};
use super::pieces::{Direction, Pieces};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{Chain, QueueError, VirtQueue};
use crate::virtio::worker::{Handler, Poller};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::time::Instant;
use vmm_sys_util::epoll::EventSet;

/// Queue with buffers for packets to the guest; its token too.
pub const RX: usize = 0;
/// Queue with packets from the guest; its token too.
pub const TX: usize = 1;
/// Queue with buffers for events, of which there is one: [`TRANSPORT_RESET`].
pub const EVENT: usize = 2;
/// Number of queues.
pub const QUEUES: usize = 3;
/// Largest size of each queue.
pub const QUEUE_SIZE: u16 = 256;

/// Token of the event queue; its number is the listener's.
const EVENT_TOKEN: u64 = 3;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section 5.10.6.7): all connections are over, and whoever listens goes on.
const TRANSPORT_RESET: u32 = 0;

/// Most chains taken from a queue before the other events get their turn.
const BATCH: usize = QUEUE_SIZE as usize;

/// Whether the driver has connections of a device that it was saved with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// It has not.
    None,
    /// It is to be told.
    Due,
    /// It was told, and has not given another buffer for events yet, as it does when it is through: it would take a new
    /// connection for one of the old. So many buffers it had given before.
    Told(u16),
}

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
    reset: Reset,
}

impl SocketHandler {
    /// Joins connections with the queues of a driver.
    pub fn new(
        mut muxer: Muxer,
        memory: GuestMemory,
        queues: [VirtQueue; QUEUES],
        interrupt: Interrupt,
    ) -> Self {
        let reset = match muxer.take_restored() {
            true => Reset::Due,
            false => Reset::None,
        };
        Self {
            reset,
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

    /// Tells the driver that its connections are over. One that has no buffer for that is told connection by connection.
    fn tell_reset(&mut self) -> Result<Reset, QueueError> {
        let queue = &mut self.queues[EVENT];
        let Some(chain) = queue.pop(&self.memory)? else {
            return Ok(Reset::None);
        };
        let head = chain.head_index();
        let mut writer = chain.writer(&self.memory).map_err(QueueError::Chain)?;
        let event = TRANSPORT_RESET.to_le_bytes();
        let written = match writer.write_all(&event) {
            Ok(()) => event.len() as u32,
            // No room for it.
            Err(_) => 0,
        };
        let given = queue.listen_for_more(&self.memory)?;
        queue.push_used(&self.memory, head, written)?;
        queue.signal(&self.memory, &self.interrupt)?;
        Ok(Reset::Told(given))
    }

    fn work(&mut self, poller: &Poller) -> Result<(), QueueError> {
        match self.reset {
            Reset::None => {}
            Reset::Due => self.reset = self.tell_reset()?,
            Reset::Told(given) => {
                if self.queues[EVENT].available(&self.memory)? != given {
                    self.reset = Reset::None;
                    self.rx_work = true;
                }
            }
        }
        if self.muxer.next_sweep().is_some_and(|due| due <= Instant::now()) {
            self.muxer.sweep(Instant::now(), poller);
        }
        let settled = self.reset == Reset::None;
        if settled && self.muxer.clients_wait() {
            self.muxer.accept(poller);
        }
        let mut used = [false; QUEUES];
        if self.tx_work {
            used[TX] = self.take_packets(poller)?;
        }
        if settled {
            used[RX] = self.give_packets(poller)?;
        }
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
        let event = self.queues[EVENT].kick().as_raw_fd();
        poller.add(event, EVENT_TOKEN, EventSet::IN)?;
        self.muxer.register(poller)
    }

    fn start(&mut self, poller: &Poller) -> Result<(), QueueError> {
        self.after_batch(poller)
    }

    fn handle(&mut self, token: u64, events: EventSet, poller: &Poller) -> Result<(), QueueError> {
        match token {
            LISTENER => self.muxer.listener_event(),
            EVENT_TOKEN => self.queues[EVENT].consume_kick(),
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
        let settled = self.reset == Reset::None;
        if self.tx_work || settled && (self.rx_work || self.muxer.clients_wait()) {
            return 0;
        }
        match self.muxer.next_sweep() {
            Some(_) => SWEEP_INTERVAL.as_millis() as i32,
            None => -1,
        }
    }
}
