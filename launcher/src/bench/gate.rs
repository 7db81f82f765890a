//! `lighter bench gate`: judges the report of a boot by figures that were committed.
//!
//! It is for boots on a clock that counts instructions (`scripts/bench-gate`), where the same program gives the same
//! figures: a change of more than [`LIMIT`] is a change of the program.

use super::phases::{Milestone, Run};
use crate::cli::print;
use crate::error::{Context, Error, Result};
use clap::Args;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// By what part a figure may change.
const LIMIT: f64 = 0.03;

/// A smaller change is none, whatever part of the figure it is: milliseconds of a phase, and counts.
const SMALLEST_MS: f64 = 2.0;
const SMALLEST_COUNT: f64 = 50.0;

/// Not judged: these, and with them the sum of all exits, come with the timers of host and guest, and differ by a tenth
/// from one boot to the next.
const BY_CHANCE: [&str; 4] = [
    "KVM: exits",
    "KVM: halt_exits",
    "KVM: irq_exits",
    "KVM: irq_window_exits",
];

/// Arguments.
#[derive(Debug, Args)]
pub struct Gate {
    /// What `lighter bench boot --json` printed; may be repeated
    #[arg(long, value_name = "FILE", required = true)]
    measured: Vec<PathBuf>,
    /// The figures to compare with
    #[arg(long, value_name = "FILE")]
    baseline: PathBuf,
    /// Write the figures instead of comparing
    #[arg(long)]
    update: bool,
    /// A version that the figures depend on, to be kept with them; may be repeated
    #[arg(long = "made-with", value_name = "NAME=VERSION", value_parser = made_with)]
    made_with: Vec<(String, String)>,
}

fn made_with(text: &str) -> std::result::Result<(String, String), String> {
    let (name, version) = text.split_once('=').ok_or("it has no =")?;
    Ok((name.to_owned(), version.to_owned()))
}

/// A number that is to stay what it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Figure {
    name: String,
    value: f64,
}

/// The committed file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Figures {
    /// What they depend on beside this repository: versions by name.
    made_with: BTreeMap<String, String>,
    /// Milliseconds of the counting clock, in order of the boot; the last is all of it.
    phases_ms: Vec<Figure>,
    /// Numbers by name.
    counts: BTreeMap<String, u64>,
}

/// The part of a report that is judged.
#[derive(Debug, Deserialize)]
struct Report {
    runs: Vec<Run>,
}

/// What is judged of a boot: from where to where. What comes after the engine's answer varies too much.
type Part = (&'static str, Milestone, Milestone);

const PARTS: [Part; 8] = {
    use Milestone as M;
    [
        (
            "process start to monitor started",
            M::ProcessStarted,
            M::MonitorStarted,
        ),
        (
            "monitor started to first guest instruction",
            M::MonitorStarted,
            M::GuestEntered,
        ),
        (
            "first guest instruction to kernel's first line",
            M::GuestEntered,
            M::KernelFirstLine,
        ),
        (
            "kernel's first line to agent started",
            M::KernelFirstLine,
            M::AgentStarted,
        ),
        (
            "agent started to data disk mounted",
            M::AgentStarted,
            M::DataMounted,
        ),
        (
            "data disk mounted to containerd ready",
            M::DataMounted,
            M::ContainerdReady,
        ),
        (
            "data disk mounted to dockerd ready",
            M::DataMounted,
            M::DockerdReady,
        ),
        (
            "process start to engine answering",
            M::ProcessStarted,
            M::EngineAnswers,
        ),
    ]
};

impl Figures {
    /// The mean of `runs`.
    fn of(runs: &[Run], made_with: BTreeMap<String, String>) -> Result<Self> {
        let [first, ..] = runs else {
            return Err(Error::failure("the reports have no boot"));
        };
        let phase = |&(name, from, to): &Part| {
            let ms = |run: &Run| Some(run.at(to)? - run.at(from)?);
            let all: Option<Vec<f64>> = runs.iter().map(ms).collect();
            let all = all.ok_or_else(|| Error::failure(format!("a boot has no figure for: {name}")))?;
            Ok(Figure {
                name: name.to_owned(),
                value: mean(all.into_iter()),
            })
        };
        let count = |name: &String| {
            let of = |run: &Run| run.counters.get(name).copied().unwrap_or_default() as f64;
            (name.clone(), mean(runs.iter().map(of)).round() as u64)
        };
        Ok(Self {
            made_with,
            phases_ms: PARTS.iter().map(phase).collect::<Result<_>>()?,
            counts: first
                .counters
                .keys()
                .filter(|name| !BY_CHANCE.contains(&name.as_str()))
                .map(count)
                .collect(),
        })
    }
}

/// The mean, rounded to microseconds, for a file that people read. `values` are not empty.
fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    (values.sum::<f64>() / count * 1e3).round() / 1e3
}

