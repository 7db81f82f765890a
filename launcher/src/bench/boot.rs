//! `lighter bench boot`: where the time of a cold boot goes.
//!
//! Each boot is done by a fresh process that does what `lighter start` does and then runs a first container. It is
//! timed from just before that process is started.

use super::comparison::Comparison;
use super::report::{Report, Saved};
use super::series::Series;
use crate::error::Result;
use crate::paths::Paths;
use clap::Args;
use std::path::PathBuf;

/// Arguments.
#[derive(Debug, Args)]
pub struct Boot {
    #[command(flatten)]
    series: Series,
    /// Compare with the JSON of an earlier run (`--json`), phase by phase
    #[arg(long, value_name = "FILE.json")]
    baseline: Option<PathBuf>,
}

impl Boot {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let baseline = self.baseline.as_deref().map(Saved::read).transpose()?;
        let ready = self.series.prepare(paths)?;
        let runs = self.series.boot(&ready, &[], None)?.lighter;
        let comparisons = baseline.map(|saved| Comparison::with_baseline(&runs, &saved));
        let report = Report {
            environment: ready.environment.clone(),
            comparisons: comparisons.into_iter().collect(),
            runs,
        };
        self.series.tell(&report, ready)
    }
}
