//! Virtual CPUs: what they look like to the guest, how the first one starts, and the thread that runs each.

pub mod cpuid;
pub mod registers;
pub mod state;
pub mod thread;
