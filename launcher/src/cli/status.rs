//! `lighter status`.

use super::{Json, Target};
use crate::autostart::{Autostart, When};
use crate::client;
use crate::error::{Code, Result};
use crate::paths::Paths;
use crate::size::Size;
use crate::supervisor::suspension::is_suspended;
use crate::vm::{VANISHED, Vm};
use clap::Args;
use lighter_protocol::activity::Activity;
use lighter_protocol::agent::EngineState;
use lighter_protocol::monitor::Cage;
use lighter_protocol::supervisor::{End, IdentityState, Origin, Phase, Status};
use serde::Serialize;
use std::fmt::Write;

/// Arguments.
#[derive(Debug, Args)]
pub struct Show {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    output: Json,
}

/// A VM as `ls`, `status` and `inspect` show it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// `stopped`, `suspended`, `failed`, or the phase of its life. A suspended VM that goes on when it is used has `running`.
    pub state: &'static str,
    /// vCPUs.
    pub cpus: u16,
    /// Guest memory.
    #[serde(rename = "memory_bytes", serialize_with = "bytes")]
    pub memory: Size,
    /// Data disk.
    #[serde(rename = "disk_bytes", serialize_with = "bytes")]
    pub disk: Size,
    /// What the data disk takes on the host.
    #[serde(rename = "disk_used_bytes", serialize_with = "optional_bytes")]
    pub disk_used: Option<Size>,
    /// The engine's socket.
    pub docker_socket: String,
    /// When systemd starts it, if it does.
    pub autostart: Option<When>,
    /// What the supervisor says, of a VM that runs or stands by.
    pub running: Option<Status>,
    /// How it last ended.
    pub last_end: Option<End>,
    /// Nobody noted how: its supervisor was killed, or the host went down.
    pub vanished: bool,
}

fn bytes<S: serde::Serializer>(size: &Size, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_u64(size.0)
}

fn optional_bytes<S: serde::Serializer>(
    size: &Option<Size>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    size.map(|size| size.0).serialize(serializer)
}

impl Report {
    /// Looks at a VM.
    ///
    /// # Errors
    /// When its supervisor is not understood.
    pub fn of(vm: &Vm) -> Result<Self> {
        let running = client::status(vm)?;
        let last_end = vm.last_end();
        let vanished = running.is_none() && vm.vanished();
        Ok(Self {
            name: vm.name.to_string(),
            state: match &running {
                Some(status) => phase_name(status),
                None if is_suspended(&vm.paths) => "suspended",
                None if vanished || last_end.as_ref().is_some_and(|end| !end.is_clean()) => "failed",
                None => "stopped",
            },
            cpus: vm.settings.cpus,
            memory: vm.settings.memory,
            disk: vm.settings.disk,
            disk_used: vm.disk_used(),
            docker_socket: vm.paths.docker_socket().display().to_string(),
            autostart: Autostart::of(&vm.paths).map(|autostart| autostart.when),
            running,
            last_end,
            vanished,
        })
    }

    /// In a word or two.
    pub fn state(&self) -> String {
        let on_demand = self.running.is_none() && self.autostart == Some(When::Demand);
        match self.stands_by() || on_demand {
            true => format!("{}, wakes", self.state),
            false => self.state.into(),
        }
    }

    /// Whether it is suspended and goes on when it is used.
    fn stands_by(&self) -> bool {
        let phase = self.running.as_ref().map(|status| status.phase);
        phase == Some(Phase::StandingBy)
    }
}

fn phase_name(status: &Status) -> &'static str {
    match status.phase {
        Phase::StandingBy => "suspended",
        Phase::Starting | Phase::Booting => "starting",
        Phase::EngineStarting => match status.engine {
            Some(EngineState::Failed { .. }) => "engine-failed",
            _ => "starting",
        },
        Phase::Ready => "running",
        Phase::Stopping => "stopping",
        Phase::Ended => "stopped",
    }
}

