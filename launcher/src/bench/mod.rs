//! `lighter bench`: measurements that anybody can repeat.
//!
//! - `boot`: how long a start takes, where its time goes, and what the monitor costs
//! - `compare`: the same beside other monitors
//! - `series`, `once`: one boot after another, each in a process of its own
//! - `phases`, `first_container`: what a boot gets to, and when
//! - `peer`: other monitors that boot the same guest
//! - `milestones`, `console`: what the guest announces on its console, and when
//! - `memory`: a monitor's memory beside its guest's
//! - `stats`, `comparison`, `environment`, `report`: what is said of it
//! - `page`, `charts`: the same as a page with plots

mod boot;
mod charts;
mod compare;
mod comparison;
mod console;
mod environment;
mod first_container;
mod memory;
mod milestones;
mod once;
mod page;
mod peer;
mod phases;
mod report;
mod series;
mod stats;

use crate::error::Result;
use crate::paths::Paths;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Boot throw-away VMs and show when each milestone was reached
    Boot(boot::Boot),
    /// Boot the same guest in other monitors in the same run, and show the ratios
    Compare(compare::Compare),
    /// One boot, for `boot` and `compare`
    #[command(hide = true)]
    BootOnce(once::BootOnce),
}

impl Bench {
    /// Measures.
    ///
    /// # Errors
    /// When a VM does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Boot(bench) => bench.run(paths),
            Self::Compare(bench) => bench.run(paths),
            Self::BootOnce(once) => once.run(paths),
        }
    }
}
