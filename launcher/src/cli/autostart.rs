//! `lighter autostart`.

use super::start::{ContextOptions, change_context};
use super::{Json, Target, print, print_json};
use crate::autostart::{self, Autostart, When, systemd};
use crate::docker_context::{self, Contexts};
use crate::error::{Error, Result, say};
use crate::lock::Lock;
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::table;
use crate::vm::{self, Vm};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::path::PathBuf;

/// What to do with VMs that systemd starts.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Have systemd start a VM with your session
    Enable(Enable),
    /// Have systemd not start a VM any more; one that runs goes on
    Disable(Disable),
    /// List the VMs that systemd starts
    #[command(alias = "list")]
    Ls(Json),
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Enable {
    #[command(flatten)]
    target: Target,
    /// Start it at the first connection to its docker.sock instead, on which systemd listens from now on
    #[arg(long)]
    on_demand: bool,
    #[command(flatten)]
    context: ContextOptions,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Disable {
    #[command(flatten)]
    target: Target,
}

/// A VM that systemd starts, as `ls` shows it.
#[derive(Debug, Serialize)]
struct Row {
    name: Name,
    when: When,
    /// The unit that has to be active for that.
    unit: String,
    /// Where it is.
    folder: PathBuf,
    /// What systemd says of it; null when it does not answer.
    state: Option<String>,
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// Why it is not done.
    pub fn run(self, paths: &Paths) -> Result<()> {
        match self {
            Self::Enable(verb) => verb.run(paths),
            Self::Disable(verb) => verb.run(paths),
            Self::Ls(output) => ls(paths, &output),
        }
    }
}

impl Enable {
    fn run(self, paths: &Paths) -> Result<()> {
        let mut vm = Vm::load(paths, &self.target.name)?;
        vm.paths.check_socket_paths()?;
        let edit = Lock::acquire(&vm.paths.edit_lock)?;
        vm = Vm::load(paths, &vm.name)?;
        let when = match self.on_demand {
            true => When::Demand,
            false => When::Session,
        };
        autostart::enable(&vm, when)?;
        drop(edit);
        let progress = Progress::new(true);
        if self.context.wanted(paths)? {
            // One that answers from now on is what docker is to use.
            let change = match when {
                When::Demand => Contexts::select,
                When::Session => Contexts::add,
            };
            change_context(paths, &vm, change, &progress);
        }
        progress.note(&format!("systemd starts VM {} {}", vm.name, when.words()));
        if !systemd::lingers() {
            progress.note(
                "it ends with your session; sudo loginctl enable-linger $USER has your systemd run from the host's start to its end",
            );
        }
        Ok(())
    }
}

impl Disable {
    fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let edit = Lock::acquire(&vm.paths.edit_lock)?;
        let on_demand = Autostart::on_demand(&vm.paths);
        if let Some(why) = autostart::disable(&vm)? {
            say(format_args!(
                "lighter: the units of VM {} are removed; {}",
                vm.name, why.message
            ));
        }
        let runs = crate::client::is_running(&vm);
        drop(edit);
        if on_demand
            && !runs
            && let Err(why) = docker_context::change(paths, |contexts, lock| contexts.deselect(&vm, lock))
        {
            say(format_args!("lighter: {why}"));
        }
        Ok(())
    }
}

fn ls(paths: &Paths, output: &Json) -> Result<()> {
    let mut rows = vec![];
    for name in vm::list(paths)? {
        let Some(Autostart { when, folder }) = Autostart::of(&paths.vm(&name)) else {
            continue;
        };
        // Removed since the list was made, or damaged: lighter ls tells.
        let Ok(vm) = Vm::load(paths, &name) else { continue };
        let unit = match when {
            When::Session => autostart::service(&vm),
            When::Demand => autostart::socket(&vm),
        };
        let state = systemd::run(&["show", "--property=ActiveState", "--value", &unit]);
        let state = match state {
            Ok(state) => Some(state),
            Err(error) => {
                say(Error::from(error));
                None
            }
        };
        rows.push(Row {
            name,
            when,
            unit,
            folder,
            state,
        });
    }
    if output.json {
        return print_json(&rows);
    }
    let mut table = table::plain();
    table.set_header(["NAME", "STARTS", "UNIT", "STATE"]);
    for row in rows {
        table.add_row([
            row.name.to_string(),
            row.when.words().into(),
            row.unit,
            row.state.unwrap_or_else(|| "-".into()),
        ]);
    }
    print(&table::text(&table))
}
