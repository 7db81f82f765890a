//! What `lighter bench boot` says.

use super::boot::Measured;
use super::counters::Counters;
use super::milestones::Milestones;
use super::peer::Contender;
use super::stats::{Ratio, Spread};
use crate::error::{Error, Result};
use crate::memory::Memory;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use serde_json::json;

/// One boot: milliseconds from the start of the process.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    monitor_started_ms: f64,
    monitor_ready_ms: f64,
    guest_entered_ms: f64,
    agent_running_ms: f64,
    engine_answers_ms: f64,
    /// The part between the last two.
    agent_to_engine_ms: f64,
    /// containerd's own start, as the agent saw it.
    containerd_ms: Option<f64>,
    /// dockerd's own start.
    dockerd_ms: Option<f64>,
    /// The agent's lines on the console: what peers are measured by.
    console: PeerRun,
    counters: Counters,
    memory: Memory,
}

impl Run {
    /// From the stamps of a boot whose process was started at `process_started_ns`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn new(process_started_ns: u64, measured: &Measured) -> Result<Self> {
        let ms = |ns: u64| ns.saturating_sub(process_started_ns) as f64 / 1e6;
        let stamp = |what: &str, ns: Option<u64>| {
            ns.map(ms)
                .ok_or_else(|| Error::failure(format!("a boot has no stamp for: {what}")))
        };
        let step = |name: &str| {
            let found = measured.steps.iter().find(|step| step.name == name);
            found.map(|step| step.ended_ns.saturating_sub(step.began_ns) as f64 / 1e6)
        };
        let timeline = measured.timeline;
        let agent_running_ms = stamp("agent running", timeline.agent_running_ns)?;
        let engine_answers_ms = ms(measured.answered_ns);
        Ok(Self {
            monitor_started_ms: stamp("monitor started", timeline.monitor_started_ns)?,
            monitor_ready_ms: stamp("monitor ready", timeline.monitor_ready_ns)?,
            guest_entered_ms: stamp("first guest instruction", timeline.guest_entered_ns)?,
            agent_running_ms,
            engine_answers_ms,
            agent_to_engine_ms: engine_answers_ms - agent_running_ms,
            containerd_ms: step("containerd"),
            dockerd_ms: step("dockerd"),
            console: PeerRun::new(process_started_ns, measured.console),
            counters: measured.counters.clone(),
            memory: measured.memory,
        })
    }
}

/// One boot as the console shows it: milliseconds from the start of the process.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PeerRun {
    agent_running_ms: f64,
    engine_ready_ms: f64,
}

impl PeerRun {
    /// Of a process that was started at `started_ns`.
    pub fn new(started_ns: u64, milestones: Milestones) -> Self {
        let ms = |ns: u64| ns.saturating_sub(started_ns) as f64 / 1e6;
        Self {
            agent_running_ms: ms(milestones.agent_running_ns),
            engine_ready_ms: ms(milestones.engine_ready_ns),
        }
    }
}

/// Lighter beside one peer.
#[derive(Debug, Serialize)]
pub struct Beside {
    name: &'static str,
    version: String,
    settings: String,
    runs: Vec<PeerRun>,
    points: Vec<Point>,
}

/// One comparison.
#[derive(Debug, Serialize)]
struct Point {
    what: &'static str,
    lighter: Option<Spread>,
    peer: Option<Spread>,
    /// Lighter's by the peer's in the same run.
    ratio: Option<Ratio>,
}

