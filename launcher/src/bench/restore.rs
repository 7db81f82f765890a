//! `lighter bench restore`: how long it takes to have an engine of a snapshot, and what it costs.

use super::environment::Environment;
use super::peer::{Guest, Peer};
use super::saved_peer::{PeerFigures, SavedPeer};
use super::warm::{self, Report, Sample, Saved, Series};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::disk::DiskSource;
use crate::error::Result;
use crate::name::Name;
use crate::paths::{Paths, create_private};
use crate::progress::Progress;
use crate::snapshots::base::Base;
use crate::snapshots::create::{Keep, take};
use crate::snapshots::restore::{Lives, Restored, check};
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use std::path::Path;
use std::slice;
use std::time::Instant;

/// How the name of the VM begins that is saved.
const SOURCE: &str = "bench-saved";

/// How those of the VMs begin that go on from it.
const RESTORED: &str = "bench-restored";

/// Arguments.
#[derive(Debug, Args)]
pub struct Restore {
    /// How often; each run also boots a VM, for comparison
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Compare with this monitor's snapshots of the same kernel and image: firecracker [default: if it is found in PATH]
    #[arg(long, value_name = "NAME[=PATH]")]
    peer: Option<Peer>,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

impl Restore {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot, or does not go on from its snapshot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let progress = Progress::new(!self.output.json);
        let deadline = Instant::now() + START_TIMEOUT;
        let source = ThrowAway::boot(paths, SOURCE, settings.clone(), deadline, &progress)?;
        progress.say("saving");
        // What an engine still has to do that has just begun, each VM of the snapshot would have to do.
        warm::begin();
        // Among the VM's own files: it goes with them, however this process ends.
        let folder = source.vm.paths.data.join("bench-snapshot");
        create_private(&folder)?;
        let snapshot = take(&source.vm, &source.vm.name, &folder, Keep::Yes)?;
        let mut restores = Series::new("restore".into());
        restores.saved(Saved {
            paused_ns: Some(snapshot.paused_ns),
            bytes: Base::load(&folder)?.used(),
        });
        let peer = self.saved_peer(paths, &config, &settings, &progress)?;
        let (mut peer_ms, mut beside_ms) = (vec![], vec![]);
        let mut cold = Series::new("cold start".into());
        let name = ThrowAway::name(RESTORED)?;
        for _ in 0..self.runs {
            cold.add(warm::cold(paths, &settings, &progress)?);
            progress.say("going on from the snapshot");
            let samples = measure(paths, &folder, &name, &progress)?;
            if let Some(peer) = &peer {
                beside_ms.extend(samples.iter().map(Sample::answer_ms));
                progress.say("Firecracker goes on from its own");
                peer_ms.push(peer.restore(Instant::now() + START_TIMEOUT)?);
            }
            restores.add(samples);
        }
        drop(source);
        drop(progress);
        let peer = peer.map(|peer| PeerFigures::new(&peer, &peer_ms, &beside_ms));
        let report = Report::new(&settings, self.runs, &cold, &[restores])?.beside(peer.transpose()?);
        match self.output.json {
            true => print_json(&report),
            false => print(&report.text()),
        }
    }
}

impl Restore {
    /// The peer, if there is one, with a guest like those of `settings` that it has saved.
    fn saved_peer(
        &self,
        paths: &Paths,
        config: &Config,
        settings: &Settings,
        progress: &Progress,
    ) -> Result<Option<SavedPeer>> {
        let found = || Peer::found().into_iter().find(Peer::can_be_saved);
        let Some(peer) = self.peer.clone().or_else(found) else {
            return Ok(None);
        };
        let environment = Environment::of(paths, config, settings, false)?;
        progress.say("booting Firecracker, and saving it");
        let deadline = Instant::now() + START_TIMEOUT;
        let guest = Guest::of(settings, &environment);
        SavedPeer::new(&peer, &guest, &paths.vms, deadline).map(Some)
    }
}

/// Does what `lighter restore` does, measures the new VM and removes it.
fn measure(paths: &Paths, folder: &Path, name: &Name, progress: &Progress) -> Result<Vec<Sample>> {
    let began_ns = warm::begin();
    let deadline = Instant::now() + START_TIMEOUT;
    let base = Base::load(folder)?;
    check(paths, &base)?;
    let disk = base.disk();
    let source = DiskSource::Frozen(&disk);
    let restored = Restored::start(paths, name, &base, source, Lives::ThrowAway, deadline)?;
    let vm = restored.throw_away(deadline, progress)?;
    warm::samples(began_ns, slice::from_ref(&vm))
}
