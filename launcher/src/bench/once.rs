//! One boot, in a process of its own, so that a boot begins where a user's does.

use super::console;
use super::counters::{self, Counters};
use super::first_container::{self, Container};
use super::milestones::Milestones;
use super::phases::Run;
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::print_json;
use crate::clock::monotonic_ns;
use crate::config::Config;
use crate::die_with_parent::die_with_parent;
use crate::error::{Context, Error, Result};
use crate::logs::Source;
use crate::memory::{self, Memory};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use lighter_protocol::agent::Step;
use lighter_protocol::supervisor::{BootClock, Timeline};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

/// How the names of the VMs begin.
const NAME: &str = "bench";

/// Arguments.
#[derive(Debug, Args)]
pub struct BootOnce {
    #[command(flatten)]
    options: MachineOptions,
}

/// What one boot reports.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// The supervisor's stamps.
    pub timeline: Timeline,
    /// How the steps' times relate to the timeline's.
    pub boot_clock: Option<BootClock>,
    /// The engine answered on the host's socket.
    pub answered_ns: u64,
    /// The agent's announcements on the console.
    pub console: Milestones,
    /// What the agent did.
    pub steps: Vec<Step>,
    /// What the monitor and its guest did until the engine answered.
    pub counters: Counters,
    /// The first container.
    pub container: Option<Container>,
    /// The monitor's memory, after the first container.
    pub memory: Memory,
}

impl BootOnce {
    /// Boots one VM, prints what was measured, removes the VM.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let settings = Settings {
            announce: true,
            ..self.options.settings(&Config::load(&paths.config_file)?)?
        };
        paths.create_vms()?;
        let console = paths.vm(&ThrowAway::name(NAME)?).log(Source::Console);
        let console = console::Watch::start(console)?;
        let deadline = Instant::now() + START_TIMEOUT;
        let engine = ThrowAway::boot(paths, NAME, settings, deadline, &Progress::new(false))?;
        let status = &engine.status;
        let pid = engine.monitor_pid()?;
        let counters = counters::of(pid, &engine.vm.paths.monitor_socket())?;
        let container = first_container::run(&engine.vm.paths.docker_socket(), deadline)?;
        print_json(&Measured {
            timeline: status.timeline,
            boot_clock: status.boot_clock,
            answered_ns: engine.answered_ns,
            console: console.milestones()?,
            steps: status.steps.clone(),
            counters,
            container: Some(container),
            memory: memory::of(pid)?,
        })
    }
}

/// Boots VMs, each in a process of its own.
#[derive(Debug)]
pub struct Starter {
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Starter {
    /// Of VMs with `options`.
    ///
    /// # Errors
    /// When this program cannot be found.
    pub fn new(options: &MachineOptions) -> Result<Self> {
        Ok(Self {
            program: std::env::current_exe().context(|| "cannot find this program".into())?,
            arguments: options.arguments(),
        })
    }

    /// One boot. Call it from the main thread.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn boot(&self) -> Result<Run> {
        let failed = || format!("cannot run {}", self.program.display());
        let mut command = Command::new(&self.program);
        command
            .args(["bench", "boot-once"])
            .args(&self.arguments)
            .stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(&mut command);
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
}