/// What came of comparing.
#[derive(Debug, Default, PartialEq)]
struct Verdict {
    /// One line for each figure.
    lines: Vec<String>,
    worse: Vec<String>,
    better: Vec<String>,
    /// Figures that only one side has.
    unknown: Vec<String>,
    /// Versions that differ.
    versions: Vec<String>,
}

fn compare(baseline: &Figures, measured: &Figures) -> Verdict {
    let mut verdict = Verdict::default();
    let values = |figures: &Figures| -> Vec<(String, f64, bool)> {
        let phases = figures.phases_ms.iter();
        let phases = phases.map(|figure| (format!("{}, ms", figure.name), figure.value, true));
        let counts = figures.counts.iter();
        phases
            .chain(counts.map(|(name, count)| (name.clone(), *count as f64, false)))
            .collect()
    };
    let before = values(baseline);
    let now = values(measured);
    for (name, old, is_time) in &before {
        let Some((_, new, _)) = now.iter().find(|(other, ..)| other == name) else {
            verdict.unknown.push(format!("{name} is not measured any more"));
            continue;
        };
        let change = new - old;
        let part = if *old == 0.0 { 0.0 } else { change / old * 100.0 };
        let smallest = if *is_time { SMALLEST_MS } else { SMALLEST_COUNT };
        let sentence = format!("{name}: {old} before, {new} now ({part:+.1} %)");
        let mark = if change.abs() <= smallest || change.abs() <= LIMIT * old {
            "      "
        } else if change > 0.0 {
            verdict.worse.push(sentence.clone());
            "WORSE "
        } else {
            verdict.better.push(sentence.clone());
            "BETTER"
        };
        verdict.lines.push(format!("{mark} {sentence}"));
    }
    for (name, ..) in &now {
        if !before.iter().any(|(other, ..)| other == name) {
            verdict.unknown.push(format!("{name} was not measured before"));
        }
    }
    let names = baseline.made_with.keys().chain(measured.made_with.keys());
    for name in names.collect::<std::collections::BTreeSet<_>>() {
        let version = |figures: &Figures| figures.made_with.get(name).cloned();
        let (old, new) = (version(baseline), version(measured));
        if old != new {
            let word = |version: Option<String>| version.unwrap_or_else(|| "none".into());
            let sentence = format!("{name}: {} then, {} now", word(old), word(new));
            verdict.versions.push(sentence);
        }
    }
    verdict
}

impl Verdict {
    /// # Errors
    /// When the figures are not those that were committed.
    fn judge(self) -> Result<()> {
        let headline = if !self.worse.is_empty() {
            format!("a boot got worse by more than 3 %: {}", self.worse.join("; "))
        } else if !self.better.is_empty() {
            format!("a boot got better by more than 3 %: {}", self.better.join("; "))
        } else if !self.unknown.is_empty() {
            format!(
                "the committed figures are of other things: {}",
                self.unknown.join("; ")
            )
        } else {
            return Ok(());
        };
        let hint = match (self.worse.is_empty(), self.versions.is_empty()) {
            (true, _) => "commit the new figures: scripts/bench-gate --update",
            (false, true) => {
                "find what made it slower; if it is meant to be so, commit the new figures with the reason: \
                 scripts/bench-gate --update"
            }
            (false, false) => {
                "other versions may be the reason; if so, commit the new figures: scripts/bench-gate --update"
            }
        };
        let versions = self.versions.into_iter();
        let lines = versions.map(|version| format!("another version than the committed figures': {version}"));
        Err(Error::failure(headline).lines(lines.collect()).hint(hint))
    }
}

impl Gate {
    /// Compares, or updates.
    ///
    /// # Errors
    /// When a figure changed by more than [`LIMIT`], or a file cannot be used.
    pub fn run(self) -> Result<()> {
        let made_with = self.made_with.into_iter().collect();
        let mut runs = vec![];
        for path in &self.measured {
            let Report { runs: more } = read(path)?;
            runs.extend(more);
        }
        let measured = Figures::of(&runs, made_with)?;
        if self.update {
            let mut text =
                serde_json::to_string_pretty(&measured).context(|| "cannot encode the figures".into())?;
            text.push('\n');
            return fs::write(&self.baseline, text)
                .context(|| format!("cannot write {}", self.baseline.display()));
        }
        let verdict = compare(&read(&self.baseline)?, &measured);
        print(&format!("{}\n", verdict.lines.join("\n")))?;
        verdict.judge()
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let failed = || format!("cannot read {}", path.display());
    let bytes = fs::read(path).context(failed)?;
    serde_json::from_slice(&bytes).context(failed)
}

#[cfg(test)]
mod tests {
    use super::super::phases::tests::runs;
    use super::super::report::tests::full;
    use super::*;

