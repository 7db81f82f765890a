//! What `lighter bench boot` and `compare` say.

use super::comparison::Comparison;
use super::environment::Environment;
use super::phases::{Clock, PHASES, Run, START, clock_error};
use super::stats::Spread;
use crate::error::{Context, Error, Result};
use crate::table;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;

/// All of it.
#[derive(Debug)]
pub struct Report {
    /// Host and guest.
    pub environment: Environment,
    /// Lighter's boots.
    pub runs: Vec<Run>,
    /// Beside others.
    pub comparisons: Vec<Comparison>,
}

/// An earlier report, as far as a later one needs it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Host and guest.
    pub environment: Environment,
    /// Lighter's boots.
    pub runs: Vec<Run>,
}

impl Saved {
    /// Reads the JSON of an earlier run.
    ///
    /// # Errors
    /// When it is not one.
    pub fn read(path: &Path) -> Result<Self> {
        let what = || format!("cannot read the baseline {}", path.display());
        let text = std::fs::read_to_string(path).context(what)?;
        let saved: Self = serde_json::from_str(&text).map_err(|error| {
            Error::failure(format!("{}: {error}", what()))
                .hint("a baseline is what `lighter bench boot --json` of this version has written")
        })?;
        match saved.runs.is_empty() {
            true => Err(Error::failure(format!("{}: it has no boots", what()))),
            false => Ok(saved),
        }
    }
}

impl Report {
    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        let phases = PHASES.iter().chain([&START]).map(|phase| {
            json!({
                "title": phase.title,
                "from": phase.from,
                "to": phase.to,
                "stamped_by": phase.stamped_by,
                "ms": Spread::of(phase.all_ms(&self.runs)),
            })
        });
        let memory: serde_json::Map<_, _> = MEMORY
            .iter()
            .map(|(name, _, of)| ((*name).to_owned(), json!(Spread::of(self.runs.iter().map(of)))))
            .collect();
        json!({
            "environment": self.environment,
            "clock_error_ms": clock_error(&self.runs),
            "phases": phases.collect::<Vec<_>>(),
            "memory": memory,
            "runs": self.runs,
            "comparisons": self.comparisons,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut about = table::plain();
        for (what, which) in self.environment.lines() {
            about.add_row([what, &which]);
        }
        let mut table = table::plain();
        table.set_header(HEADER);
        for row in self.rows() {
            table.add_row(row);
        }
        table::align_numbers(&mut table);
        let mut text = format!("{about}\n\n{table}\n\n");
        for note in self.notes() {
            text += &format!("{note}\n");
        }
        for comparison in &self.comparisons {
            text += &format!("\n{}", comparison.text());
        }
        text
    }

    /// The lines of the table: what, whose stamp, how long it took, and when it was over.
    pub fn rows(&self) -> Vec<[String; 4]> {
        let phases = PHASES.iter().map(|phase| {
            let over = Spread::of(self.runs.iter().filter_map(|run| run.at(phase.to)));
            [
                phase.title.to_owned(),
                match phase.stamped_by {
                    Clock::Host => "host".into(),
                    Clock::Guest => "guest".into(),
                },
                spread_text(Spread::of(phase.all_ms(&self.runs))),
                spread_text(over),
            ]
        });
        let memory = MEMORY.iter().map(|(_, title, of)| {
            let spread = Spread::of(self.runs.iter().map(of));
            [
                (*title).to_owned(),
                "host".into(),
                spread_text(spread),
                String::new(),
            ]
        });
        phases.chain(memory).collect()
    }

    /// What has to be known to read the table.
    pub fn notes(&self) -> Vec<String> {
        let error = clock_error(&self.runs).map_or(0.0, |spread| spread.max);
        vec![
            format!(
                "Boots: {}. Milliseconds, min / median / max. All stamps are on the host's CLOCK_MONOTONIC; those of the guest are \
                 converted, and off by {error:.2} ms at most, which may make a short phase negative.",
                self.runs.len()
            ),
            "The kernel's first line is stamped with the start of the clock of the kernel's log, a few lines later. Network and data \
             disk are set up side by side, and so do containerd and dockerd start."
                .into(),
        ]
    }
}

/// The table's head.
pub const HEADER: [&str; 4] = ["phase", "stamped by", "took", "over at"];

/// Its name, its title, the figure.
type MemoryRow = (&'static str, &'static str, fn(&Run) -> f64);

const MEMORY: [MemoryRow; 2] = [
    ("monitor_rss_kib", "monitor RSS, KiB", |run| {
        run.memory.monitor_rss_kib as f64
    }),
    ("monitor_private_kib", "monitor private, KiB", |run| {
        run.memory.monitor_private_kib as f64
    }),
];

/// Minimum, median and maximum.
pub fn spread_text(spread: Option<Spread>) -> String {
    match spread {
        Some(Spread { min, median, max }) if max.abs() < 100.0 => {
            format!("{min:.2} / {median:.2} / {max:.2}")
        }
        Some(Spread { min, median, max }) => format!("{min:.0} / {median:.0} / {max:.0}"),
        None => "-".into(),
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::environment::tests::somewhere;
    use super::super::phases::tests::runs;
    use super::*;

    /// A report with everything in it.
    pub fn full() -> Report {
        let saved = Saved {
            environment: somewhere(),
            runs: runs(5, 1.3),
        };
        let runs = runs(7, 1.0);
        Report {
            environment: somewhere(),
            comparisons: vec![Comparison::with_baseline(&runs, &saved)],
            runs,
        }
    }

    #[test]
    fn every_phase_is_in_text_and_json() {
        let report = full();
        let (text, json) = (report.text(), report.json());
        for phase in PHASES {
            assert!(text.contains(phase.title), "{} in {text}", phase.title);
        }
        assert_eq!(json["phases"].as_array().unwrap().len(), PHASES.len() + 1);
        assert_eq!(json["clock_error_ms"]["max"], 1.5);
        assert!(text.contains("off by 1.50 ms"), "{text}");
    }

    #[test]
    fn the_json_of_one_run_is_the_baseline_of_another() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), full().json().to_string()).unwrap();
        let saved = Saved::read(file.path()).unwrap();
        assert_eq!((saved.runs, saved.environment), (full().runs, somewhere()));
    }

    #[test]
    fn a_baseline_that_is_none_is_refused_by_its_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in ["", "{}", "[1]", r#"{"runs":[]}"#] {
            std::fs::write(file.path(), text).unwrap();
            let error = Saved::read(file.path()).unwrap_err();
            assert!(error.message.contains(file.path().to_str().unwrap()), "{error}");
        }
        assert!(Saved::read(Path::new("/nonexistent.json")).is_err());
    }
}
