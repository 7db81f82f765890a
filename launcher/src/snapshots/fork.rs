//! New VMs that go on where a running one stands: a snapshot that nobody sees, and is removed when they run. What they read of
//! its memory they keep open, and they need nothing of the source.

use super::base::Base;
use super::create::{Keep, take};
use super::restore::{Lives, Restored};
use super::store::{Claim, Unfinished};
use crate::client;
use crate::disk::DiskSource;
use crate::error::Result;
use crate::name::Name;
use crate::paths::Paths;
use crate::vm::{Vm, VmError};
use std::time::Instant;

/// A running VM as it was at one moment, for as long as VMs are started from it.
#[derive(Debug)]
pub struct Fork<'a> {
    /// What is saved of it.
    pub base: Base,
    // Removed when this is dropped.
    _folder: Unfinished<'a>,
    /// How long the source stood still, nanoseconds.
    pub paused_ns: u64,
}

/// Checks that `names` can be those of new VMs, and that `source` can be forked now; nobody else can until the claim is dropped.
///
/// # Errors
/// The first name that is taken, or why it cannot be forked.
pub fn prepare(paths: &Paths, source: &Vm, names: &[Name]) -> Result<Claim> {
    client::running(source)?;
    for name in names {
        paths.vm(name).check_socket_paths()?;
        match Vm::load(paths, name) {
            Err(VmError::NoSuchVm(_)) => {}
            _ => return Err(VmError::Exists(name.clone()).into()),
        }
    }
    Claim::take(paths, &source.name)
}

impl<'a> Fork<'a> {
    /// Saves `source`, which goes on.
    ///
    /// # Errors
    /// Why it is not saved.
    pub fn of(source: &Vm, claim: &'a Claim) -> Result<Self> {
        let folder = claim.scratch()?;
        let snapshot = take(source, &source.name, &folder.folder, Keep::No)?;
        Ok(Self {
            base: Base {
                folder: folder.folder.clone(),
                manifest: snapshot.manifest,
            },
            _folder: folder,
            paused_ns: snapshot.paused_ns,
        })
    }

    /// Starts a VM of each name; returns those that were, and why others were not.
    pub fn start(
        &self,
        paths: &Paths,
        names: &[Name],
        lives: Lives,
        deadline: Instant,
    ) -> Vec<Result<Restored>> {
        let disk = self.base.disk();
        let source = DiskSource::Frozen(&disk);
        let start = |name| Restored::start(paths, name, &self.base, source, lives, deadline);
        names.iter().map(start).collect()
    }
}
