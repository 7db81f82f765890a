//! `lighter restore`.

use super::start::{Following, Ready};
use crate::disk::DiskSource;
use crate::error::Result;
use crate::name::Name;
use crate::paths::Paths;
use crate::snapshots::restore::{Lives, Restored, check};
use crate::snapshots::store::{self, Reference};
use clap::Args;
use std::time::Instant;

/// Arguments.
#[derive(Debug, Args)]
pub struct Restore {
    /// The snapshot; its VM's name may be left out when no other VM has one of that name
    #[arg(value_name = "[VM/]SNAPSHOT")]
    snapshot: Reference,
    /// The new VM's name [default: that of the snapshot's VM, which must not exist any more]
    #[arg(long = "as", value_name = "NAME")]
    name: Option<Name>,
    #[command(flatten)]
    following: Following,
}

impl Restore {
    /// Makes the VM and waits for its engine.
    ///
    /// # Errors
    /// Why there is no such VM.
    pub fn run(self, paths: &Paths) -> Result<()> {
        restore(paths, &self.snapshot, self.name.as_ref(), &self.following)
    }
}

/// Makes a VM from a snapshot and waits for its engine.
///
/// # Errors
/// Why there is no such VM.
pub fn restore(
    paths: &Paths,
    snapshot: &Reference,
    name: Option<&Name>,
    following: &Following,
) -> Result<()> {
    let deadline = following.wait.deadline();
    let began = Instant::now();
    let progress = following.progress();
    let full = store::find(paths, snapshot)?;
    let base = store::load(paths, &full)?;
    let name = name.unwrap_or(&base.manifest.vm);
    progress.say(&format!("{name}: going on from {full}"));
    check(paths, &base)?;
    let disk = base.disk();
    let restored = Restored::start(paths, name, &base, DiskSource::Frozen(&disk), Lives::On, deadline)?;
    let (vm, status, answered_ns) = restored.follow(deadline, &progress)?;
    let ready = Ready {
        vm,
        status,
        answered_ns,
        took: began.elapsed(),
    };
    ready.report(paths, following, &progress)
}
