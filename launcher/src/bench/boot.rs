//! `lighter bench boot`.
//!
//! Each boot is done by a fresh process that does what `lighter start` does, and is timed from just before that process is
//! started. All stamps are the host's CLOCK_MONOTONIC.

use super::memory::{self, Memory};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::clock::monotonic_ns;
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::throw_away::ThrowAway;
use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use lighter_protocol::agent::Step;
use lighter_protocol::supervisor::Timeline;
use serde::{Deserialize, Serialize};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Arguments.
#[derive(Debug, Args)]
pub struct Boot {
    /// How many boots
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    output: Json,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct BootOnce {
    #[command(flatten)]
    options: MachineOptions,
}

/// What one boot reports.
#[derive(Debug, Serialize, Deserialize)]
struct Measured {
    timeline: Timeline,
    answered_ns: u64,
    steps: Vec<Step>,
    memory: Memory,
}

impl BootOnce {
    /// Boots one VM, prints what was measured, removes the VM.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = self.options.settings(&Config::load(&paths.config_file)?)?;
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::start(paths, "bench", settings, deadline, &Progress::new(false))?;
        let pid = engine
            .status
            .monitor_pid
            .ok_or_else(|| Error::failure("the supervisor does not tell the monitor's process id"))?;
        print_json(&Measured {
            timeline: engine.status.timeline,
            answered_ns: engine.answered_ns,
            steps: engine.status.steps.clone(),
            memory: memory::of(pid)?,
        })
    }
}

/// One boot: milliseconds from the start of the process.
#[derive(Clone, Debug, Serialize)]
struct Run {
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
    memory: Memory,
}

impl Run {
    fn new(process_started_ns: u64, measured: &Measured) -> Result<Self> {
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
            memory: measured.memory,
        })
    }
}

impl Boot {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot.
    pub fn run(self) -> Result<()> {
        let program = std::env::current_exe().context(|| "cannot find this program".into())?;
        let progress = Progress::new(!self.output.json);
        let mut runs = vec![];
        for number in 1..=self.runs {
            progress.say(&format!("boot {number} of {}", self.runs));
            runs.push(self.once(&program)?);
        }
        drop(progress);
        if self.output.json {
            return print_json(&serde_json::json!({ "runs": runs, "summary": summary(&runs) }));
        }
        print(&table(&runs))
    }

    fn once(&self, program: &std::path::Path) -> Result<Run> {
        let failed = || format!("cannot run {}", program.display());
        let mut command = Command::new(program);
        command
            .args(["bench", "boot-once"])
            .args(self.arguments())
            .stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let process_started_ns = monotonic_ns();
        let output = command
            .spawn()
            .and_then(std::process::Child::wait_with_output)
            .context(failed)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Error::failure(format!("a boot failed ({})", output.status))
                .lines(said.lines().map(str::to_owned).collect()));
        }
        let measured =
            serde_json::from_slice(&output.stdout).context(|| "a boot's report is not understood".into())?;
        Run::new(process_started_ns, &measured)
    }

    /// The options, for the process that boots.
    fn arguments(&self) -> Vec<std::ffi::OsString> {
        let options = &self.options;
        let mut arguments = vec![];
        let mut add = |name: &str, value: Option<std::ffi::OsString>| {
            if let Some(value) = value {
                arguments.extend([name.into(), value]);
            }
        };
        add("--cpus", options.cpus.map(|cpus| cpus.to_string().into()));
        add("--memory", options.memory.map(|size| size.to_string().into()));
        add("--disk", options.disk.map(|size| size.to_string().into()));
        add(
            "--kernel",
            options.kernel.as_ref().map(|path| path.clone().into()),
        );
        add("--image", options.image.as_ref().map(|path| path.clone().into()));
        arguments
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

/// The middle and the edges of a column.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self { min, median, max })
    }
}

fn spreads(runs: &[Run]) -> Vec<(&'static str, Option<Spread>)> {
    let spread = |column: &Column| Spread::of(runs.iter().filter_map(column.value).collect());
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
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
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
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!(Spread::of(vec![]), None);
    }

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
            steps: vec![Step {
                name: "dockerd".into(),
                began_ns: 1_000_000,
                ended_ns: 2_500_000,
            }],
            memory: Memory::default(),
        };
        let run = Run::new(1_000_000, &measured).unwrap();
        assert_eq!(run.guest_entered_ms, 4.0);
        assert_eq!(run.engine_answers_ms, 8.0);
        assert_eq!(run.agent_to_engine_ms, 3.0);
        assert_eq!(run.dockerd_ms, Some(1.5));
        assert_eq!(run.containerd_ms, None);
        assert!(table(&[run]).contains("median"));
    }
}
