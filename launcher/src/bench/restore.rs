//! `lighter bench restore`: how long it takes to have an engine of a snapshot, and what it costs.

use super::warm::{self, Report, Sample, Saved, Series};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::clock::monotonic_ns;
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
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let progress = Progress::new(!self.output.json);
        let deadline = Instant::now() + START_TIMEOUT;
        let source = ThrowAway::boot(paths, SOURCE, settings.clone(), deadline, &progress)?;
        progress.say("saving");
        // Among the VM's own files: it goes with them, however this process ends.
        let folder = source.vm.paths.data.join("bench-snapshot");
        create_private(&folder)?;
        let snapshot = take(&source.vm, &source.vm.name, &folder, Keep::Yes)?;
        let mut restores = Series::new("restore".into());
        restores.saved(Saved {
            paused_ns: Some(snapshot.paused_ns),
            bytes: Base::load(&folder)?.used(),
        });
        let mut cold = Series::new("cold start".into());
        let name = ThrowAway::name(RESTORED)?;
        for _ in 0..self.runs {
            cold.add(warm::cold(paths, &settings, &progress)?);
            progress.say("going on from the snapshot");
            restores.add(measure(paths, &folder, &name, &progress)?);
        }
        drop(source);
        drop(progress);
        let report = Report::new(&settings, self.runs, &cold, &[restores])?;
        match self.output.json {
            true => print_json(&report),
            false => print(&report.text()),
        }
    }
}

/// Does what `lighter restore` does, measures the new VM and removes it.
fn measure(paths: &Paths, folder: &Path, name: &Name, progress: &Progress) -> Result<Vec<Sample>> {
    let began_ns = monotonic_ns();
    let deadline = Instant::now() + START_TIMEOUT;
    let base = Base::load(folder)?;
    check(paths, &base)?;
    let disk = base.disk();
    let source = DiskSource::Frozen(&disk);
    let restored = Restored::start(paths, name, &base, source, Lives::ThrowAway, deadline)?;
    let vm = restored.throw_away(deadline, progress)?;
    warm::samples(began_ns, slice::from_ref(&vm))
}
