//! `lighter-vmm`: the monitor's command line.
fn main() {}
