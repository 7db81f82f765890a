//! `lighter bench fork`: how long it takes to have several engines of one that runs, and what each of them costs.

use super::warm::{self, Report, Sample, Saved, Series};
use crate::boot::START_TIMEOUT;
use crate::cli::fork::{MOST, names};
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::error::Result;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::snapshots::fork::{self, Fork as Snapshot};
use crate::snapshots::restore::{Lives, Restored};
use crate::throw_away::ThrowAway;
use crate::vm::Vm;
use clap::Args;
use std::time::Instant;

/// Arguments.
#[derive(Debug, Args)]
pub struct Fork {
    /// How many forks at once, one number after another
    #[arg(short = 'n', long = "number", value_name = "N,...", value_delimiter = ',', default_value = "1,2,4,8", value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)))]
    numbers: Vec<u16>,
    /// How often; each run also boots a VM, for comparison
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

impl Fork {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot, or cannot be forked.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let progress = Progress::new(!self.output.json);
        let deadline = Instant::now() + START_TIMEOUT;
        let source = ThrowAway::boot(paths, "bench-fork", settings.clone(), deadline, &progress)?;
        let mut cold = Series::new("cold start".into());
        let what = |number| match number {
            1 => "1 fork".into(),
            number => format!("{number} forks"),
        };
        let mut forks: Vec<Series> = self.numbers.iter().map(|&n| Series::new(what(n))).collect();
        for _ in 0..self.runs {
            cold.add(warm::cold(paths, &settings, &progress)?);
            for (&number, series) in self.numbers.iter().zip(&mut forks) {
                progress.say(&format!("forking, {number} at once"));
                let (saved, samples) = measure(paths, &source.vm, number, &progress)?;
                series.saved(saved);
                series.add(samples);
            }
        }
        drop(source);
        drop(progress);
        let report = Report::new(&settings, self.runs, &cold, &forks)?;
        match self.output.json {
            true => print_json(&report),
            false => print(&report.text()),
        }
    }
}

/// Does what `lighter fork` does, measures the new VMs and removes them.
fn measure(paths: &Paths, source: &Vm, number: u16, progress: &Progress) -> Result<(Saved, Vec<Sample>)> {
    let began_ns = warm::begin();
    let deadline = Instant::now() + START_TIMEOUT;
    let names = names(&source.name, number)?;
    let claim = fork::prepare(paths, source, &names)?;
    let snapshot = Snapshot::of(source, &claim)?;
    let saved = Saved {
        paused_ns: Some(snapshot.paused_ns),
        bytes: snapshot.base.used(),
    };
    let started = snapshot.start(paths, &names, Lives::ThrowAway, deadline);
    let forks = follow(started, deadline, progress)?;
    drop(snapshot);
    let samples = warm::samples(began_ns, &forks);
    ThrowAway::end_all(forks);
    Ok((saved, samples?))
}

/// Waits for all at once: what one takes says nothing about when the next one answers. All end when one does not start.
fn follow(started: Vec<Result<Restored>>, deadline: Instant, progress: &Progress) -> Result<Vec<ThrowAway>> {
    std::thread::scope(|scope| {
        let follow = |started: Result<Restored>| {
            scope.spawn(move || started.and_then(|fork| fork.throw_away(deadline, progress)))
        };
        let followers: Vec<_> = started.into_iter().map(follow).collect();
        let ended: Vec<Result<ThrowAway>> = followers
            .into_iter()
            .map(|follower| {
                follower
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect();
        ended.into_iter().collect()
    })
}
