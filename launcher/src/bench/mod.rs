//! `lighter bench`: measurements that anybody can repeat.
//!
//! - `boot`: how long a start takes, and what the monitor costs
//! - `peer`: other monitors that boot the same guest
//! - `milestones`, `console`: what the guest announces on its console, and when
//! - `memory`, `counters`: a monitor's memory beside its guest's, and what the two did
//! - `gate`: whether a boot is what it was
//! - `stats`, `report`: what is said of it

mod boot;
mod console;
mod counters;
mod gate;
mod memory;
mod milestones;
mod peer;
mod report;
mod stats;

use crate::error::Result;
use crate::paths::Paths;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Boot throw-away VMs and show when each milestone was reached
    Boot(boot::Boot),
    /// One boot, for `bench boot`
    #[command(hide = true)]
    BootOnce(boot::BootOnce),
    /// Compare a boot with committed figures, for scripts/bench-gate
    #[command(hide = true)]
    Gate(gate::Gate),
}

impl Bench {
    /// Measures.
    ///
    /// # Errors
    /// When a VM does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Boot(bench) => bench.run(paths),
            Self::BootOnce(once) => once.run(paths),
            Self::Gate(gate) => gate.run(),
        }
    }
}