    fn run(agent_started_ms: f64, exits: u64) -> Run {
        let mut run = runs(1, 1.0).remove(0);
        run.milestones_ms = [
            (Milestone::ProcessStarted, 0.0),
            (Milestone::MonitorStarted, 100.0),
            (Milestone::GuestEntered, 120.0),
            (Milestone::KernelFirstLine, 120.0),
            (Milestone::AgentStarted, agent_started_ms),
            (Milestone::DataMounted, agent_started_ms),
            (Milestone::ContainerdReady, agent_started_ms + 1000.0),
            (Milestone::DockerdReady, agent_started_ms + 1000.0),
            (Milestone::EngineAnswers, agent_started_ms + 1000.0),
        ]
        .into();
        run.counters = [("KVM: io_exits".into(), exits)].into();
        run
    }

    fn figures(runs: Vec<Run>) -> Figures {
        Figures::of(&runs, BTreeMap::new()).unwrap()
    }

    #[test]
    fn figures_are_the_mean_of_the_runs() {
        let figures = figures(vec![run(300.0, 7), run(320.0, 5), run(310.0, 7)]);
        assert_eq!(figures.phases_ms[3].value, 190.0);
        assert_eq!(figures.counts["KVM: io_exits"], 6); // 19 / 3
        assert!(Figures::of(&[], BTreeMap::new()).is_err());
    }

    #[test]
    fn a_missing_milestone_is_told_and_not_counted_as_nothing() {
        let mut short = run(300.0, 7);
        short.milestones_ms.remove(&Milestone::EngineAnswers);
        let error = Figures::of(&[run(300.0, 7), short], BTreeMap::new()).unwrap_err();
        assert!(error.message.contains("engine answering"), "{error}");
    }

    #[test]
    fn a_slower_phase_fails_and_is_named() {
        let before = figures(vec![run(320.0, 10_000)]);
        let error = compare(&before, &figures(vec![run(327.0, 10_000)]))
            .judge()
            .unwrap_err();
        assert!(
            error
                .message
                .contains("kernel's first line to agent started, ms: 200 before, 207 now (+3.5 %)"),
            "{error}"
        );
        // The whole boot took only half a per cent more.
        assert!(!error.message.contains("process start to engine"), "{error}");
    }

    #[test]
    fn three_per_cent_and_small_numbers_pass() {
        let before = figures(vec![run(320.0, 10_000)]);
        assert_eq!(
            compare(&before, &figures(vec![run(326.0, 10_300)]))
                .judge()
                .unwrap(),
            ()
        );
        let few = figures(vec![run(320.0, 10)]);
        assert_eq!(compare(&few, &figures(vec![run(320.0, 40)])).judge().unwrap(), ());
    }

    #[test]
    fn more_exits_fail() {
        let before = figures(vec![run(320.0, 10_000)]);
        let error = compare(&before, &figures(vec![run(320.0, 10_301)]))
            .judge()
            .unwrap_err();
        assert!(
            error.message.contains("KVM: io_exits: 10000 before, 10301 now"),
            "{error}"
        );
    }

    #[test]
    fn a_better_boot_asks_for_its_figures() {
        let before = figures(vec![run(320.0, 10_000)]);
        let error = compare(&before, &figures(vec![run(280.0, 10_000)]))
            .judge()
            .unwrap_err();
        assert!(error.message.contains("better"), "{error}");
        assert!(error.hint.unwrap().contains("--update"));
    }

    #[test]
    fn what_only_one_side_has_fails() {
        let before = figures(vec![run(320.0, 10_000)]);
        let mut now = figures(vec![run(320.0, 10_000)]);
        now.counts.insert("KVM: other".into(), 1);
        assert!(compare(&before, &now).judge().is_err());
        assert!(compare(&now, &before).judge().is_err());
    }

    #[test]
    fn another_version_is_told() {
        let mut before = figures(vec![run(320.0, 10_000)]);
        before.made_with.insert("docker.io".into(), "1".into());
        let mut now = figures(vec![run(420.0, 10_000)]);
        now.made_with.insert("docker.io".into(), "2".into());
        let error = compare(&before, &now).judge().unwrap_err();
        assert_eq!(
            error.lines,
            ["another version than the committed figures': docker.io: 1 then, 2 now"]
        );
    }

    #[test]
    fn the_file_is_read_as_it_was_written() {
        let root = tempfile::tempdir().unwrap();
        let [measured, baseline] = ["measured", "baseline"].map(|name| root.path().join(name));
        let mut report = full();
        report.runs = vec![run(300.123_456_7, 7)];
        fs::write(&measured, report.json().to_string()).unwrap();
        let gate = |update| Gate {
            measured: vec![measured.clone(); 2],
            baseline: baseline.clone(),
            update,
            made_with: vec![("QEMU".into(), "10".into())],
        };
        gate(true).run().unwrap();
        gate(false).run().unwrap();
        let written: Figures = read(&baseline).unwrap();
        assert_eq!(written.phases_ms[3].value, 180.123);
        assert_eq!(written.made_with["QEMU"], "10");
    }
}
