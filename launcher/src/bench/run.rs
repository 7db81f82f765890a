//! `lighter bench run`: how long it takes to have an engine for one command, from the template of its configuration, and what it
//! costs to leave that behind.

use super::warm::{self, Report, Sample, Saved, Series};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::snapshots::base::Base;
use crate::templates::fresh::{Templates, find};
use crate::templates::store;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use lighter_protocol::supervisor::Origin;
use std::slice;
use std::time::Instant;

/// How the names of the VMs begin.
const NAME: &str = "bench-run";

/// Arguments.
#[derive(Debug, Args)]
pub struct Run {
    /// How often; each run boots a VM, one that leaves a template behind, and starts one from that
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

impl Run {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not start, or no template is left behind.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let progress = Progress::new(!self.output.json);
        let mut cold = Series::new("cold start".into());
        let mut first = Series::new("leaves a template".into());
        let mut later = Series::new("from the template".into());
        for _ in 0..self.runs {
            cold.add(warm::cold(paths, &settings, &progress)?);
            if let Some(name) = find(paths, &settings) {
                store::remove(paths, &name)?;
            }
            first.add(measure(paths, &settings, false, &progress)?);
            let name = find(paths, &settings).ok_or_else(|| {
                Error::failure("the first VM has left no template behind")
                    .hint("check the free space of the folder of templates, and run it again while no other VM starts")
            })?;
            first.saved(Saved {
                paused_ns: None,
                bytes: Base::load(&store::folder(paths, &name))?.used(),
            });
            later.add(measure(paths, &settings, true, &progress)?);
        }
        drop(progress);
        let report = Report::new(&settings, self.runs, &cold, &[first, later])?;
        match self.output.json {
            true => print_json(&report),
            false => print(&report.text()),
        }
    }
}

/// Does what `lighter run` does, measures the VM and removes it.
fn measure(
    paths: &Paths,
    settings: &Settings,
    from_template: bool,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let began_ns = warm::begin();
    let deadline = Instant::now() + START_TIMEOUT;
    let vm = ThrowAway::start(paths, NAME, settings.clone(), Templates::Used, deadline, progress)?;
    if matches!(vm.status.origin, Origin::Template(_)) != from_template {
        let error = format!(
            "the VM was to start otherwise, and began with {:?}",
            vm.status.origin
        );
        return Err(Error::failure(error).hint("run it again while no other VM starts"));
    }
    warm::samples(began_ns, slice::from_ref(&vm))
}
