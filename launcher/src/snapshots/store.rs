//! Where snapshots are: `snapshots/VM/SNAPSHOT/`. Folders whose names begin with a dot are being made, or were given up.

use super::base::Base;
use super::error::SnapshotError;
use super::manifest;
use crate::lock::Lock;
use crate::name::{Name, NameError};
use crate::paths::{Paths, PathsError, create_private};
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A snapshot's name, with its VM's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FullName {
    /// The VM that it was taken of.
    pub vm: Name,
    /// Its own.
    pub name: Name,
}

impl fmt::Display for FullName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vm, self.name)
    }
}

impl FromStr for FullName {
    type Err = FullNameError;

    fn from_str(text: &str) -> Result<Self, FullNameError> {
        let (vm, name) = text.split_once('/').ok_or(FullNameError::NoSlash)?;
        Ok(Self {
            vm: vm.parse()?,
            name: name.parse()?,
        })
    }
}

/// Why a text is not a snapshot's name with its VM's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FullNameError {
    /// There is only one.
    #[error("a VM's name, a slash and a snapshot's name are wanted")]
    NoSlash,
    /// One of them is no name.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// What users name a snapshot by: `VM/SNAPSHOT`, or `SNAPSHOT` when only one VM has one of that name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    vm: Option<Name>,
    name: Name,
}

impl FromStr for Reference {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Ok(match text.split_once('/') {
            Some((vm, name)) => Self {
                vm: Some(vm.parse()?),
                name: name.parse()?,
            },
            None => Self {
                vm: None,
                name: text.parse()?,
            },
        })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.vm {
            Some(vm) => write!(f, "{vm}/{}", self.name),
            None => self.name.fmt(f),
        }
    }
}

/// Where the snapshot `name` is or will be.
pub fn folder(paths: &Paths, name: &FullName) -> PathBuf {
    of_vm(paths, &name.vm).join(name.name.as_str())
}

fn of_vm(paths: &Paths, vm: &Name) -> PathBuf {
    paths.snapshots.join(vm.as_str())
}

