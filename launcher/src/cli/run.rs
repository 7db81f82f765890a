//! `lighter run`: a host command with an engine of its own.

use super::options::MachineOptions;
use super::start::Wait;
use crate::config::Config;
use crate::error::{Code, Context, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::templates::fresh::TemplateOptions;
use crate::throw_away::ThrowAway;
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use tokio::signal::unix::{SignalKind, signal};

/// Arguments.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    template: TemplateOptions,
    #[command(flatten)]
    wait: Wait,
    /// The host command and its arguments; DOCKER_HOST is set for it
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<std::ffi::OsString>,
}

impl Run {
    /// Starts, runs the command, removes everything. Returns the command's exit code.
    ///
    /// # Errors
    /// When the engine or the command cannot be started.
    pub fn run(self, paths: &Paths) -> Result<u8> {
        let as_docker = |error: Error| match error.code {
            Code::Failure => Error {
                code: Code::Command(125),
                ..error
            },
            _ => error,
        };
        let progress = Progress::new(true);
        let config = Config::load(&paths.config_file)?;
        let settings = self.options.settings(&config)?;
        let (templates, deadline) = (self.template.templates(&config), self.wait.deadline());
        // Signals during the start end this process, and with it the VM.
        let engine = ThrowAway::start(paths, "run", settings, templates, deadline, &progress);
        let engine = engine.map_err(as_docker)?;
        drop(progress);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context(|| "cannot start the runtime".into())?;
        let status = runtime.block_on(self.command(&engine.vm.paths.docker_host()))?;
        Ok(exit_code(status))
    }

    async fn command(&self, docker_host: &str) -> Result<ExitStatus> {
        let watch = |kind| signal(kind).context(|| "cannot watch signals".into());
        let mut terminate = watch(SignalKind::terminate())?;
        let mut hangup = watch(SignalKind::hangup())?;
        let mut interrupt = watch(SignalKind::interrupt())?;
        let mut quit = watch(SignalKind::quit())?;
        let mut command = tokio::process::Command::new(&self.command[0]);
        command.args(&self.command[1..]).env("DOCKER_HOST", docker_host);
        // A context that the user chose would win over DOCKER_HOST.
        command.env_remove("DOCKER_CONTEXT");
        let mut child = command.spawn().map_err(|error| {
            let code = match error.kind() {
                std::io::ErrorKind::NotFound => 127,
                std::io::ErrorKind::PermissionDenied => 126,
                _ => 125,
            };
            let program = self.command[0].to_string_lossy();
            Error::new(Code::Command(code), format!("cannot run {program:?}: {error}"))
        })?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let forward = |signal| {
            if let Some(pid) = pid {
                let _ = kill_process(pid, signal);
            }
        };
        loop {
            tokio::select! {
                status = child.wait() => return status.context(|| "cannot wait for the command".into()),
                _ = terminate.recv() => forward(Signal::TERM),
                _ = hangup.recv() => forward(Signal::HUP),
                // A terminal sends these to the command itself, and a command that gets one twice may give up cleaning.
                _ = interrupt.recv() => if !in_foreground() { forward(Signal::INT) },
                _ = quit.recv() => if !in_foreground() { forward(Signal::QUIT) },
            }
        }
    }
}

/// Whether this process belongs to the terminal's foreground group.
fn in_foreground() -> bool {
    use rustix::process::getpgrp;
    std::fs::File::open("/dev/tty")
        .and_then(|tty| Ok(rustix::termios::tcgetpgrp(&tty)?))
        .is_ok_and(|group| group == getpgrp())
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code & 0xff).unwrap_or(255)
}
