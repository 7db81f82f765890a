//! The folder from which a suspended VM goes on: saved as a snapshot is, without the VM's data disk, which stays where it is.
//!
//! It is of use only as long as nobody has written to that disk. So it has its name only while the VM is off: it is made under
//! another, and given a third before a vCPU runs, from which it gets its own back if none did.
//!
//! ```text
//!   .suspending ── all of it is on the disk ──▶ suspended ── a monitor is started ──▶ .resuming ── a vCPU runs ──▶ (removed)
//!                                                   ▲────────── it did not get that far ─────┘
//! ```
//!
//! Folders of the other two names are left by a host that lost its power, or by a supervisor that was killed: the VM boots from
//! its disk.

use crate::error::{Context, Error, Result, say};
use crate::name::Name;
use crate::paths::{VmPaths, create_private};
use crate::snapshots::base::Base;
use crate::snapshots::create::{Keep, describe};
use crate::snapshots::{manifest, store};
use crate::vm::Vm;
use lighter_protocol::supervisor::Taken;
use std::path::{Path, PathBuf};

/// What the manifest of a suspended VM has for a name.
const NAME: &str = "suspended";

/// Makes the empty folder that a VM is suspended into.
///
/// # Errors
/// When it cannot be made.
pub fn begin(paths: &VmPaths) -> Result<PathBuf> {
    give_up(paths);
    let folder = paths.suspending();
    create_private(&folder)?;
    Ok(folder)
}

/// Removes what is not whole.
pub fn give_up(paths: &VmPaths) {
    // What cannot be removed is by the next.
    let _ = std::fs::remove_dir_all(paths.suspending());
}

/// Gives the folder into which `vm` was saved its name.
///
/// # Errors
/// When it does not get to the disk.
pub fn finish(vm: &Vm, taken: &Taken) -> Result<()> {
    let folder = vm.paths.suspending();
    let name: Name = NAME.parse().context(|| "cannot name the folder".into())?;
    let now = crate::clock::unix_ms();
    describe(vm, &name, &folder, taken, now, Keep::WithItsVm)?;
    // Where it stands, it goes on with.
    vm.disk()?.sync()?;
    Ok(store::publish(&folder, &vm.paths.suspended())?)
}

/// Whether there is something that the VM goes on from.
pub fn is_suspended(paths: &VmPaths) -> bool {
    paths.suspended().join(manifest::FILE).exists()
}

/// Gives up what a suspended VM would go on from: it boots from its disk, as after a power cut.
///
/// # Errors
/// When it cannot be removed.
pub fn forget(paths: &VmPaths) -> Result<()> {
    // First: with another name it is not there any more, whatever happens to the rest.
    give_up(paths);
    rename(&paths.suspended(), &paths.suspending())?;
    give_up(paths);
    Ok(())
}

/// A suspended VM on its way back.
#[derive(Debug)]
pub struct Resumption {
    paths: VmPaths,
    runs: bool,
}

impl Resumption {
    /// Begins it, if the VM is suspended: it has nothing to go on from until this is dropped. The caller holds the VM's
    /// life lock.
    ///
    /// # Errors
    /// When the folder cannot be renamed, or it is not understood.
    pub fn begin(vm: &Vm) -> Result<Option<(Self, Base)>> {
        give_up(&vm.paths);
        let resuming = vm.paths.resuming();
        if resuming.exists() {
            say(format_args!(
                "lighter: VM {} was cut off while it began to go on; it boots from its disk",
                vm.name
            ));
            let _ = std::fs::remove_dir_all(&resuming);
        }
        if !is_suspended(&vm.paths) {
            return Ok(None);
        }
        rename(&vm.paths.suspended(), &resuming)?;
        let resumption = Self {
            paths: vm.paths.clone(),
            runs: false,
        };
        let base = Base::load(&resuming).map_err(Error::from)?;
        Ok(Some((resumption, base)))
    }

    /// A vCPU runs: the disk is about to change. Memory is mapped, so that nobody needs the folder.
    pub fn runs(&mut self) {
        self.runs = true;
        let _ = std::fs::remove_dir_all(self.paths.resuming());
    }
}

impl Drop for Resumption {
    fn drop(&mut self) {
        if !self.runs
            && let Err(error) = rename(&self.paths.resuming(), &self.paths.suspended())
        {
            say(error);
        }
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}
