//! What a snapshot says of itself: `manifest.json`.

use super::error::SnapshotError;
use crate::name::Name;
use crate::vm::Settings;
use lighter_protocol::supervisor::{DISK_FILE, MEMORY_FILE, STATE_FILE, UsedFile};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Changes with everything that changes [`Manifest`], or what any part of it means. The state has a version of its own.
pub const FORMAT: u64 = 1;

/// A snapshot is there when this file is.
pub const FILE: &str = "manifest.json";

/// No manifest is longer, bytes.
const MOST_BYTES: u64 = 1 << 20;

/// What a snapshot is of, and how its files must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u64,
    /// The version of the Lighter that took it.
    pub lighter: String,
    /// The VM that it was taken of.
    pub vm: Name,
    /// Its own name.
    pub name: Name,
    /// When it was taken, milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// How the VM was made. The shared folders are those that it had.
    pub settings: Settings,
    /// Whether it had a network device.
    pub network: bool,
    /// The kernel that it was booted with.
    pub kernel: Booted,
    /// Its root file system, which it goes on reading.
    pub image: Booted,
    /// CPUs and devices.
    pub state: Contents,
    /// Guest memory.
    pub memory: Contents,
    /// The files of the data disk, the base first; none of a suspended VM, whose disk is where it was.
    pub disk: Vec<Contents>,
}

/// A file that a VM was booted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Booted {
    /// Which file that was. If it is that still, its content is not looked at.
    pub file: UsedFile,
    /// Its SHA-256, in hexadecimal; `None` in what is only started from while the file is sure to be there.
    pub sha256: Option<String>,
}

/// How a file of the snapshot must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contents {
    /// Its length.
    pub bytes: u64,
    /// As [`super::copy::checksum`] says; `None` in what nobody keeps.
    pub checksum: Option<String>,
}

impl Manifest {
    /// Reads the manifest of the snapshot in `folder`.
    ///
    /// # Errors
    /// When there is none, or it is not understood.
    pub fn read(folder: &Path) -> Result<Self, SnapshotError> {
        use std::io::Read;
        let path = folder.join(FILE);
        let mut bytes = vec![];
        std::fs::File::open(&path)
            .and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes))
            .map_err(|error| SnapshotError::Read(path.clone(), error))?;
        Self::parse(path, &bytes)
    }

    /// Understands the bytes of `path`.
    ///
    /// # Errors
    /// When it does not.
    pub fn parse(path: PathBuf, bytes: &[u8]) -> Result<Self, SnapshotError> {
        /// Of whatever format.
        #[derive(Deserialize)]
        struct Any {
            format: u64,
        }
        let theirs = match serde_json::from_slice(bytes) {
            Ok(Any { format }) => format,
            Err(error) => return Err(SnapshotError::Manifest(path, error)),
        };
        if theirs != FORMAT {
            return Err(SnapshotError::Format { path, theirs });
        }
        serde_json::from_slice(bytes).map_err(|error| SnapshotError::Manifest(path, error))
    }

    /// The files beside it, each with its name.
    pub fn files(&self) -> Vec<(String, &Contents)> {
        let disk = self.disk.iter().enumerate();
        let disk = disk.map(|(number, contents)| (disk_file(number), contents));
        [
            (STATE_FILE.into(), &self.state),
            (MEMORY_FILE.into(), &self.memory),
        ]
        .into_iter()
        .chain(disk)
        .collect()
    }
}

/// The name of a file of the data disk, by its place: 0 is the base.
pub fn disk_file(number: usize) -> String {
    match number {
        0 => DISK_FILE.into(),
        number => format!("{DISK_FILE}.{number}"),
    }
}

#[cfg(test)]
pub mod testing {
    use super::*;

    /// The manifest of a snapshot `s` of VM `a`.
    pub fn manifest() -> Manifest {
        let file = UsedFile {
            path: "/nowhere".into(),
            inode: 2,
            bytes: 3,
            modified_ns: 4,
        };
        let booted = Booted { file, sha256: None };
        let contents = Contents {
            bytes: 0,
            checksum: None,
        };
        Manifest {
            format: FORMAT,
            lighter: "0.1.0".into(),
            vm: "a".parse().unwrap(),
            name: "s".parse().unwrap(),
            taken_unix_ms: 5,
            settings: crate::vm::testing::settings(1 << 20),
            network: true,
            kernel: booted.clone(),
            image: booted,
            state: contents.clone(),
            memory: contents.clone(),
            disk: vec![contents],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::manifest;
    use super::*;

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_no_other_format_is() {
        let json = serde_json::to_vec(&manifest()).unwrap();
        assert_eq!(Manifest::parse("m".into(), &json).unwrap(), manifest());
        let newer = br#"{"format":2,"from":"the future"}"#;
        assert!(matches!(
            Manifest::parse("m".into(), newer),
            Err(SnapshotError::Format { theirs: 2, .. })
        ));
        for bad in [
            &b""[..],
            b"{}",
            b"[1]",
            br#"{"format":1}"#,
            &json[..json.len() - 1],
        ] {
            assert!(matches!(
                Manifest::parse("m".into(), bad),
                Err(SnapshotError::Manifest(..))
            ));
        }
    }
    /// Of the first Lighter that took snapshots: this one must read it, or [`FORMAT`] be another.
    #[test]
    fn a_manifest_of_this_format_is_read_whoever_wrote_it() {
        let json = include_bytes!("golden/manifest-1.json");
        let manifest = Manifest::parse("m".into(), json).unwrap();
        assert_eq!(manifest.format, FORMAT);
        assert_eq!(manifest.settings.mounts().len(), 2);
        let again = serde_json::to_value(&manifest).unwrap();
        assert_eq!(again, serde_json::from_slice::<serde_json::Value>(json).unwrap());
    }
}
