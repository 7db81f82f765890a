//! A folder that VMs can be started from.

use super::booted;
use super::copy;
use super::error::SnapshotError;
use super::manifest::{Contents, Manifest};
use crate::config::Config;
use crate::paths::Paths;
use crate::supervisor::machine::artifact_paths;
use lighter_protocol::supervisor::{DISK_FILE, MEMORY_FILE, STATE_FILE};
use std::fs::File;
use std::path::{Path, PathBuf};

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
            self.file(name, contents)?;
        }
        self.verify_file(STATE_FILE, &self.manifest.state)
    }

    /// Checks all of it.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        let mut files = self.manifest.files().into_iter();
        files.try_for_each(|(name, contents)| self.verify_file(name, contents))
    }

    fn verify_file(&self, name: &str, contents: &Contents) -> Result<(), SnapshotError> {
        let Some(wanted) = &contents.checksum else {
            return Ok(());
        };
        let file = self.file(name, contents)?;
        let path = self.folder.join(name);
        match copy::checksum(&file) {
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

    /// The data disk's path.
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK_FILE)
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
