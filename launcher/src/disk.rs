//! The data disk of a new VM: a file with holes.

use crate::size::Size;
use crate::snapshots::copy::copy as copy_file;
use crate::vm::VmError;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Where the data disk of a new VM comes from.
#[derive(Clone, Copy, Debug)]
pub enum DiskSource<'a> {
    /// It is empty.
    New,
    /// It is a copy of that file.
    CopyOf(&'a Path),
    /// It is that file itself.
    Taken(&'a Path),
}

/// Makes the data disk at `path`, of `size` if it is a new one.
///
/// # Errors
/// When a disk with data is there already, or the file cannot be made.
pub fn make(path: &Path, size: Size, source: DiskSource<'_>) -> Result<(), VmError> {
    refuse_stray(path)?;
    match source {
        DiskSource::New => create(path, size),
        DiskSource::CopyOf(source) => copy(source, path),
        DiskSource::Taken(source) => take(source, path),
    }
}

fn create(path: &Path, size: Size) -> Result<(), VmError> {
    let write = |error| VmError::Write(path.into(), error);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let file = options.open(path);
    file.and_then(|file| file.set_len(size.0)).map_err(write)
}

/// Makes the disk of a VM that does not exist yet a copy of `source`, and nothing when it cannot be a whole one.
fn copy(source: &Path, path: &Path) -> Result<(), VmError> {
    let partial = path.with_extension("partial");
    let from = File::open(source).map_err(|error| VmError::Read(source.into(), error))?;
    let write = || {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        copy_file(&from, &options.open(&partial)?)?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|error| {
        // As far as it got.
        let _ = std::fs::remove_file(&partial);
        VmError::Write(path.into(), error)
    })
}

fn take(source: &Path, path: &Path) -> Result<(), VmError> {
    // They may be on different file systems.
    std::fs::rename(source, path).or_else(|_| copy(source, path))
}

/// One that nothing was ever written to is what a `create` that was cut short left behind.
fn refuse_stray(path: &Path) -> Result<(), VmError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.blocks() > 0 => Err(VmError::StrayDisk(path.into())),
        Ok(_) => std::fs::remove_file(path).map_err(|error| VmError::Write(path.into(), error)),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_copied_or_taken_and_none_with_data_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let [source, disk] = ["source", "data.img"].map(|name| folder.path().join(name));
        std::fs::write(&source, vec![7; 5000]).unwrap();
        make(&disk, Size(8192), DiskSource::New).unwrap();
        // Nothing was written to it.
        make(&disk, Size(8192), DiskSource::CopyOf(&source)).unwrap();
        assert_eq!(std::fs::read(&disk).unwrap(), vec![7; 5000]);
        for source in [
            DiskSource::New,
            DiskSource::CopyOf(&source),
            DiskSource::Taken(&source),
        ] {
            let stray = make(&disk, Size(8192), source);
            assert!(matches!(stray, Err(VmError::StrayDisk(_))), "{stray:?}");
        }
        std::fs::remove_file(&disk).unwrap();
        make(&disk, Size(8192), DiskSource::Taken(&source)).unwrap();
        assert_eq!(std::fs::read(&disk).unwrap(), vec![7; 5000]);
        assert!(!source.exists());
        std::fs::remove_file(&disk).unwrap();
        let missing = make(&disk, Size(8192), DiskSource::CopyOf(&source));
        assert!(matches!(missing, Err(VmError::Read(..))), "{missing:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
