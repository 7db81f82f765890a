//! The Lighter command line.
fn main() {}
