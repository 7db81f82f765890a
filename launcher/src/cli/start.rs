//! `lighter start`.

use super::options::MachineOptions;
use super::{Json, Target};
use crate::boot;
use crate::client::is_running;
use crate::config::Config;
use crate::docker_context::{self, context_name};
use crate::error::{Code, Error, Result};
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::supervisor::engine_settings;
use crate::vm::{Vm, VmError};
use clap::Args;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Arguments.
#[derive(Debug, Args)]
pub struct Start {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    context: ContextOptions,
    #[command(flatten)]
    output: Json,
}

/// What becomes of the docker CLI's context.
#[derive(Clone, Copy, Debug, Args)]
pub struct ContextOptions {
    /// Leave the docker CLI's contexts alone
    #[arg(long)]
    no_context: bool,
}

/// How long to wait.
#[derive(Debug, Args)]
pub struct Wait {
    /// Wait at most this many seconds for the engine; the VM goes on starting after that
    #[arg(long, value_name = "SECONDS", default_value_t = boot::START_TIMEOUT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    wait_timeout: u64,
}

impl Wait {
    /// When the wait is over.
    pub fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.wait_timeout)
    }
}

impl Start {
    /// Starts the VM.
    ///
    /// # Errors
    /// Why it does not run.
    pub fn run(self, paths: &Paths) -> Result<()> {
        start(
            paths,
            &self.target.name,
            &self.options,
            &self.wait,
            self.context,
            self.output.json,
        )
    }
}

/// Starts the VM `name`, making it or changing it by `options`.
///
/// # Errors
/// Why it does not run.
pub fn start(
    paths: &Paths,
    name: &Name,
    options: &MachineOptions,
    wait: &Wait,
    context: ContextOptions,
    json: bool,
) -> Result<()> {
    let deadline = wait.deadline();
    let progress = Progress::new(!json);
    let files = paths.vm(name);
    files.check_socket_paths()?;
    paths.create_vms()?;
    let edit = Lock::acquire(&files.edit_lock)?;
    let config = Config::load(&paths.config_file)?;
    let vm = match Vm::load(paths, name) {
        Ok(vm) => changed(vm, options)?,
        Err(VmError::NoSuchVm(_)) => {
            let settings = options.settings(&config)?;
            Vm::create(paths, name, settings)?
        }
        Err(error) => return Err(error.into()),
    };
    if vm.settings.throw_away {
        return Err(
            Error::failure(format!("VM {name} is a throw-away VM of lighter run"))
                .hint("choose another name"),
        );
    }
    progress.say(&format!("{name}: starting"));
    let began = Instant::now();
    let (mut client, first) = boot::launch(paths, &vm, edit, deadline)?;
    let (status, answered_ns) = boot::follow(&vm, &mut client, first, deadline, &progress)?;
    let selected =
        !context.no_context && config.context.unwrap_or(true) && select_context(paths, &vm, &progress);
    if json {
        #[derive(Serialize)]
        struct Started<'a> {
            #[serde(flatten)]
            status: &'a lighter_protocol::supervisor::Status,
            /// When the engine answered, on the clock of `timeline`.
            engine_answered_ns: u64,
        }
        return super::print_json(&Started {
            status: &status,
            engine_answered_ns: answered_ns,
        });
    }
    if progress.is_visible() {
        let seconds = began.elapsed().as_secs_f64();
        let how = match selected && std::env::var_os("DOCKER_HOST").is_none() {
            true => format!("docker uses it by its context {}", context_name(name)),
            false => format!("eval \"$(lighter env {name})\" points docker to it"),
        };
        progress.note(&format!("VM {name} is ready after {seconds:.1} s; {how}"));
    }
    Ok(())
}

/// Points the docker CLI to `vm`. The VM is of use without, so that a failure is only told.
fn select_context(paths: &Paths, vm: &Vm, progress: &Progress) -> bool {
    let proxies = engine_settings::proxies(|name| std::env::var(name).ok(), vm.settings.host_access);
    let selected = docker_context::change(paths, |contexts, lock| contexts.select(vm, &proxies, lock));
    if let Err(why) = &selected {
        progress.note(&format!("{why}; --no-context does without"));
    }
    selected.is_ok()
}

fn changed(mut vm: Vm, options: &MachineOptions) -> Result<Vm> {
    if options.is_empty() {
        return Ok(vm);
    }
    let settings = options.change(&vm.settings)?;
    if settings != vm.settings && is_running(&vm) {
        return Err(Error::new(
            Code::Usage,
            format!("VM {} is running, and cannot be changed while it does", vm.name),
        )
        .hint(format!(
            "lighter stop {0}, then start it with the new options",
            vm.name
        )));
    }
    vm.change(settings)?;
    Ok(vm)
}
