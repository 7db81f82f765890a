//! VMs that the user's systemd starts: with the user's session, or at the first connection to their engine's socket.
//!
//! Such a VM is started by systemd alone, also for `lighter start`: so it stops as a service when the session ends, and nobody fights
//! for its socket, on which systemd listens.
//!
//! - `units`: what systemd is told
//! - `systemd`: the user's systemd
//! - `begin`: a start by systemd that a command follows

pub mod begin;
pub mod systemd;
pub mod units;

use crate::error::{Code, Context, Error, Result};
use crate::lock::is_held;
use crate::paths::{VmPaths, create_private};
use crate::vm::{Vm, write_atomically};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use units::Units;

/// When systemd starts a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// With the user's session.
    Session,
    /// At the first connection to its engine's socket, which is systemd's.
    Demand,
}

impl When {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Session => "with the session",
            Self::Demand => "at the first connection",
        }
    }
}

/// That systemd starts a VM, as a file in the VM's folder says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autostart {
    /// When.
    pub when: When,
    /// Where its units are.
    pub folder: PathBuf,
}

impl Autostart {
    /// Whether systemd starts the VM of these files.
    pub fn of(files: &VmPaths) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(files.autostart()).ok()?).ok()
    }

    /// Whether it does at the first connection.
    pub fn on_demand(files: &VmPaths) -> bool {
        Self::of(files).is_some_and(|autostart| autostart.when == When::Demand)
    }

    fn save(&self, vm: &Vm) -> Result<()> {
        let json = serde_json::to_vec(self).context(|| "cannot encode a file".into())?;
        Ok(write_atomically(&vm.paths.autostart(), &json)?)
    }
}

/// The name of the unit that is the supervisor of `vm`.
pub fn service(vm: &Vm) -> String {
    format!("lighter-{}.service", vm.name)
}

/// The name of the unit that is its engine's socket.
pub fn socket(vm: &Vm) -> String {
    format!("lighter-{}.socket", vm.name)
}

/// What is to be said of a VM that is started on demand when it ends.
pub fn still_listens(vm: &Vm) -> String {
    format!(
        "systemd starts VM {0} again when its docker.sock is used; lighter autostart disable {0} ends that",
        vm.name
    )
}

/// Has systemd start `vm` from now on. The caller holds its edit lock.
///
/// # Errors
/// Why it does not; everything is as it was then.
pub fn enable(vm: &Vm, when: When) -> Result<()> {
    let folder = systemd::unit_folder()?;
    let units = Units::of(vm, when, |name| std::env::var(name).ok())?;
    let old = Autostart::of(&vm.paths);
    let socket_is_systemds = old.as_ref().is_some_and(|old| old.when == When::Demand);
    if is_held(&vm.paths.life_lock()) && socket_is_systemds != (when == When::Demand) {
        let error = format!(
            "VM {} is running, and its socket cannot change hands while it does",
            vm.name
        );
        return Err(Error::failure(error).hint(format!("lighter stop {}, then try again", vm.name)));
    }
    for (name, _) in units.files(vm) {
        refuse_foreign(&folder.join(name), vm)?;
    }
    if old.is_some_and(|old| old.when != when || old.folder != folder) {
        disable(vm)?;
    }
    let made = make(vm, when, &folder, &units);
    made.inspect_err(|_| drop(disable(vm)))
}

fn make(vm: &Vm, when: When, folder: &Path, units: &Units) -> Result<()> {
    create_private(folder)?;
    for (name, text) in units.files(vm) {
        write_atomically(&folder.join(name), text.as_bytes())?;
    }
    // Before systemd listens: whoever starts the VM from then on leaves its socket alone.
    let folder = folder.to_owned();
    Autostart { when, folder }.save(vm)?;
    systemd::run(&["daemon-reload"])?;
    match when {
        When::Session => systemd::run(&["enable", &service(vm)])?,
        When::Demand => systemd::run(&["enable", "--now", &socket(vm)])?,
    };
    Ok(())
}

/// Refuses to replace a unit that is none of `vm`.
fn refuse_foreign(unit: &Path, vm: &Vm) -> Result<()> {
    match std::fs::read_to_string(unit) {
        Ok(text) if !text.lines().any(|line| line == units::mark(vm)) => {
            let error = format!("{} is there already, and is not of this VM", unit.display());
            Err(Error::new(Code::Failure, error)
                .hint("lighter autostart disable there where its VM is, or remove that file; or give this VM another name"))
        }
        _ => Ok(()),
    }
}

/// Has systemd not start `vm` any more. The caller holds its edit lock. Returns why systemd has not heard of it, if so.
///
/// # Errors
/// When a file cannot be removed.
pub fn disable(vm: &Vm) -> Result<Option<Error>> {
    let Some(Autostart { when, folder }) = Autostart::of(&vm.paths) else {
        return Ok(None);
    };
    let (service, socket) = (service(vm), socket(vm));
    let mut told = match when {
        When::Session => systemd::run(&["disable", &service]),
        When::Demand => systemd::run(&["disable", "--now", &socket]),
    };
    // Without a systemd that answers, it is its links that make it start them.
    let mut files = vec![
        folder.join("default.target.wants").join(&service),
        folder.join("sockets.target.wants").join(&socket),
        folder.join(socket),
    ];
    // As long as it runs, this says how it is stopped. It is not started by it, and replaced by the next.
    let runs = is_held(&vm.paths.life_lock());
    if !runs {
        files.push(folder.join(service));
    }
    files.push(vm.paths.autostart());
    for file in files {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(
                    Error::failure(format!("cannot remove {}: {error}", file.display()))
                        .hint("check the folder's permissions"),
                );
            }
            _ => {}
        }
    }
    if !runs {
        vm.remove_runtime();
        told = told.and_then(|_| systemd::run(&["daemon-reload"]));
    }
    Ok(told.err().map(Error::from))
}