/// All snapshots, sorted.
///
/// # Errors
/// When a folder cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<FullName>, SnapshotError> {
    let mut found = vec![];
    for vm in names(&paths.snapshots)? {
        for name in names(&of_vm(paths, &vm))? {
            let full = FullName { vm: vm.clone(), name };
            if folder(paths, &full).join(manifest::FILE).exists() {
                found.push(full);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The folders in `folder` with names of VMs, snapshots or templates.
///
/// # Errors
/// When it is there and cannot be read.
pub fn names(folder: &Path) -> Result<Vec<Name>, SnapshotError> {
    let read = |error| SnapshotError::Read(folder.into(), error);
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(read)?,
    };
    let mut names = vec![];
    for entry in entries {
        let entry = entry.map_err(read)?;
        if let Some(Ok(name)) = entry.file_name().to_str().map(str::parse)
            && entry.path().is_dir()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// Removes what killed commands gave up, of whichever VM; what another command is making is not touched.
pub fn sweep(paths: &Paths) {
    for vm in names(&paths.snapshots).unwrap_or_default() {
        if given_up(&of_vm(paths, &vm)).next().is_some() {
            // Whoever has it sweeps.
            let _ = Claim::take(paths, &vm);
        }
    }
}

/// Folders in `folder` that are being made, or were given up.
pub fn given_up(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let dotted = |entry: &std::fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b".");
    entries.filter(dotted).map(|entry| entry.path())
}

/// The snapshot that the user means.
///
/// # Errors
/// When there is none, or more than one.
pub fn find(paths: &Paths, reference: &Reference) -> Result<FullName, SnapshotError> {
    let mut found = list(paths)?;
    found.retain(|full| full.name == reference.name && reference.vm.as_ref().is_none_or(|vm| *vm == full.vm));
    match found.len() {
        0 => Err(SnapshotError::NoSuchSnapshot(reference.to_string())),
        1 => Ok(found.remove(0)),
        _ => Err(SnapshotError::Ambiguous {
            name: reference.name.clone(),
            found: found.iter().map(ToString::to_string).collect(),
        }),
    }
}

/// Reads the snapshot `name`.
///
/// # Errors
/// When there is none, or it is not understood.
pub fn load(paths: &Paths, name: &FullName) -> Result<Base, SnapshotError> {
    Base::load(&folder(paths, name)).map_err(|error| match error {
        SnapshotError::Read(path, error)
            if error.kind() == io::ErrorKind::NotFound && path.ends_with(manifest::FILE) =>
        {
            SnapshotError::NoSuchSnapshot(name.to_string())
        }
        error => error,
    })
}

/// The right to make and remove snapshots of a VM.
#[derive(Debug)]
pub struct Claim {
    folder: PathBuf,
    vm: Name,
    lock: Option<Lock>,
}

impl Claim {
    /// Takes it, and removes what those who had it before gave up.
    ///
    /// # Errors
    /// When another process has it, or the folder cannot be made.
    pub fn take(paths: &Paths, vm: &Name) -> crate::error::Result<Self> {
        create_private(&paths.snapshots)?;
        let lock = Lock::try_acquire(&paths.snapshots.join(format!(".{vm}.lock")))?
            .ok_or_else(|| SnapshotError::Busy(vm.clone()))?;
        let claim = Self {
            folder: of_vm(paths, vm),
            vm: vm.clone(),
            lock: Some(lock),
        };
        for folder in given_up(&claim.folder) {
            // What cannot be removed now is by the next.
            let _ = std::fs::remove_dir_all(folder);
        }
        create_private(&claim.folder)?;
        Ok(claim)
    }

    /// An empty folder for what is to become the snapshot `name`.
    ///
    /// # Errors
    /// When that exists, or the folder cannot be made.
    pub fn begin(&self, name: &Name) -> crate::error::Result<Unfinished<'_>> {
        let place = self.folder.join(name.as_str());
        if place.exists() {
            let full = FullName {
                vm: self.vm.clone(),
                name: name.clone(),
            };
            return Err(SnapshotError::Exists(full.to_string()).into());
        }
        Ok(Unfinished {
            claim: self,
            folder: self.new_folder(name.as_str())?,
            place,
        })
    }

    /// An empty folder for what nobody is to find, and which is removed when this is dropped.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scratch(&self) -> crate::error::Result<Unfinished<'_>> {
        let folder = self.new_folder("fork")?;
        Ok(Unfinished {
            claim: self,
            place: folder.clone(),
            folder,
        })
    }

    fn new_folder(&self, name: &str) -> Result<PathBuf, PathsError> {
        let folder = self.folder.join(format!(".{name}.partial"));
        create_private(&folder)?;
        Ok(folder)
    }

    /// Removes the snapshot `name`. VMs that run from it go on.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, name: &Name) -> Result<(), SnapshotError> {
        discard(&self.folder, name)
    }
}

/// Removes the folder `name` in `folder`.
///
/// # Errors
/// When it cannot be removed.
pub fn discard(folder: &Path, name: &Name) -> Result<(), SnapshotError> {
    let given_up = folder.join(format!(".{name}.removed"));
    let folder = folder.join(name.as_str());
    let write = |error| SnapshotError::Write(folder.clone(), error);
    // First: it is not there any more, whatever happens to the rest.
    std::fs::rename(&folder, &given_up).map_err(write)?;
    std::fs::remove_dir_all(&given_up).map_err(write)
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Nothing is left of a VM that has no snapshots: only an empty folder can be removed.
        if std::fs::remove_dir(&self.folder).is_ok()
            && let Some(lock) = self.lock.take()
        {
            lock.remove();
        }
    }
}

/// A snapshot that is being made. It is removed when this is dropped.
#[derive(Debug)]
pub struct Unfinished<'a> {
    claim: &'a Claim,
    /// Where.
    pub folder: PathBuf,
    place: PathBuf,
}

impl Unfinished<'_> {
    /// Gives it its name, when all of it is on the disk.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(self) -> Result<(), SnapshotError> {
        publish(&self.folder, &self.place)?;
        // The folder of the VM's snapshots may be new, too.
        self.claim.folder.parent().map_or(Ok(()), sync)
    }
}

