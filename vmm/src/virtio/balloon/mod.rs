//! Memory balloon (section 5.5): memory that the guest does not use goes back to the host.
//!
//! - Inflate queue: arrays of page numbers that the driver has taken out of use. The target size is 0, so Linux sends
//!   none of its own accord.
//! - Deflate queue: page numbers to be used again. Nothing is to be done: a page comes back when it is touched.
//! - Reporting queue (VIRTIO_BALLOON_F_REPORTING): each writable buffer is a range of free memory, some MiB long. This
//!   is what makes the guest's memory shrink on the host when containers end.
//!
//! Queues are numbered without gaps for those that were not negotiated, as Linux does, so reporting is queue 2.
//!
//! Giving back is [`reclaim`]'s. What lies outside guest memory fails the device; a part of a
//! page is never given back.

mod device;
mod reclaim;

pub use device::{Balloon, BalloonState};

/// Entries of each queue; Linux wants 32 or more for reporting.
pub const QUEUE_SIZE: u16 = 128;

/// Page numbers taken from one chain (Linux sends 256); the pages of others simply stay.
pub const MOST_PAGES: usize = 4096;
