//! End-to-end tests of Lighter with real clients.

pub mod tiny_guest;