/// Gives the complete `folder` the name `place`, beside it, when all of it is on the disk.
///
/// # Errors
/// When it cannot be written.
pub fn publish(folder: &Path, place: &Path) -> Result<(), SnapshotError> {
    let read = |error| SnapshotError::Read(folder.into(), error);
    for entry in std::fs::read_dir(folder).map_err(read)? {
        sync(&entry.map_err(read)?.path())?;
    }
    sync(folder)?;
    std::fs::rename(folder, place).map_err(|error| SnapshotError::Write(place.into(), error))?;
    place.parent().map_or(Ok(()), sync)
}

fn sync(path: &Path) -> Result<(), SnapshotError> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|error| SnapshotError::Write(path.into(), error))
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // It has another name when it is finished; what cannot be removed now is by the next.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

#[cfg(test)]
mod tests {
    use super::super::create::write;
    use super::super::manifest::testing::manifest;
    use super::*;
    use crate::error::Error;

    fn full(text: &str) -> FullName {
        text.parse().unwrap()
    }

    fn make(paths: &Paths, name: &str) {
        let name = full(name);
        let claim = Claim::take(paths, &name.vm).unwrap();
        let unfinished = claim.begin(&name.name).unwrap();
        write(&unfinished.folder, &manifest()).unwrap();
        unfinished.finish().unwrap();
    }

    #[test]
    fn a_snapshot_is_seen_when_it_is_finished_and_found_by_a_name_that_is_clear() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        assert_eq!(list(&paths).unwrap(), []);
        make(&paths, "a/s");
        make(&paths, "b/s");
        make(&paths, "a/t");
        {
            let claim = Claim::take(&paths, &"a".parse().unwrap()).unwrap();
            let unfinished = claim.begin(&"u".parse().unwrap()).unwrap();
            write(&unfinished.folder, &manifest()).unwrap();
            let names: Vec<String> = list(&paths).unwrap().iter().map(ToString::to_string).collect();
            assert_eq!(names, ["a/s", "a/t", "b/s"]);
        }
        let find = |text: &str| find(&paths, &text.parse().unwrap());
        assert_eq!(find("t").unwrap(), full("a/t"));
        assert_eq!(find("b/s").unwrap(), full("b/s"));
        assert!(matches!(find("u"), Err(SnapshotError::NoSuchSnapshot(_))));
        assert!(matches!(find("b/t"), Err(SnapshotError::NoSuchSnapshot(_))));
        let error = Error::from(find("s").unwrap_err());
        assert_eq!(error.message, "there are several snapshots s: a/s, b/s");
        for bad in ["", "/", "a/", "../x", "a/b/c", "a/..", "A"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_process_at_a_time_and_what_was_given_up_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        let vm = "a".parse().unwrap();
        let claim = Claim::take(&paths, &vm).unwrap();
        let busy = Claim::take(&paths, &vm).unwrap_err();
        assert!(busy.message.contains("is being made"), "{busy}");
        // As a process leaves it that was killed.
        let partial = claim.begin(&"s".parse().unwrap()).unwrap();
        let left = partial.folder.clone();
        std::mem::forget(partial);
        drop(claim);
        assert!(left.exists());
        let claim = Claim::take(&paths, &vm).unwrap();
        assert!(!left.exists());
        std::fs::create_dir_all(&left).unwrap();
        sweep(&paths);
        assert!(left.exists(), "somebody may be making it");
        drop(claim);
        sweep(&paths);
        assert_eq!(std::fs::read_dir(&paths.snapshots).unwrap().count(), 0);
    }

    #[test]
    fn a_name_is_had_once_and_free_again_when_its_snapshot_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths::at(root.path());
        make(&paths, "a/s");
        let vm = "a".parse().unwrap();
        let name = "s".parse().unwrap();
        let claim = Claim::take(&paths, &vm).unwrap();
        let error = claim.begin(&name).unwrap_err();
        assert!(error.message.contains("a/s exists already"), "{error}");
        claim.remove(&name).unwrap();
        assert!(claim.remove(&name).is_err());
        drop(claim.begin(&name).unwrap());
        drop(claim);
        assert_eq!(list(&paths).unwrap(), []);
        assert_eq!(std::fs::read_dir(&paths.snapshots).unwrap().count(), 0);
    }
}
