//! End-to-end tests of Lighter with real clients.

pub mod pattern;
pub mod random;
pub mod tiny_guest;
