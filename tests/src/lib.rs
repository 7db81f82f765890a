//! End-to-end tests of Lighter with real clients.

pub mod pattern;
pub mod tiny_guest;
