//! A folder that VMs can be started from.

use super::booted;
use super::copy;
use super::copy::Pages;
use super::error::SnapshotError;
use super::manifest::{self, Contents, Manifest, disk_file};
use crate::config::Config;
use crate::paths::Paths;
use crate::supervisor::machine::artifact_paths;
use lighter_disk::Chain;
use lighter_protocol::supervisor::{MEMORY_FILE, STATE_FILE};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file of [`Base::working_set`]: a hint, which the manifest does not speak of.
pub const WORKING_SET: &str = "working-set";

/// A snapshot, or what a fork starts from.
#[derive(Clone, Debug)]
pub struct Base {
    /// Where it is.
    pub folder: PathBuf,
    /// What it says of itself.
    pub manifest: Manifest,
}

impl Base {
    /// Reads the manifest in `folder`.
    ///
    /// # Errors
    /// When there is none, or none that is understood.
    pub fn load(folder: &Path) -> Result<Self, SnapshotError> {
        Ok(Self {
            folder: folder.into(),
            manifest: Manifest::read(folder)?,
        })
    }

    /// Checks what can be checked without reading all of it: lengths, and all of the state.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn check(&self) -> Result<(), SnapshotError> {
        for (name, contents) in self.manifest.files() {
            self.file(&name, contents)?;
        }
        self.verify_file(STATE_FILE, &self.manifest.state)
    }

    /// Checks all of it.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let mut files = self.manifest.files().into_iter();
        files.try_for_each(|(name, contents)| self.verify_file(&name, contents))
    }

    /// Checks the files of the data disk.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn verify_disk(&self) -> Result<(), SnapshotError> {
        let mut files = self.manifest.disk.iter().enumerate();
        files.try_for_each(|(number, contents)| self.verify_file(&disk_file(number), contents))
    }

    fn verify_file(&self, name: &str, contents: &Contents) -> Result<(), SnapshotError> {
        let Some(wanted) = &contents.checksum else {
            return Ok(());
        };
        let file = self.file(name, contents)?;
        let path = self.folder.join(name);
        match copy::checksum(&Pages::File(file)) {
            Ok(sum) if sum == *wanted => Ok(()),
            Ok(_) => Err(SnapshotError::Checksum(path)),
            Err(error) => Err(SnapshotError::Read(path, error)),
        }
    }

    /// CPUs and devices, and memory.
    ///
    /// # Errors
    /// When a file is not there, or not as long as it was.
    pub fn open(&self) -> Result<[File; 2], SnapshotError> {
        Ok([
            self.file(STATE_FILE, &self.manifest.state)?,
            self.file(MEMORY_FILE, &self.manifest.memory)?,
        ])
    }

    /// Which pages its VMs touch first, if that is known.
    pub fn working_set(&self) -> Option<File> {
        File::open(self.folder.join(WORKING_SET)).ok()
    }

    /// Bytes that its files take on the host.
    pub fn used(&self) -> u64 {
        let files = self.manifest.files().into_iter();
        let found = files.filter_map(|(name, _)| std::fs::metadata(self.folder.join(name)).ok());
        found.map(|metadata| metadata.blocks() * 512).sum()
    }

    /// Where the files of the data disk are, the base first.
    pub fn disk(&self) -> Vec<PathBuf> {
        let numbers = 0..self.manifest.disk.len();
        numbers
            .map(|number| self.folder.join(disk_file(number)))
            .collect()
    }

    /// The data disk as one, as it is exported.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub fn flat_disk(&self) -> Result<Pages, SnapshotError> {
        let paths = self.disk();
        let open =
            |path: &PathBuf| File::open(path).map_err(|error| SnapshotError::Read(path.clone(), error));
        let mut files = paths.iter().map(open).collect::<Result<Vec<_>, _>>()?.into_iter();
        let (Some(base), layers) = (files.next(), files.map(Arc::new).collect::<Vec<_>>()) else {
            return Err(SnapshotError::Length {
                path: self.folder.join(manifest::FILE),
                said: 1,
                actual: 0,
            });
        };
        if layers.is_empty() {
            return Ok(Pages::File(base));
        }
        let chain = Chain::open(Arc::new(base), layers);
        let chain =
            chain.map_err(|(number, error)| SnapshotError::Layer(paths[number + 1].clone(), error))?;
        Ok(Pages::Disk(Box::new(chain)))
    }

    fn file(&self, name: &str, contents: &Contents) -> Result<File, SnapshotError> {
        let path = self.folder.join(name);
        let read = |error| SnapshotError::Read(path.clone(), error);
        let file = File::open(&path).map_err(read)?;
        let actual = file.metadata().map_err(read)?.len();
        let said = contents.bytes;
        match said == actual {
            true => Ok(file),
            false => Err(SnapshotError::Length { path, said, actual }),
        }
    }

    /// The kernel and the image that its VMs go on with.
    ///
    /// # Errors
    /// When there is another in their place, with what differs.
    pub fn booted(&self, paths: &Paths, config: &Config) -> Result<[PathBuf; 2], SnapshotError> {
        let Manifest {
            settings,
            kernel,
            image,
            ..
        } = &self.manifest;
        let [chosen_kernel, chosen_image] = artifact_paths(paths, &settings.kernel, &settings.image, config);
        Ok([
            booted::find("kernel", kernel, &chosen_kernel)?,
            booted::find("image", image, &chosen_image)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::create::write;
    use super::super::manifest::testing::manifest;
    use super::*;
    use lighter_protocol::supervisor::DISK_FILE;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_damaged_is_told_by_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let mut manifest = manifest();
        for (name, contents) in [
            (STATE_FILE, &mut manifest.state),
            (MEMORY_FILE, &mut manifest.memory),
            (DISK_FILE, &mut manifest.disk[0]),
        ] {
            std::fs::write(path(name), [7; 10_000]).unwrap();
            contents.bytes = 10_000;
            contents.checksum = Some(copy::checksum(&Pages::File(File::open(path(name)).unwrap())).unwrap());
        }
        write(folder.path(), &manifest).unwrap();
        let base = Base::load(folder.path()).unwrap();
        base.check().unwrap();
        base.verify().unwrap();
        let change = |name, byte| {
            let file = File::options().write(true).open(path(name)).unwrap();
            file.write_all_at(&[byte], 9_000).unwrap();
        };
        change(DISK_FILE, 6);
        base.check().unwrap();
        assert!(matches!(base.verify(), Err(SnapshotError::Checksum(file)) if file == path(DISK_FILE)));
        change(DISK_FILE, 7);
        change(STATE_FILE, 6);
        assert!(matches!(base.check(), Err(SnapshotError::Checksum(file)) if file == path(STATE_FILE)));
        change(STATE_FILE, 7);
        std::fs::write(path(MEMORY_FILE), [7; 9_999]).unwrap();
        assert!(matches!(
            base.check(),
            Err(SnapshotError::Length {
                said: 10_000,
                actual: 9_999,
                ..
            })
        ));
        std::fs::remove_file(path(MEMORY_FILE)).unwrap();
        assert!(matches!(base.check(), Err(SnapshotError::Read(..))));
        std::fs::remove_file(path(super::super::manifest::FILE)).unwrap();
        assert!(Base::load(folder.path()).is_err());
    }
}
