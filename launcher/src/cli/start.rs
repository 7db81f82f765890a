//! `lighter start`.

use super::options::MachineOptions;
use super::restore::restore;
use super::{Json, Target};
use crate::boot::{self, Begin};
use crate::client::{is_running, stand_down, stands_by};
use crate::config::Config;
use crate::disk::DiskSource;
use crate::docker_context::{self, ContextError, Contexts, context_name};
use crate::error::{Code, Error, Result};
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::snapshots::base::Base;
use crate::snapshots::restore::check;
use crate::snapshots::store::Reference;
use crate::supervisor::engine_settings;
use crate::supervisor::suspension::{self, is_suspended};
use crate::templates::fresh::{self, TemplateOptions};
use crate::vm::{Vm, VmError};
use clap::Args;
use lighter_protocol::supervisor::{Origin, Status};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Arguments.
#[derive(Debug, Args)]
pub struct Start {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    options: MachineOptions,
    /// Make the VM anew from this snapshot; it goes on where the snapshot's VM stood
    #[arg(long, value_name = "[VM/]SNAPSHOT")]
    from: Option<Reference>,
    /// Boot a suspended VM anew: what ran in it is lost, as by a power cut
    #[arg(long)]
    boot: bool,
    #[command(flatten)]
    template: TemplateOptions,
    #[command(flatten)]
    following: Following,
}

/// How VMs that start are waited for, and what comes of it.
#[derive(Debug, Args)]
pub struct Following {
    #[command(flatten)]
    pub wait: Wait,
    #[command(flatten)]
    pub context: ContextOptions,
    #[command(flatten)]
    pub output: Json,
}

impl Following {
    /// To show how far it is, unless JSON is wanted.
    pub fn progress(&self) -> Progress {
        Progress::new(!self.output.json)
    }
}

/// What becomes of the docker CLI's context.
#[derive(Clone, Copy, Debug, Args)]
pub struct ContextOptions {
    /// Leave the docker CLI's contexts alone
    #[arg(long)]
    no_context: bool,
}

impl ContextOptions {
    /// Whether VMs that start get one.
    ///
    /// # Errors
    /// When the configuration is not understood.
    pub fn wanted(self, paths: &Paths) -> Result<bool> {
        Ok(!self.no_context && Config::load(&paths.config_file)?.context.unwrap_or(true))
    }
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
        if let Some(from) = &self.from {
            if !self.options.is_empty() {
                let error = "a VM that goes on from a snapshot is made as that one's was: --from takes no other options of it";
                return Err(
                    Error::new(Code::Usage, error).hint("stop the VM afterwards, and start it with them")
                );
            }
            let name = Some(&self.target.name);
            return restore(paths, from, name, &self.following);
        }
        let how = How {
            options: &self.options,
            boot: self.boot,
            template: self.template,
            following: &self.following,
        };
        start(paths, &self.target.name, &how)
    }
}

/// How a VM is started.
#[derive(Clone, Copy, Debug)]
pub struct How<'a> {
    /// What it is to be made of, or changed to.
    pub options: &'a MachineOptions,
    /// Whether a suspended VM gives up what it would go on from.
    pub boot: bool,
    /// Whether one that has never run starts from a template.
    pub template: TemplateOptions,
    /// How it is waited for.
    pub following: &'a Following,
}

/// Starts the VM `name`: makes it if there is none, goes on with it if it is suspended.
///
/// # Errors
/// Why it does not run.
pub fn start(paths: &Paths, name: &Name, how: &How<'_>) -> Result<()> {
    let How {
        options,
        boot,
        template,
        following,
    } = *how;
    let config = Config::load(&paths.config_file)?;
    let deadline = following.wait.deadline();
    let progress = following.progress();
    let files = paths.vm(name);
    files.check_socket_paths()?;
    paths.create_vms()?;
    let edit = Lock::acquire(&files.edit_lock)?;
    let vm = match Vm::load(paths, name) {
        Ok(vm) => {
            going_on(paths, &vm, options, boot)?;
            changed(vm, options)?
        }
        Err(VmError::NoSuchVm(_)) => {
            let settings = options.settings(&config)?;
            Vm::create(paths, name, settings, DiskSource::New)?
        }
        Err(error) => return Err(error.into()),
    };
    if vm.settings.throw_away {
        return Err(
            Error::failure(format!("VM {name} is a throw-away VM of lighter run"))
                .hint("choose another name"),
        );
    }
    progress.say(&match is_suspended(&vm.paths) {
        true => format!("{name}: going on"),
        false => format!("{name}: starting"),
    });
    let began = Instant::now();
    let (mut client, first) = match vm.is_new() && !is_running(&vm) {
        true => {
            let templates = template.templates(&config);
            fresh::start(paths, &vm, edit, templates, deadline, &progress)?
        }
        false => boot::launch(paths, &vm, edit, Begin::Boot, deadline)?,
    };
    let (status, answered_ns) = boot::follow(&vm, &mut client, first, deadline, &progress)?;
    let ready = Ready {
        vm,
        status,
        answered_ns,
        took: began.elapsed(),
    };
    ready.report(paths, following, &progress)
}

