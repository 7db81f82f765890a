//! Taking a snapshot: its VM's supervisor saves the VM, and what it saved is described here.

use super::booted;
use super::copy::{self, Pages};
use super::error::SnapshotError;
use super::manifest::{self, Booted, Contents, Manifest};
use super::store::Claim;
use crate::client;
use crate::error;
use crate::mounts::Mount;
use crate::name::Name;
use crate::paths::Paths;
use crate::vm::{Settings, Vm};
use lighter_protocol::supervisor::{MEMORY_FILE, STATE_FILE, Taken, UsedFile};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Whether what is made is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It outlives the VM, and what it was booted from.
    Yes,
    /// It is started from once, as long as its VM is there; what that was booted from may be another by then.
    WithItsVm,
    /// It is started from as often as what its VM was booted from is there, and made anew when that is another.
    Template,
    /// It is started from at once, and then removed.
    No,
}

/// What was taken, and how long its VM stood still.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What it says of itself.
    pub manifest: Manifest,
    /// Nanoseconds.
    pub paused_ns: u64,
}

/// Takes the snapshot `name` of the running `vm`.
///
/// # Errors
/// Why there is none; the VM goes on.
pub fn create(paths: &Paths, vm: &Vm, name: &Name) -> error::Result<Snapshot> {
    client::running(vm)?;
    let claim = Claim::take(paths, &vm.name)?;
    let unfinished = claim.begin(name)?;
    let snapshot = take(vm, name, &unfinished.folder, Keep::Yes)?;
    unfinished.finish()?;
    Ok(snapshot)
}

/// Saves `vm` into the empty `folder`.
///
/// # Errors
/// Why that is not complete; the VM goes on.
pub fn take(vm: &Vm, name: &Name, folder: &Path, keep: Keep) -> error::Result<Snapshot> {
    let taken_unix_ms = crate::clock::unix_ms();
    let taken = client::snapshot(vm, folder)?;
    let paused_ns = taken.paused_ns;
    let manifest = describe(vm, name, folder, &taken, taken_unix_ms, keep)?;
    Ok(Snapshot { manifest, paused_ns })
}

/// Writes the manifest of what was saved of `vm` into `folder`.
///
/// # Errors
/// When a file cannot be read or written.
pub fn describe(
    vm: &Vm,
    name: &Name,
    folder: &Path,
    taken: &Taken,
    taken_unix_ms: u64,
    keep: Keep,
) -> error::Result<Manifest> {
    let disk = (0..)
        .map(manifest::disk_file)
        .take_while(|name| folder.join(name).exists())
        .map(|name| contents(folder, &name, keep));
    let manifest = Manifest {
        format: manifest::FORMAT,
        lighter: env!("CARGO_PKG_VERSION").into(),
        vm: vm.name.clone(),
        name: name.clone(),
        taken_unix_ms,
        settings: settings(vm, taken)?,
        network: taken.network,
        kernel: booted("kernel", &taken.kernel, keep)?,
        image: booted("image", &taken.image, keep)?,
        state: contents(folder, STATE_FILE, keep)?,
        memory: contents(folder, MEMORY_FILE, keep)?,
        disk: disk.collect::<Result<_, _>>()?,
    };
    write(folder, &manifest)?;
    Ok(manifest)
}

/// Writes a manifest beside its files.
///
/// # Errors
/// When it cannot be written.
pub fn write(folder: &Path, manifest: &Manifest) -> Result<(), SnapshotError> {
    let path = folder.join(manifest::FILE);
    let write = || {
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(&serde_json::to_vec_pretty(manifest)?)
    };
    write().map_err(|error: std::io::Error| SnapshotError::Write(path.clone(), error))
}

/// Those of the VM, with the folders that it has: which one the home folder is may change.
fn settings(vm: &Vm, taken: &Taken) -> error::Result<Settings> {
    let mounts: Result<Vec<Mount>, _> = taken.mounts.iter().map(|text| text.parse()).collect();
    Ok(Settings {
        mounts: Some(mounts?),
        throw_away: false,
        ..vm.settings.clone()
    })
}

fn booted(what: &'static str, file: &UsedFile, keep: Keep) -> Result<Booted, SnapshotError> {
    match keep {
        Keep::Yes | Keep::WithItsVm => booted::hash(what, file),
        Keep::Template | Keep::No => Ok(Booted {
            file: file.clone(),
            sha256: None,
        }),
    }
}

fn contents(folder: &Path, name: &str, keep: Keep) -> Result<Contents, SnapshotError> {
    let path = folder.join(name);
    let look = || {
        let file = File::open(&path)?;
        Ok(Contents {
            bytes: file.metadata()?.len(),
            checksum: match keep {
                Keep::Yes => Some(copy::checksum(&Pages::File(file))?),
                // What is read at each start.
                Keep::Template if name == STATE_FILE => Some(copy::checksum(&Pages::File(file))?),
                Keep::WithItsVm | Keep::Template | Keep::No => None,
            },
        })
    };
    look().map_err(|error| SnapshotError::Read(path.clone(), error))
}
