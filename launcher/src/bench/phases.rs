//! The milestones of a cold boot, on one clock (the host's CLOCK_MONOTONIC), and the phases between them.

use super::counters::Counters;
use super::milestones::Milestones;
use super::once::Measured;
use super::stats::Spread;
use crate::error::{Error, Result};
use crate::memory::Memory;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Who stamps a milestone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// This host.
    Host,
    /// The guest; converted, with an error of half the clock comparison's round trip.
    Guest,
}

/// What a boot gets to, in the usual order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Milestone {
    /// Just before the process is started that does what `lighter start` does.
    ProcessStarted,
    /// The supervisor's `main`.
    SupervisorStarted,
    /// The monitor's `main`.
    MonitorStarted,
    /// The machine is built.
    MonitorReady,
    /// The first guest instruction.
    GuestEntered,
    /// The stamp of the kernel's first line, which is when its log's clock begins.
    KernelFirstLine,
    /// The root disk is mounted.
    RootMounted,
    /// The kernel runs PID 1.
    KernelDone,
    /// The agent's first instruction.
    AgentStarted,
    /// The agent's greeting is here.
    AgentGreeted,
    /// The agent has set the network up.
    NetworkUp,
    /// The data disk is mounted.
    DataMounted,
    /// containerd said READY=1.
    ContainerdReady,
    /// dockerd did.
    DockerdReady,
    /// `/_ping` was answered on the host's socket.
    EngineAnswers,
    /// The image of the first container is in the engine.
    ImageLoaded,
    /// The first byte of the first container.
    FirstContainer,
}

/// From one milestone to another.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Phase {
    /// For people.
    pub title: &'static str,
    /// Where it begins.
    pub from: Milestone,
    /// Where it ends.
    pub to: Milestone,
    /// Who stamps the end.
    pub stamped_by: Clock,
}

const fn phase(title: &'static str, from: Milestone, to: Milestone, stamped_by: Clock) -> Phase {
    Phase {
        title,
        from,
        to,
        stamped_by,
    }
}

/// Every milestone but the first ends one phase. containerd and dockerd start side by side, and so do network and data disk,
/// and the agent's greeting with all that it does next.
pub const PHASES: [Phase; 16] = {
    use Clock::{Guest, Host};
    use Milestone as M;
    [
        phase("command line", M::ProcessStarted, M::SupervisorStarted, Host),
        phase("supervisor", M::SupervisorStarted, M::MonitorStarted, Host),
        phase("monitor configured", M::MonitorStarted, M::MonitorReady, Host),
        phase("first guest instruction", M::MonitorReady, M::GuestEntered, Host),
        phase("kernel's first line", M::GuestEntered, M::KernelFirstLine, Guest),
        phase("root disk mounted", M::KernelFirstLine, M::RootMounted, Guest),
        phase("kernel done", M::RootMounted, M::KernelDone, Guest),
        phase("agent started", M::KernelDone, M::AgentStarted, Guest),
        phase("agent's greeting", M::AgentStarted, M::AgentGreeted, Host),
        phase("network up", M::AgentStarted, M::NetworkUp, Guest),
        phase("data disk mounted", M::AgentStarted, M::DataMounted, Guest),
        phase("containerd ready", M::DataMounted, M::ContainerdReady, Guest),
        phase("dockerd ready", M::DataMounted, M::DockerdReady, Guest),
        phase("first /_ping answered", M::DockerdReady, M::EngineAnswers, Host),
        phase("first image imported", M::EngineAnswers, M::ImageLoaded, Host),
        phase(
            "first container's first byte",
            M::ImageLoaded,
            M::FirstContainer,
            Host,
        ),
    ]
};

/// The whole of a start, from the process to the engine.
pub const START: Phase = phase(
    "process start to engine",
    Milestone::ProcessStarted,
    Milestone::EngineAnswers,
    Clock::Host,
);

impl Phase {
    /// How long it took in a boot, milliseconds; less than nothing when the clocks' comparison was that far off.
    pub fn ms(&self, run: &Run) -> Option<f64> {
        Some(run.at(self.to)? - run.at(self.from)?)
    }

    /// Of each boot that has it.
    pub fn all_ms(&self, runs: &[Run]) -> Vec<f64> {
        runs.iter().filter_map(|run| self.ms(run)).collect()
    }
}

/// One boot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Milliseconds since the process was started.
    pub milestones_ms: BTreeMap<Milestone, f64>,
    /// How far those stamped by the guest may be off, milliseconds.
    pub clock_error_ms: f64,
    /// The agent's lines on the console: what other monitors are measured by.
    pub console: ConsoleRun,
    /// What the monitor and its guest did until the engine answered.
    pub counters: Counters,
    /// The monitor's memory.
    pub memory: Memory,
}

