//! `lighter-vmm`: the monitor.
fn main() {}
