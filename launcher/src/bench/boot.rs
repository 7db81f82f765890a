//! `lighter bench boot`.
//!
//! Each boot is done by a fresh process that does what `lighter start` does, and is timed from just before that process is
//! started. After each, the other monitors that were asked for boot the same guest, timed in the same way. All stamps are
//! the host's CLOCK_MONOTONIC.

use super::console;
use super::counters::{self, Counters};
use super::memory::{self, Memory};
use super::milestones::Milestones;
use super::peer::{Contender, Guest, Peer};
use super::report::{Beside, PeerRun, Report, Run};
use crate::boot::START_TIMEOUT;
use crate::cli::options::MachineOptions;
use crate::cli::{Json, print, print_json};
use crate::clock::monotonic_ns;
use crate::config::Config;
use crate::die_with_parent::die_with_parent;
use crate::error::{Context, Error, Result};
use crate::logs::Source;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::supervisor::machine::artifact_paths;
use crate::throw_away::ThrowAway;
use crate::vm::Settings;
use clap::Args;
use lighter_protocol::agent::Step;
use lighter_protocol::supervisor::Timeline;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// How the names of the VMs begin.
const NAME: &str = "bench";

/// Arguments.
#[derive(Debug, Args)]
pub struct Boot {
    /// How many boots
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many rounds before that are not counted: the first boot reads its files from the disk, later ones do not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1000))]
    warm_up: u32,
    /// After each boot, boot the same guest in another monitor: firecracker or qemu (its microvm); may be repeated
    #[arg(long = "peer", value_name = "NAME[=PATH]")]
    peers: Vec<Peer>,
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
pub struct Measured {
    /// The supervisor's stamps.
    pub timeline: Timeline,
    /// The engine answered on the host's socket.
    pub answered_ns: u64,
    /// The agent's announcements on the console.
    pub console: Milestones,
    /// What the agent did.
    pub steps: Vec<Step>,
    /// What the monitor and its guest did until the engine answered.
    pub counters: Counters,
    /// The monitor's memory.
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
        let engine = ThrowAway::start(paths, NAME, settings, deadline, &Progress::new(false))?;
        let pid = engine.monitor_pid()?;
        let counters = counters::of(pid, &engine.vm.paths.monitor_socket())?;
        print_json(&Measured {
            timeline: engine.status.timeline,
            answered_ns: engine.answered_ns,
            console: console.milestones()?,
            steps: engine.status.steps.clone(),
            counters,
            memory: memory::of(pid)?,
        })
    }
}

impl Boot {
    /// Measures and prints.
    ///
    /// # Errors
    /// When a VM does not boot.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let program = std::env::current_exe().context(|| "cannot find this program".into())?;
        let contenders = self.contenders(paths)?;
        let progress = Progress::new(!self.output.json);
        let mut runs = vec![];
        let mut peer_runs = vec![vec![]; contenders.len()];
        for round in 0..self.warm_up + self.runs {
            let name = match round.checked_sub(self.warm_up) {
                None => "warm-up".into(),
                Some(number) => format!("boot {} of {}", number + 1, self.runs),
            };
            progress.say(&name);
            let run = self.once(&program)?;
            if round >= self.warm_up {
                runs.push(run);
            }
            for (contender, runs) in contenders.iter().zip(&mut peer_runs) {
                progress.say(&format!("{name}, {}", contender.name));
                let (started_ns, milestones) = contender.boot(Instant::now() + START_TIMEOUT)?;
                if round >= self.warm_up {
                    runs.push(PeerRun::new(started_ns, milestones));
                }
            }
        }
        drop(progress);
        let peers = contenders.iter().zip(peer_runs);
        let peers = peers.map(|(contender, peer_runs)| Beside::new(contender, &runs, peer_runs));
        let peers = peers.collect();
        let report = Report { runs, peers };
        match self.output.json {
            true => print_json(&report.json()),
            false => print(&report.text()),
        }
    }

    fn contenders(&self, paths: &Paths) -> Result<Vec<Contender>> {
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let [kernel, image] = artifact_paths(paths, &settings.kernel, &settings.image, &config);
        let absolute = |path: &Path| {
            std::path::absolute(path).context(|| format!("cannot use the path {}", path.display()))
        };
        let guest = Guest {
            kernel: absolute(&kernel)?,
            image: absolute(&image)?,
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
        };
        paths.create_vms()?;
        let prepare = |peer: &Peer| peer.prepare(&guest, &paths.vms);
        self.peers.iter().map(prepare).collect()
    }

    fn once(&self, program: &Path) -> Result<Run> {
        let failed = || format!("cannot run {}", program.display());
        let mut command = Command::new(program);
        command
            .args(["bench", "boot-once"])
            .args(self.arguments())
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
        for mount in &options.mounts {
            add("--mount", Some(mount.into()));
        }
        if options.no_mounts {
            arguments.push("--no-mounts".into());
        }
        arguments
    }
}
