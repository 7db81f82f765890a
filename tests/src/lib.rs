//! End-to-end tests of Lighter with real clients.
