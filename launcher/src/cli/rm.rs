//! `lighter rm`.

use super::Target;
use super::stop::{How, stop};
use crate::autostart::{self, Autostart};
use crate::client::{is_running, stand_down, stands_by};
use crate::docker_context;
use crate::error::{Context, Error, Result, say};
use crate::lock::Lock;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::size::Size;
use crate::snapshots::store;
use crate::vm::Vm;
use clap::Args;
use std::io::{IsTerminal, Write};

/// Arguments.
#[derive(Debug, Args)]
pub struct Rm {
    #[command(flatten)]
    target: Target,
    /// Do not ask, and stop a VM that is running
    #[arg(short, long)]
    force: bool,
}

impl Rm {
    /// Removes the VM with its data.
    ///
    /// # Errors
    /// When there is no such VM, it is running, or the user does not want to.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let running = || {
            Error::failure(format!("VM {} is running", vm.name)).hint(format!(
                "lighter stop {0} first; or lighter rm --force {0}, which pulls its plug",
                vm.name
            ))
        };
        if !self.force {
            let edit = Lock::acquire(&vm.paths.edit_lock)?;
            if !stands_by(&vm)? && is_running(&vm) {
                return Err(running());
            }
            // Nothing waits for the user's answer.
            drop(edit);
            confirm(&vm)?;
        }
        if self.force && Autostart::on_demand(&vm.paths) {
            // Clients would start it again and again. That systemd is not there is told below.
            let _ = autostart::systemd::run(&["stop", &autostart::socket(&vm)]);
        }
        loop {
            if self.force {
                stop(&vm, How::FORCE, &Progress::new(false))?;
            }
            let edit = Lock::acquire(&vm.paths.edit_lock)?;
            // Somebody may have started it, or removed it, in the meantime.
            if !stand_down(&vm)? && is_running(&vm) {
                if self.force {
                    drop(edit);
                    continue;
                }
                return Err(running());
            }
            let vm = Vm::load(paths, &vm.name)?;
            if let Err(why) = docker_context::change(paths, |contexts, lock| contexts.remove(&vm, lock)) {
                say(format_args!("lighter: {why}"));
            }
            if let Some(why) = autostart::disable(&vm)? {
                say(format_args!("lighter: {}", why.message));
            }
            vm.remove()?;
            edit.remove();
            store::sweep(paths);
            return Ok(());
        }
    }
}

fn confirm(vm: &Vm) -> Result<()> {
    let used = vm.disk_used().unwrap_or(Size(0)).human();
    let refused = |why: &str| {
        Error::failure(format!(
            "VM {} and its data ({used}) are not removed: {why}",
            vm.name
        ))
    };
    if !std::io::stdin().is_terminal() {
        return Err(refused("standard input is no terminal to ask on").hint("--force removes without asking"));
    }
    write!(
        std::io::stderr(),
        "Remove VM {} with its images, containers and volumes ({used})? [y/N] ",
        vm.name
    )
    .context(|| "cannot ask".into())?;
    let mut answer = String::new();
    std::io::stdin()
        .read_line(&mut answer)
        .context(|| "cannot read the answer".into())?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(refused("you did not say yes")),
    }
}