/// A VM whose engine answers.
pub struct Ready {
    /// The VM.
    pub vm: Vm,
    /// Its status then.
    pub status: Box<Status>,
    /// When, CLOCK_MONOTONIC, nanoseconds.
    pub answered_ns: u64,
    /// How long the user waited.
    pub took: Duration,
}

impl Ready {
    /// Points the docker CLI to it, and tells the user.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn report(&self, paths: &Paths, following: &Following, progress: &Progress) -> Result<()> {
        let Self { vm, status, .. } = self;
        let selected =
            following.context.wanted(paths)? && change_context(paths, vm, Contexts::select, progress);
        if following.output.json {
            return super::print_json(&self.started());
        }
        if progress.is_visible() {
            let how = match selected && std::env::var_os("DOCKER_HOST").is_none() {
                true => format!("docker uses it by its context {}", context_name(&vm.name)),
                false => format!("eval \"$(lighter env {})\" points docker to it", vm.name),
            };
            let from = match status.origin {
                Origin::Template(_) => " from a template",
                _ => "",
            };
            progress.note(&format!(
                "VM {} is ready after {:.1} s{from}; {how}",
                status.name,
                self.took.as_secs_f64()
            ));
        }
        Ok(())
    }

    /// As JSON has it.
    pub fn started(&self) -> Started<'_> {
        Started {
            status: &self.status,
            engine_answered_ns: self.answered_ns,
        }
    }
}

/// A VM whose engine answers.
#[derive(Serialize)]
pub struct Started<'a> {
    #[serde(flatten)]
    status: &'a Status,
    /// When the engine answered, on the clock of `timeline`.
    engine_answered_ns: u64,
}

/// Makes the docker CLI's context of `vm`, and selects it, by `change`. The VM is of use without, so that a failure is only told.
pub fn change_context(
    paths: &Paths,
    vm: &Vm,
    change: impl Fn(&Contexts, &Vm, &BTreeMap<String, String>, &Path) -> std::result::Result<(), ContextError>,
    progress: &Progress,
) -> bool {
    // A VM does not start by one that cannot be used.
    let config = Config::load(&paths.config_file).unwrap_or_default();
    let proxies = engine_settings::proxies(&vm.settings, &config);
    let changed = docker_context::change(paths, |contexts, lock| change(contexts, vm, &proxies, lock));
    if let Err(why) = &changed {
        progress.note(&format!("{why}; --no-context does without"));
    }
    changed.is_ok()
}

/// Checks whether a suspended VM can go on, or has it boot.
fn going_on(paths: &Paths, vm: &Vm, options: &MachineOptions, boot: bool) -> Result<()> {
    if !is_suspended(&vm.paths) {
        return Ok(());
    }
    if boot {
        // Otherwise it has been used meanwhile, and runs.
        return match stand_down(vm)? || !is_running(vm) {
            true => suspension::forget(&vm.paths),
            false => Ok(()),
        };
    }
    if !stands_by(vm)? && is_running(vm) {
        return Ok(());
    }
    let boots = format!(
        "lighter start --boot {} gives up what runs in it, and boots it from its disk as after a power cut",
        vm.name
    );
    if options.change(&vm.settings)? != vm.settings {
        let error = format!("VM {} is suspended, and cannot be changed while it is", vm.name);
        let hint = format!(
            "lighter resume {0}, lighter stop {0}, then start it with the new options; {boots}",
            vm.name
        );
        return Err(Error::new(Code::Usage, error).hint(hint));
    }
    let checked = Base::load(&vm.paths.suspended())
        .map_err(Error::from)
        .and_then(|base| check(paths, &base));
    checked.map_err(|error| {
        let message = format!("the suspended VM {} cannot go on: {}", vm.name, error.message);
        Error { message, ..error }.hint(boots)
    })
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
