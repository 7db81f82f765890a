//! Lighter's boots beside others: those of a peer, pair by pair, or those of an earlier run.

use super::peer::Contender;
use super::phases::{ConsoleRun, Milestone, PHASES, Run, START};
use super::report::{Saved, spread_text};
use super::stats::{Ratio, Spread};
use super::system::{System, SystemRun};
use crate::table;
use serde::Serialize;

/// Boots beside others.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// What these boots are called.
    pub these: &'static str,
    /// What the others are called.
    pub those: &'static str,
    /// Of what version, with what settings, or on what machine the others are; a line each.
    pub about: Vec<String>,
    /// How the ratios were made.
    pub ratios: &'static str,
    /// What was compared.
    pub rows: Vec<Row>,
    /// A peer's boots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peer_runs: Vec<ConsoleRun>,
    /// Another system's boots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub system_runs: Vec<SystemRun>,
}

/// One line of a comparison; times in milliseconds.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was timed.
    pub what: &'static str,
    /// In these boots.
    pub these: Option<Spread>,
    /// In the others.
    pub those: Option<Spread>,
    /// These by those.
    pub ratio: Option<Ratio>,
}

/// From where to where, of Lighter and of a peer. A peer has no command line and no supervisor of its own: beside
/// Lighter's whole start there is the part from the start of its monitor's process.
type Point<Other> = (&'static str, fn(&Run) -> Option<f64>, fn(&Other) -> Option<f64>);

const POINTS: [Point<ConsoleRun>; 5] = [
    (
        "process start to agent running",
        |run| Some(run.console.agent_running_ms),
        |peer| Some(peer.agent_running_ms),
    ),
    (
        "monitor start to agent running",
        |run| Some(run.console.agent_running_ms - run.at(Milestone::MonitorStarted)?),
        |peer| Some(peer.agent_running_ms),
    ),
    (
        "start of the kernel's clock to agent running",
        |run| run.console.kernel_to_agent_ms,
        |peer| peer.kernel_to_agent_ms,
    ),
    (
        "agent running to engine ready",
        |run| Some(run.console.engine_ready_ms - run.console.agent_running_ms),
        |peer| Some(peer.engine_ready_ms - peer.agent_running_ms),
    ),
    (
        "process start to engine ready",
        |run| Some(run.console.engine_ready_ms),
        |peer| Some(peer.engine_ready_ms),
    ),
];

fn between(run: &Run, from: Milestone, to: Milestone) -> Option<f64> {
    Some(run.at(to)? - run.at(from)?)
}

const SYSTEM_POINTS: [Point<SystemRun>; 3] = [
    (
        "process start to engine's first answer",
        |run| between(run, Milestone::ProcessStarted, Milestone::EngineAnswers),
        |system| Some(system.engine_answers_ms),
    ),
    (
        "monitor start to engine's first answer",
        |run| between(run, Milestone::MonitorStarted, Milestone::EngineAnswers),
        |system| Some(system.engine_answers_ms),
    ),
    (
        "first guest instruction to engine's first answer",
        |run| between(run, Milestone::GuestEntered, Milestone::EngineAnswers),
        |system| Some(system.engine_answers_ms - system.guest_entered_ms),
    ),
];

/// Pairs in which one has no such time are left out.
fn rows<Other>(points: &[Point<Other>], runs: &[Run], others: &[Other]) -> Vec<Row> {
    let row = |&(what, of_lighter, of_other): &Point<Other>| {
        let pairs = runs.iter().zip(others);
        let (these, those): (Vec<f64>, Vec<f64>) = pairs
            .filter_map(|(run, other)| Some((of_lighter(run)?, of_other(other)?)))
            .unzip();
        Row {
            what,
            ratio: Ratio::of(&these, &those),
            these: Spread::of(these),
            those: Spread::of(those),
        }
    };
    points.iter().map(row).collect()
}

impl Comparison {
    /// Each boot with the peer's that followed it.
    pub fn with_peer(contender: &Contender, runs: &[Run], peer_runs: Vec<ConsoleRun>) -> Self {
        Self {
            these: "lighter",
            those: contender.name,
            about: std::iter::once(contender.version.clone())
                .chain(contender.settings().lines().map(str::to_owned))
                .collect(),
            ratios: "pair by pair",
            rows: rows(&POINTS, runs, &peer_runs),
            peer_runs,
            system_runs: vec![],
        }
    }

    /// Each boot with the other system's that followed it. What that says of itself is its last boot's.
    pub fn with_system(system: &System, runs: &[Run], system_runs: Vec<SystemRun>) -> Self {
        let about = [
            format!(
                "{}, in Lighter's monitor, without a network",
                system.disk.display()
            ),
            format!("kernel command line: {}", system.command_line()),
        ];
        let times = system_runs.last().map_or(&[][..], |run| &run.times);
        Self {
            these: "lighter",
            those: "the other system",
            about: about.into_iter().chain(times.iter().cloned()).collect(),
            ratios: "pair by pair",
            rows: rows(&SYSTEM_POINTS, runs, &system_runs),
            peer_runs: vec![],
            system_runs,
        }
    }

    /// Each phase with the same of an earlier run.
    pub fn with_baseline(runs: &[Run], saved: &Saved) -> Self {
        let rows = PHASES.iter().chain([&START]).map(|phase| {
            let (these, those) = (phase.all_ms(runs), phase.all_ms(&saved.runs));
            Row {
                what: phase.title,
                ratio: Ratio::across(&these, &those),
                these: Spread::of(these),
                those: Spread::of(those),
            }
        });
        let about = saved.environment.lines().into_iter();
        Self {
            these: "this run",
            those: "baseline",
            about: about.map(|(what, which)| format!("{what}: {which}")).collect(),
            ratios: "every boot with every boot of the baseline",
            rows: rows.collect(),
            peer_runs: vec![],
            system_runs: vec![],
        }
    }

    /// What it is a comparison of.
    pub fn title(&self) -> String {
        let (first, rest) = self.these.split_at(1);
        format!("{}{rest} beside {}", first.to_uppercase(), self.those)
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut table = table::plain();
        table.set_header(["", self.these, self.those, "ratio (middle half)"]);
        for row in &self.rows {
            table.add_row([
                row.what.to_owned(),
                spread_text(row.these),
                spread_text(row.those),
                ratio_text(row.ratio),
            ]);
        }
        table::align_numbers(&mut table);
        format!(
            "{}, ms, min / median / max; ratios {}\n{table}\n{}\n",
            self.title(),
            self.ratios,
            self.about.join("\n")
        )
    }
}

/// Median and middle half.
pub fn ratio_text(ratio: Option<Ratio>) -> String {
    match ratio {
        Some(Ratio { median, low, high }) => format!("{median:.2} ({low:.2} to {high:.2})"),
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::environment::tests::somewhere;
    use super::super::phases::tests::runs;
    use super::*;

    #[test]
    fn a_baseline_is_compared_phase_by_phase() {
        let saved = Saved {
            environment: somewhere(),
            runs: runs(3, 2.0),
        };
        let comparison = Comparison::with_baseline(&runs(3, 1.0), &saved);
        assert_eq!(comparison.rows.len(), PHASES.len() + 1);
        let start = comparison.rows.last().unwrap();
        let ratio = start.ratio.unwrap();
        assert!((0.49..0.51).contains(&ratio.median), "{ratio:?}");
        assert!(comparison.text().contains("baseline"));
    }
}
