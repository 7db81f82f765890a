//! Credit: how much each side may send (section 5.10.6.3).
//!
//! Each side tells in every packet how large its receive buffer is (`buf_alloc`) and how many bytes have left it so far
//! (`fwd_cnt`). The other may have at most `buf_alloc` bytes under way that were not counted so. All counters are
//! modulo 2^32; only differences mean anything.
//!
//! Our receive buffer for a connection is its backlog: what the guest sent and the host's program does not take yet.

use super::packet::Header;

/// Our receive buffer for each connection, bytes. It takes memory only while the host's program does not read.
pub const BUFFER: u32 = 256 * 1024;

/// The guest is told that bytes have left our buffer when that many have since it was last told. It then still has as much
/// to send meanwhile, so that a stream does not stop for it.
const UPDATE_AFTER: u32 = BUFFER / 2;

/// The credit of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Size of the guest's buffer, as it last said.
    guest_buffer: u32,
    /// Bytes that have left the guest's buffer, as it last said.
    guest_forwarded: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Bytes received from the guest.
    received: u32,
    /// Bytes of those that the host has taken.
    forwarded: u32,
    /// What of `forwarded` the guest was told.
    told: u32,
}

impl Credit {
    /// Learns from a packet of the guest.
    pub fn learn(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// How many bytes the guest has room for.
    pub fn room(&self) -> u32 {
        // A guest may shrink its buffer below what is under way, or lie: it then gets nothing until it has room again.
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// Counts bytes sent to the guest, at most [`Self::room`].
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Counts bytes received from the guest; false if it was not allowed to send so many.
    #[must_use]
    pub fn receive(&mut self, bytes: u32) -> bool {
        let under_way = self.received.wrapping_sub(self.told);
        let allowed = bytes <= BUFFER.saturating_sub(under_way);
        if allowed {
            self.received = self.received.wrapping_add(bytes);
        }
        allowed
    }

    /// Counts bytes that the host has taken, or that nobody will ever take.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Whether the guest should hear of the room it has before a packet happens to tell it.
    pub fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= UPDATE_AFTER
    }

    /// Writes our credit into a header that the guest will get.
    pub fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn says(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    /// A connection that has carried nearly 4 GiB each way.
    fn old() -> Credit {
        let near_the_end = u32::MAX - 10;
        Credit {
            guest_buffer: 100,
            guest_forwarded: near_the_end,
            sent: near_the_end,
            received: near_the_end,
            forwarded: near_the_end,
            told: near_the_end,
        }
    }

    #[test]
    fn counters_go_round() {
        let mut credit = old();
        credit.send(90);
        assert_eq!(credit.room(), 10);
        credit.learn(&says(100, 79));
        assert_eq!(credit.room(), 100);
        assert!(credit.receive(BUFFER));
        assert!(!credit.receive(1));
        credit.forward(UPDATE_AFTER - 1);
        assert!(!credit.update_due());
        credit.forward(1);
        assert!(credit.update_due());
        assert!(!credit.receive(1), "the guest does not know of this room yet");
        let mut header = Header::default();
        credit.tell(&mut header);
        assert_eq!(header.fwd_cnt, UPDATE_AFTER - 11);
        assert!(credit.receive(UPDATE_AFTER));
        assert!(!credit.receive(1));
    }

    #[test]
    fn a_guest_that_shrinks_its_buffer_or_lies_gets_nothing() {
        let mut credit = Credit::default();
        assert_eq!(credit.room(), 0);
        credit.learn(&says(1000, 0));
        credit.send(1000);
        credit.learn(&says(10, 0));
        assert_eq!(credit.room(), 0);
        credit.learn(&says(1000, 1001));
        assert_eq!(credit.room(), 0);
        credit.learn(&says(1000, 1000));
        assert_eq!(credit.room(), 1000);
    }

    proptest! {
        /// Whatever order bytes come, go and are told in: the backlog never exceeds the buffer, and a guest that has
        /// used up what it knows of is always told of more once the host has taken everything.
        #[test]
        fn the_backlog_is_bounded_and_nobody_starves(steps in prop::collection::vec((any::<bool>(), 0..2 * BUFFER), 1..200)) {
            let mut credit = old();
            let mut backlog = 0;
            for (receive, bytes) in steps {
                if receive {
                    if credit.receive(bytes) {
                        backlog += bytes;
                    }
                } else {
                    let bytes = bytes.min(backlog);
                    credit.forward(bytes);
                    backlog -= bytes;
                    if credit.update_due() {
                        credit.tell(&mut Header::default());
                    }
                }
                prop_assert!(backlog <= BUFFER);
            }
            credit.forward(backlog);
            if credit.update_due() {
                credit.tell(&mut Header::default());
            }
            prop_assert!(credit.receive(1));
        }

        #[test]
        fn room_is_never_more_than_the_guest_buffer(buffer: u32, forwarded: u32, sent: u32) {
            let mut credit = Credit::default();
            credit.learn(&says(buffer, forwarded));
            credit.send(sent);
            prop_assert!(credit.room() <= buffer);
        }
    }
}
