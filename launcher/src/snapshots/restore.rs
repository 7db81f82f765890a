//! New VMs from a snapshot.

use super::base::Base;
use crate::boot::{self, Begin};
use crate::client::{Client, wait_until_gone};
use crate::config::Config;
use crate::disk::DiskSource;
use crate::error::{Error, Result};
use crate::lock::{Lock, is_held};
use crate::name::Name;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::throw_away::ThrowAway;
use crate::vm::{Settings, Vm};
use lighter_protocol::supervisor::Status;
use std::time::Instant;

/// How long a new VM lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lives {
    /// Until somebody removes it.
    On,
    /// As long as this process.
    ThrowAway,
}

/// A new VM that goes on where the snapshot's stood.
#[derive(Debug)]
pub struct Restored {
    /// The VM.
    pub vm: Vm,
    client: Client,
    first: Box<Status>,
}

impl Restored {
    /// Makes the VM `name` from `base`, which was checked, with the data disk that `disk` says, and starts it.
    ///
    /// # Errors
    /// Why there is no such VM.
    pub fn start(
        paths: &Paths,
        name: &Name,
        base: &Base,
        disk: DiskSource<'_>,
        lives: Lives,
        deadline: Instant,
    ) -> Result<Self> {
        let files = paths.vm(name);
        files.check_socket_paths()?;
        paths.create_vms()?;
        let edit = Lock::acquire(&files.edit_lock)?;
        let settings = Settings {
            throw_away: lives == Lives::ThrowAway,
            ..base.manifest.settings.clone()
        };
        let vm = Vm::create(paths, name, settings, disk)?;
        match boot::launch(paths, &vm, edit, Begin::From(&base.folder), deadline) {
            Ok((client, first)) => Ok(Self { vm, client, first }),
            Err(error) => Err(give_up(&vm, error)),
        }
    }

    /// Waits until its engine answers. A VM that has ended before is removed: it has done nothing.
    ///
    /// # Errors
    /// Why it does not answer.
    pub fn follow(mut self, deadline: Instant, progress: &Progress) -> Result<(Vm, Box<Status>, u64)> {
        match boot::follow(&self.vm, &mut self.client, self.first, deadline, progress) {
            Ok((status, answered_ns)) => Ok((self.vm, status, answered_ns)),
            Err(error) => Err(give_up(&self.vm, error)),
        }
    }

    /// Waits until the engine of a throw-away VM answers. Nothing is left of one that does not.
    ///
    /// # Errors
    /// Why it does not answer.
    pub fn throw_away(self, deadline: Instant, progress: &Progress) -> Result<ThrowAway> {
        ThrowAway::follow(self.vm, self.client, self.first, deadline, progress)
    }
}

/// Removes a VM that did not start because of `error`, unless its supervisor is there still.
fn give_up(vm: &Vm, error: Error) -> Error {
    // Its sockets are gone before its lock is.
    if Client::connect(vm).is_none() {
        wait_until_gone(vm);
    }
    if let Ok(Some(edit)) = Lock::try_acquire(&vm.paths.edit_lock)
        && !is_held(&vm.paths.life_lock())
        && vm.clone().remove().is_ok()
    {
        edit.remove();
        // What there was may speak of its logs.
        return error.hint(format!(
            "nothing is left of VM {}; the snapshot is as it was",
            vm.name
        ));
    }
    error
}

/// Checks `base` as far as it is before each start from it.
///
/// # Errors
/// What is wrong with it, or what has changed.
pub fn check(paths: &Paths, base: &Base) -> Result<()> {
    base.check()?;
    base.booted(paths, &Config::load(&paths.config_file)?)?;
    for mount in base.manifest.settings.mounts() {
        let shared = "the snapshot's VM has that folder: it has to be there for VMs that go on from it";
        mount.open().map_err(|error| error.hint(shared))?;
    }
    Ok(())
}
