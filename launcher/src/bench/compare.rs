//! `lighter bench compare`: the same guest booted by other monitors in the same run, A B A B. Each is timed from just
//! before its process is started, by what the guest's agent says on the serial console.

use super::comparison::Comparison;
use super::peer::{Contender, Guest, Peer};
use super::report::Report;
use super::series::{Ready, Series};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::paths::Paths;
use clap::Args;

/// Arguments.
#[derive(Debug, Args)]
pub struct Compare {
    /// Compare with this monitor: firecracker or qemu (its microvm); may be repeated [default: those found in PATH]
    #[arg(long = "peer", value_name = "NAME[=PATH]")]
    peers: Vec<Peer>,
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
        let contenders = self.contenders(paths, &ready)?;
        let boots = self.series.boot(&ready, &contenders)?;
        let with = |(contender, peer_runs)| Comparison::with_peer(contender, &boots.lighter, peer_runs);
        let report = Report {
            environment: ready.environment.clone(),
            comparisons: contenders.iter().zip(boots.contenders).map(with).collect(),
            runs: boots.lighter.clone(),
        };
        self.series.tell(&report, ready)
    }

    fn contenders(&self, paths: &Paths, ready: &Ready) -> Result<Vec<Contender>> {
        let settings = self.series.options.settings(&Config::load(&paths.config_file)?)?;
        let guest = Guest {
            kernel: ready.environment.kernel.clone(),
            image: ready.environment.image.clone(),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
        };
        let found = Peer::found();
        let peers = if self.peers.is_empty() {
            &found
        } else {
            &self.peers
        };
        if peers.is_empty() {
            return Err(
                Error::failure("there is no other monitor in PATH to compare with")
                    .hint("name one: --peer NAME=PATH"),
            );
        }
        paths.create_vms()?;
        let prepare = |peer: &Peer| peer.prepare(&guest, &paths.vms);
        peers.iter().map(prepare).collect()
    }
}