/// From where to where, of Lighter and of a peer. A peer has no command line and no supervisor of its own: beside
/// Lighter's whole start there is the part from the start of its monitor's process.
type Comparison = (&'static str, fn(&Run) -> f64, fn(&PeerRun) -> f64);

const COMPARISONS: [Comparison; 4] = [
    (
        "process start to agent running",
        |run| run.console.agent_running_ms,
        |peer| peer.agent_running_ms,
    ),
    (
        "monitor start to agent running",
        |run| run.console.agent_running_ms - run.monitor_started_ms,
        |peer| peer.agent_running_ms,
    ),
    (
        "agent running to engine ready",
        |run| run.console.engine_ready_ms - run.console.agent_running_ms,
        |peer| peer.engine_ready_ms - peer.agent_running_ms,
    ),
    (
        "process start to engine ready",
        |run| run.console.engine_ready_ms,
        |peer| peer.engine_ready_ms,
    ),
];

impl Beside {
    /// Compares runs, each with its neighbour.
    pub fn new(contender: &Contender, runs: &[Run], peer_runs: Vec<PeerRun>) -> Self {
        let point = |&(what, of_lighter, of_peer): &Comparison| {
            let lighter: Vec<f64> = runs.iter().map(of_lighter).collect();
            let peer: Vec<f64> = peer_runs.iter().map(of_peer).collect();
            Point {
                what,
                ratio: Ratio::of(&lighter, &peer),
                lighter: Spread::of(lighter),
                peer: Spread::of(peer),
            }
        };
        Self {
            name: contender.name,
            version: contender.version.clone(),
            settings: contender.settings(),
            points: COMPARISONS.iter().map(point).collect(),
            runs: peer_runs,
        }
    }

    fn text(&self) -> String {
        let spread = |spread: Option<Spread>| match spread {
            Some(Spread { min, median, max }) => format!("{min:.0} / {median:.0} / {max:.0}"),
            None => "-".into(),
        };
        let ratio = |ratio: Option<Ratio>| match ratio {
            Some(Ratio { median, low, high }) => format!("{median:.2} ({low:.2} to {high:.2})"),
            None => "-".into(),
        };
        let mut table = plain_table();
        table.set_header(["", "lighter", self.name, "ratio (middle half)"]);
        for point in &self.points {
            table.add_row([
                point.what.to_owned(),
                spread(point.lighter),
                spread(point.peer),
                ratio(point.ratio),
            ]);
        }
        align_numbers(&mut table);
        format!(
            "Lighter beside {} ({}), ms, min / median / max\n{table}\n{}\n",
            self.name, self.version, self.settings
        )
    }
}

/// All of it.
#[derive(Debug)]
pub struct Report {
    /// Lighter's boots.
    pub runs: Vec<Run>,
    /// Beside those of others.
    pub peers: Vec<Beside>,
}

impl Report {
    /// For programs.
    pub fn json(&self) -> serde_json::Value {
        json!({ "runs": self.runs, "summary": summary(&self.runs), "peers": self.peers })
    }

    /// For people.
    pub fn text(&self) -> String {
        let peers = self.peers.iter().map(Beside::text);
        std::iter::once(table(&self.runs))
            .chain(peers)
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// A table without lines.
pub fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

/// Aligns all columns but the first to the right.
pub fn align_numbers(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

/// A column of the report.
struct Column {
    title: &'static str,
    value: fn(&Run) -> Option<f64>,
}

const COLUMNS: [Column; 9] = [
    Column {
        title: "monitor ready ms",
        value: |run| Some(run.monitor_ready_ms),
    },
    Column {
        title: "first instruction ms",
        value: |run| Some(run.guest_entered_ms),
    },
    Column {
        title: "agent running ms",
        value: |run| Some(run.agent_running_ms),
    },
    Column {
        title: "engine answers ms",
        value: |run| Some(run.engine_answers_ms),
    },
    Column {
        title: "agent to engine ms",
        value: |run| Some(run.agent_to_engine_ms),
    },
    Column {
        title: "containerd ms",
        value: |run| run.containerd_ms,
    },
    Column {
        title: "dockerd ms",
        value: |run| run.dockerd_ms,
    },
    Column {
        title: "monitor RSS KiB",
        value: |run| Some(run.memory.monitor_rss_kib as f64),
    },
    Column {
        title: "monitor private KiB",
        value: |run| Some(run.memory.monitor_private_kib as f64),
    },
];

fn spreads(runs: &[Run]) -> Vec<(&'static str, Option<Spread>)> {
    let spread = |column: &Column| Spread::of(runs.iter().filter_map(column.value));
    COLUMNS
        .iter()
        .map(|column| (column.title, spread(column)))
        .collect()
}

fn summary(runs: &[Run]) -> serde_json::Map<String, serde_json::Value> {
    let entry =
        |(title, spread): (&str, Option<Spread>)| (title.replace(' ', "_"), serde_json::json!(spread));
    spreads(runs).into_iter().map(entry).collect()
}

fn table(runs: &[Run]) -> String {
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
    let mut table = plain_table();
    table.set_header(
        ["run"]
            .into_iter()
            .chain(COLUMNS.iter().map(|column| column.title)),
    );
    for (index, run) in runs.iter().enumerate() {
        let values = COLUMNS.iter().map(|column| number((column.value)(run)));
        table.add_row([(index + 1).to_string()].into_iter().chain(values));
    }
    let spreads = spreads(runs);
    for (name, edge) in [
        ("min", (|spread| spread.min) as fn(Spread) -> f64),
        ("median", |spread| spread.median),
        ("max", |spread| spread.max),
    ] {
        let values = spreads.iter().map(|(_, spread)| number(spread.map(edge)));
        table.add_row([name.to_owned()].into_iter().chain(values));
    }
    align_numbers(&mut table);
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::agent::Step;
    use lighter_protocol::supervisor::Timeline;

    #[test]
    fn times_count_from_the_start_of_the_process() {
        let measured = Measured {
            timeline: Timeline {
                supervisor_started_ns: Some(2_000_000),
                monitor_started_ns: Some(3_000_000),
                monitor_ready_ns: Some(4_000_000),
                guest_entered_ns: Some(5_000_000),
                agent_running_ns: Some(6_000_000),
                engine_ready_ns: Some(8_000_000),
            },
            answered_ns: 9_000_000,
            console: Milestones {
                agent_running_ns: 7_000_000,
                engine_ready_ns: 8_500_000,
            },
            steps: vec![Step {
                name: "dockerd".into(),
                began_ns: 1_000_000,
                ended_ns: 2_500_000,
            }],
            counters: Counters::new(),
            memory: Memory::default(),
        };
        let run = Run::new(1_000_000, &measured).unwrap();
        assert_eq!(run.guest_entered_ms, 4.0);
        assert_eq!(run.engine_answers_ms, 8.0);
        assert_eq!(run.agent_to_engine_ms, 3.0);
        assert_eq!(run.dockerd_ms, Some(1.5));
        assert_eq!(run.containerd_ms, None);
        assert_eq!(run.console.engine_ready_ms, 7.5);
        assert!(table(&[run]).contains("median"));
    }
}
