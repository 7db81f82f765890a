//! `lighter bench compare`: the same guest booted by other monitors, or another system in Lighter's monitor, in the same run,
//! A B A B. Each is timed from just before its process is started; other monitors by what the guest's agent says on the
//! serial console, another system by its engine's answer.

use super::comparison::Comparison;
use super::peer::{Contender, Guest, Peer};
use super::report::Report;
use super::series::{Ready, Series};
use super::system::System;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::paths::Paths;
use clap::Args;
use std::path::PathBuf;

/// Arguments.
#[derive(Debug, Args)]
pub struct Compare {
    /// Compare with this monitor: firecracker, cloud-hypervisor or qemu (its microvm); may be repeated [default: those found in PATH]
    #[arg(long = "peer", value_name = "NAME[=PATH]")]
    peers: Vec<Peer>,
    /// Compare with the system on this raw disk, in Lighter's own monitor; its engine has to answer on vsock port 2375
    #[arg(long, value_name = "DISK")]
    system: Option<PathBuf>,
    #[command(flatten)]
    series: Series,
}

impl Compare {
    /// Measures and prints.
    ///
    /// # Errors
    /// When there is nothing to compare with, or one does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let ready = self.series.prepare(paths)?;
        let guest = self.guest(paths, &ready)?;
        paths.create_vms()?;
        let contenders = self.contenders(paths, &guest)?;
        let system = self.system.as_ref().map(|disk| System {
            disk: disk.clone(),
            kernel: guest.kernel,
            cpus: guest.cpus,
            memory: guest.memory,
            folder: paths.vms.clone(),
        });
        system.as_ref().map_or(Ok(()), System::check)?;
        let boots = self.series.boot(&ready, &contenders, system.as_ref())?;
        let with_peer = |(contender, peer_runs)| Comparison::with_peer(contender, &boots.lighter, peer_runs);
        let with_peers = contenders.iter().zip(boots.contenders).map(with_peer);
        let with_system = |system| Comparison::with_system(system, &boots.lighter, boots.system);
        let report = Report {
            environment: ready.environment.clone(),
            comparisons: with_peers.chain(system.as_ref().map(with_system)).collect(),
            runs: boots.lighter.clone(),
        };
        self.series.tell(&report, ready)
    }

    fn guest(&self, paths: &Paths, ready: &Ready) -> Result<Guest> {
        let settings = self.series.options.settings(&Config::load(&paths.config_file)?)?;
        Ok(Guest::of(&settings, &ready.environment))
    }

    fn contenders(&self, paths: &Paths, guest: &Guest) -> Result<Vec<Contender>> {
        let found = Peer::found();
        let peers = if self.peers.is_empty() && self.system.is_none() {
            &found
        } else {
            &self.peers
        };
        if peers.is_empty() && self.system.is_none() {
            return Err(
                Error::failure("there is no other monitor in PATH to compare with")
                    .hint("name one: --peer NAME=PATH"),
            );
        }
        let prepare = |peer: &Peer| peer.prepare(guest, &paths.vms);
        peers.iter().map(prepare).collect()
    }
}
