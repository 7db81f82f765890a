//! `lighter suspend` and `lighter resume`.

use super::Target;
use super::options::MachineOptions;
use super::start::{Following, How, start};
use crate::autostart::{self, Autostart};
use crate::client;
use crate::docker_context;
use crate::error::{Code, Error, Result};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::supervisor::suspension::is_suspended;
use crate::templates::fresh::TemplateOptions;
use crate::vm::Vm;
use clap::Args;

/// Arguments.
#[derive(Debug, Args)]
pub struct Suspend {
    #[command(flatten)]
    target: Target,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Resume {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    following: Following,
}

impl Suspend {
    /// Suspends the VM. One that is suspended is left alone, but for the supervisor that may stand by it.
    ///
    /// # Errors
    /// When there is no such VM, it does not run, or it cannot be saved; it goes on then.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let progress = Progress::new(true);
        if is_suspended(&vm.paths) {
            if client::status(&vm)?.is_none() {
                progress.note(&format!("VM {} is suspended", vm.name));
                return Ok(());
            }
            if client::stand_down(&vm)? {
                progress.note(&format!(
                    "VM {} is suspended, and does not go on when it is used any more",
                    vm.name
                ));
                deselect(paths, &vm, &progress);
                return Ok(());
            }
        }
        progress.say(&format!("{}: saving", vm.name));
        client::suspend(&vm)?;
        deselect(paths, &vm, &progress);
        Ok(())
    }
}

fn deselect(paths: &Paths, vm: &Vm, progress: &Progress) {
    if Autostart::on_demand(&vm.paths) {
        return progress.note(&autostart::still_listens(vm));
    }
    if let Err(why) = docker_context::change(paths, |contexts, lock| contexts.deselect(vm, lock)) {
        progress.note(&why);
    }
}

impl Resume {
    /// Goes on with a suspended VM, and waits until its engine answers. One that runs is left alone.
    ///
    /// # Errors
    /// When there is no such VM, it is not suspended, or it cannot go on.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        if !is_suspended(&vm.paths) && client::status(&vm)?.is_none() {
            let error = format!("VM {} is not suspended", vm.name);
            return Err(
                Error::new(Code::NotRunning, error).hint(format!("lighter start {} boots it", vm.name))
            );
        }
        let how = How {
            options: &MachineOptions::default(),
            boot: false,
            template: TemplateOptions::default(),
            following: &self.following,
        };
        start(paths, &vm.name, &how)
    }
}
