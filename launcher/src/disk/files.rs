//! The files that a VM's data disk is made of: `data.img`, and layers above it, `data.img.1` and so on in the order of
//! `disk.json`. Without that list there is only the first.
//!
//! Only the last of them is ever written. So what others have of them, snapshots and VMs that were made from this one, are hard links,
//! and the file system counts who needs what. A new layer is on the disk, and in the list, before the monitor writes to it: as long as it is
//! empty, nothing is different with it. Files that are not in the list are left over.

use crate::name::Name;
use crate::snapshots::copy;
use crate::vm::{VmError, write_atomically};
use lighter_disk::{LayerError, MOST_FILES};
use rustix::fs::{AtFlags, CWD, linkat};
use serde::{Deserialize, Serialize};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::slice;

/// With more files than this, layers are merged before there is another.
const LONG: usize = 6;

/// How many a disk has to have room for: what is merged, and what is new, and as much for a VM that is made of it.
const ROOM: usize = 4;

/// The files of a data disk, by their names in the VM's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFiles {
    base: PathBuf,
    /// Of the layers, the lowest first.
    layers: Vec<u64>,
}

/// `disk.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    /// The numbers of the layers, the lowest first.
    layers: Vec<u64>,
}

/// A layer that a disk has got.
#[derive(Debug)]
pub struct Added {
    /// The disk with it.
    pub files: DiskFiles,
    /// The layer.
    pub top: File,
    /// What takes the place of all between the base and the layer that was the last.
    pub merged: Option<File>,
}

