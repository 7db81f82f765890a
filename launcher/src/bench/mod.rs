//! `lighter bench`: measurements that anybody can repeat.
//!
//! - `api`: what the way from the host's socket to the engine costs
//! - `boot`: how long a start takes, and what the monitor costs
//! - `peer`: other monitors that boot the same guest
//! - `milestones`, `console`: what the guest announces on its console, and when
//! - `counters`: what a monitor and its guest did
//! - `density`, `settling`: how many idle engines the host carries, and when one is idle
//! - `gate`: whether a boot is what it was
//! - `stats`, `report`: what is said of it

mod api;
mod boot;
mod console;
mod counters;
mod density;
mod gate;
mod milestones;
mod peer;
mod report;
mod settling;
mod stats;

use crate::error::Result;
use crate::paths::Paths;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Boot throw-away VMs and show when each milestone was reached
    Boot(boot::Boot),
    /// Measure the engine's API on the host's socket, and the same requests in the guest
    Api(api::Api),
    /// Start idle engines one after another for as long as the host's memory lasts; each has 512m unless --memory is given
    Density(density::Density),
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
            Self::Api(bench) => bench.run(paths),
            Self::Density(bench) => bench.run(paths),
            Self::BootOnce(once) => once.run(paths),
            Self::Gate(gate) => gate.run(),
        }
    }
}
