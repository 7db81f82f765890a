//! Entropy device (section 5.4): random bytes of the host's kernel for the guest's, by getrandom(2).
//!
//! One queue of writable buffers. A device may fill less than a buffer holds, so one request costs the host at most
//! [`MOST`] bytes however long its buffers are. There is no state beside the ring to save.

mod device;

pub use device::Rng;

/// Entries of the only queue.
pub const QUEUE_SIZE: u16 = 64;

/// Random bytes for one chain.
pub const MOST: usize = 64 << 10;