impl Show {
    /// Shows it. Returns the exit code: 3 when the VM is not running, which one that stands by is not either.
    ///
    /// # Errors
    /// When there is no such VM.
    pub fn run(self, paths: &Paths) -> Result<u8> {
        let vm = Vm::load(paths, &self.target.name)?;
        let report = Report::of(&vm)?;
        let code = match report.running {
            Some(_) if !report.stands_by() => 0,
            _ => Code::NotRunning.number(),
        };
        if self.output.json {
            super::print_json(&report)?;
        } else {
            let ports = client::ports(&vm)?.map_or(0, |ports| ports.len());
            super::print(&text(&report, ports))?;
        }
        Ok(code)
    }
}

fn hours(seconds: u64) -> String {
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Why it is in use, or for how long it is not.
fn usage(activity: &Activity) -> String {
    let busy: Vec<String> = activity.busy.iter().map(ToString::to_string).collect();
    let suspends = match activity.auto_suspend_s {
        Some(after) => format!("suspends when idle for {}", hours(after)),
        None => "does not suspend by itself".into(),
    };
    match activity.idle_s {
        Some(idle) => format!("idle for {}; {suspends}", hours(idle)),
        None => format!("{}; {suspends}", busy.join(", ")),
    }
}

/// What keeps a hostile guest from the host.
fn layers(cage: &Cage) -> String {
    let missing = cage.holes();
    match missing.as_slice() {
        [] => "all layers".into(),
        missing => format!("without {}", missing.join(", without ")),
    }
}

fn text(report: &Report, ports: usize) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{key:<10} {value}");
    };
    line("name", report.name.clone());
    let state = match report.stands_by() {
        true => "suspended; goes on when its socket or a published port is used",
        false => report.state,
    };
    line("state", state.into());
    line(
        "size",
        format!("{} vCPUs, {} of memory", report.cpus, report.memory.human()),
    );
    let used = report
        .disk_used
        .map_or("missing".into(), |used| format!("{} used", used.human()));
    line("disk", format!("{}, {used}", report.disk.human()));
    line("socket", report.docker_socket.clone());
    if let Some(when) = report.autostart {
        line("autostart", when.words().into());
    }
    if let Some(status) = &report.running {
        let since = crate::clock::unix_ms().saturating_sub(status.started_unix_ms) / 1000;
        let key = match report.stands_by() {
            true => "suspended",
            false => "up",
        };
        line(key, hours(since));
        if let Some(activity) = status.activity.as_ref().filter(|_| !report.stands_by()) {
            line("use", usage(activity));
        }
        let monitor = status.monitor_pid.map_or("none".into(), |pid| pid.to_string());
        line(
            "processes",
            format!("supervisor {}, monitor {monitor}", status.supervisor_pid),
        );
        if let Some(cage) = &status.cage {
            line("cage", layers(cage));
        }
        if let Origin::Template(name) = &status.origin {
            line("from", format!("template {name}"));
        }
        if let Some(version) = &status.agent_version {
            line("agent", version.clone());
        }
        match &status.engine {
            Some(EngineState::Starting) => line("engine", "starting".into()),
            Some(EngineState::Ready) => line("engine", "ready".into()),
            Some(EngineState::Stopped) => line("engine", "stopped".into()),
            Some(EngineState::Failed {
                reason, retry_in_ms, ..
            }) => {
                let next = if retry_in_ms.is_some() {
                    "is started again"
                } else {
                    "was given up"
                };
                line("engine", format!("failed and {next}: {reason}"));
            }
            None => {}
        }
        match status.identity {
            Some(IdentityState::Pending) => line("identity", "the snapshot's still; nobody is served".into()),
            Some(IdentityState::Refused) => line("identity", "the snapshot's; nobody is served".into()),
            Some(IdentityState::Taken) | None => {}
        }
        if ports > 0 {
            line(
                "ports",
                format!("{ports} published; lighter ports {}", report.name),
            );
        }
        if let Some(offset) = status.clock_offset_ns {
            line("clock", format!("{:+.1} ms from the host's", offset as f64 / 1e6));
        }
        if let Some(trouble) = &status.trouble {
            let since = crate::clock::unix_ms().saturating_sub(trouble.unix_ms) / 1000;
            line(
                "trouble",
                format!("{} ({since} s ago): {}", trouble.device, trouble.reason),
            );
        }
    } else if let Some(end) = &report.last_end {
        line("last end", end.sentence());
        for text in &end.last_lines {
            line("", format!("| {text}"));
        }
    } else if report.vanished {
        line("last end", VANISHED.into());
    }
    out
}
