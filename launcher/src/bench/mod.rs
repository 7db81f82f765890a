//! `lighter bench`: measurements that anybody can repeat.
//!
//! - `api`: what the way from the host's socket to the engine costs
//! - `boot`: how long a start takes, where its time goes, and what the monitor costs
//! - `compare`: the same beside other monitors
//! - `density`, `settling`: how many idle engines the host carries, and when one is idle
//! - `fork`, `restore`, `run`, `warm`: VMs that go on from a saved one, beside VMs that boot
//! - `series`, `once`: one boot after another, each in a process of its own
//! - `phases`, `first_container`: what a boot gets to, and when
//! - `engine`: the engine's API
//! - `net`, `fs`: the network and a shared folder, beside the host's own and another monitor's
//! - `ways`: what is said of several ways to do the same
//! - `peer`: other monitors that boot the same guest
//! - `session`: one of them, whose guest measures what it is told
//! - `system`: somebody's own system in the same monitor
//! - `milestones`, `console`: what the guest announces on its console, and when
//! - `tasks`: has a guest measure something
//! - `counters`: what a monitor and its guest did
//! - `gate`: whether a boot is what it was
//! - `stats`, `comparison`, `environment`, `report`: what is said of it
//! - `page`, `charts`: the same as a page with plots

mod api;
mod boot;
mod charts;
mod compare;
mod comparison;
mod console;
mod counters;
mod density;
mod engine;
mod environment;
mod first_container;
mod fork;
mod fs;
mod gate;
mod milestones;
mod net;
mod once;
mod page;
mod peer;
mod peer_settings;
mod phases;
mod report;
mod restore;
mod run;
mod saved_peer;
mod series;
mod session;
mod settling;
mod stats;
mod system;
mod tasks;
mod warm;
mod ways;

use crate::error::Result;
use crate::paths::Paths;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Boot throw-away VMs and show when each milestone was reached
    Boot(boot::Boot),
    /// Boot the same guest in other monitors, or another system in this one, in the same run, and show the ratios
    Compare(compare::Compare),
    /// Measure the engine's API on the host's socket, and the same requests in the guest
    Api(api::Api),
    /// Measure the network and a published port, beside the host's own loopback and another monitor
    Net(net::Net),
    /// Measure a shared folder, beside the same folder on the host and another monitor
    Fs(fs::Fs),
    /// Start idle engines one after another for as long as the host's memory lasts; each has 512m unless --memory is given
    Density(density::Density),
    /// Fork a running VM, 1, 2, 4 and 8 times at once, beside VMs that boot
    Fork(fork::Fork),
    /// Go on from a snapshot again and again, beside VMs that boot
    Restore(restore::Restore),
    /// Start an engine for a command again and again, from a template, beside VMs that boot
    Run(run::Run),
    /// One boot, for `boot` and `compare`
    #[command(hide = true)]
    BootOnce(once::BootOnce),
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
            Self::Compare(bench) => bench.run(paths),
            Self::Api(bench) => bench.run(paths),
            Self::Net(bench) => bench.run(paths),
            Self::Fs(bench) => bench.run(paths),
            Self::Density(bench) => bench.run(paths),
            Self::Fork(bench) => bench.run(paths),
            Self::Restore(bench) => bench.run(paths),
            Self::Run(bench) => bench.run(paths),
            Self::BootOnce(once) => once.run(paths),
            Self::Gate(gate) => gate.run(),
        }
    }
}