impl Run {
    /// From the stamps of a boot whose process was started at `process_started_ns`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn new(process_started_ns: u64, measured: &Measured) -> Result<Self> {
        let missing = |what: &str| {
            Error::failure(format!("a boot has no stamp for: {what}")).hint(
                "the guest image or its kernel is older than this program: build and install all from one checkout",
            )
        };
        let timeline = measured.timeline;
        let clock = measured.boot_clock.ok_or_else(|| missing("the guest's clock"))?;
        let host = |what: &str, ns: Option<u64>| ns.ok_or_else(|| missing(what));
        let step = |name: &str| {
            let found = measured.steps.iter().find(|step| step.name == name);
            found.ok_or_else(|| missing(&format!("the guest's step {name}")))
        };
        let began = |name: &str| step(name).map(|step| clock.to_host_ns(step.began_ns));
        let ended = |name: &str| step(name).map(|step| clock.to_host_ns(step.ended_ns));
        use Milestone as M;
        let mut stamps = vec![
            (M::ProcessStarted, process_started_ns),
            (
                M::SupervisorStarted,
                host("supervisor", timeline.supervisor_started_ns)?,
            ),
            (
                M::MonitorStarted,
                host("monitor started", timeline.monitor_started_ns)?,
            ),
            (M::MonitorReady, host("monitor ready", timeline.monitor_ready_ns)?),
            (
                M::GuestEntered,
                host("first guest instruction", timeline.guest_entered_ns)?,
            ),
            (M::KernelFirstLine, began("kernel")?),
            (M::RootMounted, ended("root-disk-mounted")?),
            (M::KernelDone, ended("kernel")?),
            (M::AgentStarted, began("agent")?),
            (
                M::AgentGreeted,
                host("agent's greeting", timeline.agent_running_ns)?,
            ),
            (M::NetworkUp, ended("network")?),
            (M::DataMounted, ended("data-disk-mount")?),
            (M::ContainerdReady, ended("containerd")?),
            (M::DockerdReady, ended("dockerd")?),
            (M::EngineAnswers, measured.answered_ns),
        ];
        if let Some(container) = measured.container {
            stamps.push((M::ImageLoaded, container.image_loaded_ns));
            stamps.push((M::FirstContainer, container.first_byte_ns));
        }
        let ms = |ns: u64| (i128::from(ns) - i128::from(process_started_ns)) as f64 / 1e6;
        Ok(Self {
            milestones_ms: stamps
                .into_iter()
                .map(|(milestone, ns)| (milestone, ms(ns)))
                .collect(),
            clock_error_ms: clock.error_ns() as f64 / 1e6,
            console: ConsoleRun::new(process_started_ns, measured.console),
            counters: measured.counters.clone(),
            memory: measured.memory,
        })
    }

    /// When it got there, milliseconds since the process was started.
    pub fn at(&self, milestone: Milestone) -> Option<f64> {
        self.milestones_ms.get(&milestone).copied()
    }
}

/// The boot whose length is the middle one: the one to be drawn.
pub fn median_run(runs: &[Run]) -> Option<&Run> {
    let mut sorted: Vec<&Run> = runs.iter().filter(|run| START.ms(run).is_some()).collect();
    sorted.sort_by(|a, b| f64::total_cmp(&START.ms(a).unwrap_or_default(), &START.ms(b).unwrap_or_default()));
    sorted.get(sorted.len().saturating_sub(1) / 2).copied()
}

/// How far the guest's stamps may be off at the most.
pub fn clock_error(runs: &[Run]) -> Option<Spread> {
    Spread::of(runs.iter().map(|run| run.clock_error_ms))
}

/// One boot as the console shows it: milliseconds from the start of the process.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConsoleRun {
    /// The agent runs.
    pub agent_running_ms: f64,
    /// The same since the start of the clock of the kernel's log.
    #[serde(default)]
    pub kernel_to_agent_ms: Option<f64>,
    /// The engine is ready.
    pub engine_ready_ms: f64,
}

impl ConsoleRun {
    /// Of a process that was started at `started_ns`.
    pub fn new(started_ns: u64, milestones: Milestones) -> Self {
        let ms = |ns: u64| ns.saturating_sub(started_ns) as f64 / 1e6;
        Self {
            agent_running_ms: ms(milestones.agent_running_ns),
            kernel_to_agent_ms: milestones.agent_running_kernel_us.map(|us| us as f64 / 1e3),
            engine_ready_ms: ms(milestones.engine_ready_ns),
        }
    }
}

#[cfg(test)]
#[path = "phases_tests.rs"]
pub mod tests;