impl DiskFiles {
    /// Reads which files the disk at `base` is made of.
    ///
    /// # Errors
    /// When the list cannot be read.
    pub fn of(base: &Path) -> Result<Self, VmError> {
        let list = list(base);
        let layers = match std::fs::read(&list) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
            bytes => {
                let bytes = bytes.map_err(|error| VmError::Read(list.clone(), error))?;
                let parsed = serde_json::from_slice::<List>(&bytes);
                parsed.map_err(|error| VmError::Read(list, error.into()))?.layers
            }
        };
        let base = base.into();
        Ok(Self { base, layers })
    }

    /// Where they are, the base first.
    pub fn paths(&self) -> Vec<PathBuf> {
        let layers = self.layers.iter().map(|number| layer(&self.base, *number));
        std::iter::once(self.base.clone()).chain(layers).collect()
    }

    /// Those that are not written any more.
    pub fn frozen(&self) -> Vec<PathBuf> {
        let mut paths = self.paths();
        paths.pop();
        paths
    }

    /// Whether there are layers.
    pub fn has_layers(&self) -> bool {
        !self.layers.is_empty()
    }

    /// The one that is written.
    pub fn top(&self) -> PathBuf {
        match self.layers.last() {
            Some(number) => layer(&self.base, *number),
            None => self.base.clone(),
        }
    }

    /// Opens them for the monitor of VM `name`, whose disk has at least `size` bytes. Only the last can be written.
    ///
    /// # Errors
    /// When one is missing or cannot be opened, or the disk is shorter.
    pub fn open(&self, name: &Name, size: u64) -> Result<Vec<File>, VmError> {
        let (paths, top) = (self.paths(), self.top());
        let open = |path: &PathBuf| {
            let opened = File::options().read(true).write(*path == top).open(path);
            opened.map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => VmError::DiskMissing {
                    name: name.clone(),
                    path: path.clone(),
                },
                _ => VmError::Read(path.clone(), error),
            })
        };
        let files = paths.iter().map(open).collect::<Result<_, _>>()?;
        let actual = self.size()?;
        match actual < size {
            true => Err(VmError::DiskTruncated {
                path: top,
                actual,
                wanted: size,
            }),
            false => Ok(files),
        }
    }

    /// Makes the disk, which nobody uses, at least as long as `size`.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn grow(&self, size: u64) -> Result<(), VmError> {
        if self.size()? >= size {
            return Ok(());
        }
        if self.has_layers() {
            let grown = self.add_layer(size, true)?.files;
            protect(&grown.frozen());
            grown.sweep();
            return Ok(());
        }
        let file = File::options().write(true).open(&self.base);
        let grown = file.and_then(|file| file.set_len(size));
        grown.map_err(|error| VmError::Write(self.base.clone(), error))
    }

    /// Bytes of the disk.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn size(&self) -> Result<u64, VmError> {
        size_of(&self.top(), self.has_layers())
    }

    /// Bytes that they take on the host.
    pub fn used(&self) -> Option<u64> {
        let blocks = |path: PathBuf| std::fs::metadata(path).ok().map(|metadata| metadata.blocks());
        self.paths()
            .into_iter()
            .map(blocks)
            .sum::<Option<u64>>()
            .map(|blocks| blocks * 512)
    }

    /// Sees to it that what was written to them lasts.
    ///
    /// # Errors
    /// When it does not.
    pub fn sync(&self) -> Result<(), VmError> {
        let top = self.top();
        let synced = File::open(&top).and_then(|file| file.sync_all());
        synced.map_err(|error| VmError::Write(top, error))
    }

    /// Gives the disk another layer, of a disk of `size` bytes, to write to; all of it is on the disk when this returns. When there
    /// are many, those that are frozen become one first: `may_merge` says that all but the last are.
    ///
    /// # Errors
    /// When it cannot be made. If it is in the list all the same, it is whole and empty.
    pub fn add_layer(&self, size: u64, may_merge: bool) -> Result<Added, VmError> {
        let merges = may_merge && self.layers.len() >= LONG;
        if !merges && self.layers.len() + ROOM > MOST_FILES {
            return Err(VmError::TooManyLayers(self.base.clone()));
        }
        let mut next = self.next_number();
        let mut made = vec![];
        let files = (|| {
            let mut layers = self.layers.clone();
            let merged = match (merges, layers.pop()) {
                (true, Some(top)) => {
                    let file = self.make(next, &mut made, |file| self.merge(&layers, file))?;
                    layers = vec![next, top];
                    next += 1;
                    Some(file)
                }
                (_, top) => {
                    layers.extend(top);
                    None
                }
            };
            let top = self.make(next, &mut made, |file| lighter_disk::create(file, size))?;
            layers.push(next);
            Ok((layers, top, merged))
        })();
        let (layers, top, merged) = files.inspect_err(|_| {
            for path in made {
                let _ = std::fs::remove_file(path);
            }
        })?;
        let files = Self {
            base: self.base.clone(),
            layers,
        };
        files.save()?;
        Ok(Added { files, top, merged })
    }

    /// Makes the layer `number`, filled by `fill`, and notes it.
    fn make(
        &self,
        number: u64,
        made: &mut Vec<PathBuf>,
        fill: impl FnOnce(&File) -> Result<(), LayerError>,
    ) -> Result<File, VmError> {
        let path = layer(&self.base, number);
        let write = |error| VmError::Write(path.clone(), error);
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(write)?;
        made.push(path.clone());
        fill(&file).map_err(|error| VmError::Layer(path.clone(), error))?;
        file.sync_all().map_err(write)?;
        Ok(file)
    }

    /// Makes the empty `into` what can stand for `layers`. When nobody else has the base they go into that: no other name of it can
    /// come to be, as names come from names. Then nothing is left to stand for.
    fn merge(&self, layers: &[u64], into: &File) -> Result<(), LayerError> {
        let files = layers.iter().map(|number| File::open(layer(&self.base, *number)));
        let files = files.collect::<io::Result<Vec<_>>>().map_err(LayerError::Read)?;
        let names = std::fs::metadata(&self.base).map_err(LayerError::Read)?.nlink();
        if names > 1 {
            return lighter_disk::merge(&files, into);
        }
        let size = files
            .last()
            .map_or(Err(LayerError::Count(0)), lighter_disk::size)?;
        let commit = || {
            set_mode(&self.base, 0o600).map_err(LayerError::Write)?;
            let base = File::options().read(true).write(true).open(&self.base);
            let base = base.map_err(LayerError::Write)?;
            lighter_disk::commit(&files, &base)?;
            base.sync_all().map_err(LayerError::Write)
        };
        let committed = commit();
        protect(slice::from_ref(&self.base));
        committed?;
        lighter_disk::create(into, size)
    }

    /// No file of that number is there.
    fn next_number(&self) -> u64 {
        let there = self.there().map(|(number, _)| number);
        there.chain(self.layers.iter().copied()).max().unwrap_or(0) + 1
    }

    /// All layers in the folder.
    fn there(&self) -> impl Iterator<Item = (u64, PathBuf)> + use<> {
        let prefix = format!("{}.", name(&self.base));
        let entries = self
            .base
            .parent()
            .and_then(|folder| std::fs::read_dir(folder).ok());
        entries.into_iter().flatten().flatten().filter_map(move |entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix(&prefix)?.parse().ok()?;
            Some((number, entry.path()))
        })
    }

    /// Writes the list; it is on the disk when this returns.
    fn save(&self) -> Result<(), VmError> {
        let path = list(&self.base);
        let json = serde_json::to_vec(&List {
            layers: self.layers.clone(),
        });
        let json = json.map_err(|error| VmError::Write(path.clone(), error.into()))?;
        write_atomically(&path, &json)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|error| VmError::Write(path, error))
    }

    /// Makes the disk what it was before [`Self::add_layer`], when nobody has written to the new layer.
    ///
    /// # Errors
    /// When the list cannot be written.
    pub fn take_back(&self) -> Result<(), VmError> {
        self.save()?;
        self.sweep();
        Ok(())
    }

    /// Removes layers that are left over. Nobody may be adding one.
    pub fn sweep(&self) {
        for (number, path) in self.there() {
            if !self.layers.contains(&number) {
                // What cannot be removed now is by the next.
                let _ = std::fs::remove_file(path);
            }
        }
    }

    /// Makes the disk of a new VM, of which there is nothing yet, of the `frozen` files of another, the base first, and an empty
    /// layer above them, of `size` if theirs is not larger.
    ///
    /// # Errors
    /// When one of the files cannot be made; nothing is left then.
    pub fn of_frozen(base: &Path, frozen: &[PathBuf], size: u64) -> Result<Self, VmError> {
        let mut made = Self {
            base: base.into(),
            layers: vec![],
        };
        made.remove();
        let mut make = || {
            let (first, layers) = frozen.split_first().ok_or_else(|| {
                VmError::Read(base.into(), io::Error::other("the snapshot has no data disk"))
            })?;
            for (number, from) in (1..).zip(layers) {
                made.layers.push(number);
                share(from, &layer(base, number))?;
            }
            let last = layers
                .last()
                .map_or(size_of(first, false), |layer| size_of(layer, true))?;
            made = made.add_layer(last.max(size), false)?.files;
            // Last: without it there is no disk.
            share(first, base)
        };
        make().inspect_err(|_| made.remove())?;
        Ok(made)
    }

    /// Removes all of them, and the list.
    pub fn remove(&self) {
        let layers = self.there().map(|(_, path)| path);
        for path in [self.base.clone(), list(&self.base)].into_iter().chain(layers) {
            // It may not be there.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Has nobody write to the files that are frozen, by mistake.
pub fn protect(frozen: &[PathBuf]) {
    for path in frozen {
        // It is one more guard, and may fail.
        let _ = set_mode(path, 0o400);
    }
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Gives the file `from`, which does not change any more, the name `to` as well; where it cannot have that, `to` is a copy.
///
/// # Errors
/// When there is no such file, or it cannot be copied.
pub fn share(from: &Path, to: &Path) -> Result<(), VmError> {
    if linkat(CWD, from, CWD, to, AtFlags::SYMLINK_FOLLOW).is_ok() {
        // A file system that does not count names would not tell who is alone, either.
        match std::fs::metadata(to) {
            Ok(metadata) if metadata.nlink() > 1 => return Ok(()),
            _ => std::fs::remove_file(to).map_err(|error| VmError::Write(to.into(), error))?,
        }
    }
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let source = File::open(from).map_err(|error| VmError::Read(from.into(), error))?;
    let write = || {
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        copy::copy(&source, &options.open(&partial)?)?;
        std::fs::rename(&partial, to)
    };
    write().map_err(|error| {
        // As far as it got.
        let _ = std::fs::remove_file(&partial);
        VmError::Write(to.into(), error)
    })
}

/// Bytes of the disk whose last file is at `path`.
fn size_of(path: &Path, is_layer: bool) -> Result<u64, VmError> {
    let read = |error| VmError::Read(path.into(), error);
    let file = File::open(path).map_err(read)?;
    match is_layer {
        true => lighter_disk::size(&file).map_err(|error| VmError::Layer(path.into(), error)),
        false => Ok(file.metadata().map_err(read)?.len()),
    }
}

/// The layer `number` above the base.
pub fn layer(base: &Path, number: u64) -> PathBuf {
    base.with_file_name(format!("{}.{number}", name(base)))
}

fn list(base: &Path) -> PathBuf {
    base.with_file_name("disk.json")
}

fn name(base: &Path) -> String {
    base.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
