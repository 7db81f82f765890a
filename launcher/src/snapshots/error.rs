//! Why a snapshot cannot be taken or used.

use crate::error::{Code, Error};
use crate::name::Name;
use lighter_disk::LayerError;
use std::io;
use std::path::PathBuf;

/// Why a snapshot cannot be taken or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// None of that name.
    #[error("there is no snapshot {0}")]
    NoSuchSnapshot(String),
    /// Several VMs have one.
    #[error("there are several snapshots {name}: {}", found.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: Name,
        /// With the names of their VMs.
        found: Vec<String>,
    },
    /// The name is taken.
    #[error("a snapshot {0} exists already")]
    Exists(String),
    /// Somebody else is at it.
    #[error("a snapshot or a fork of VM {0} is being made")]
    Busy(Name),
    /// A file or folder cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// A file or folder cannot be written.
    #[error("cannot write {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// The manifest is not what a manifest is.
    #[error("cannot understand the manifest {}", .0.display())]
    Manifest(PathBuf, #[source] serde_json::Error),
    /// Of another Lighter.
    #[error("the snapshot {} has format {theirs}, and this Lighter reads format {}", path.display(), super::manifest::FORMAT)]
    Format {
        /// Its manifest.
        path: PathBuf,
        /// What that says.
        theirs: u64,
    },
    /// A file is shorter or longer than it was.
    #[error("{} has {actual} bytes, and the snapshot's manifest says {said}: the file is damaged", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// In the manifest.
        said: u64,
        /// In fact.
        actual: u64,
    },
    /// A byte of a file is another.
    #[error("{} does not have the checksum of the snapshot's manifest: the file is damaged", .0.display())]
    Checksum(PathBuf),
    /// It is no layer, or not of that disk.
    #[error("cannot read the snapshot's data disk through {}", .0.display())]
    Layer(PathBuf, #[source] LayerError),
    /// The file is no exported snapshot, or not all of one.
    #[error("{} is not a whole exported snapshot: {why}", path.display())]
    NotExported {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel or the image is not there any more.
    #[error("the snapshot needs the {what} that its VM was booted with ({wanted}), and {found}")]
    Booted {
        /// `kernel` or `image`.
        what: &'static str,
        /// Which it was.
        wanted: String,
        /// What is there instead.
        found: String,
    },
}

impl From<SnapshotError> for Error {
    fn from(error: SnapshotError) -> Self {
        let plain = Self::of(Code::Failure, &error);
        match &error {
            SnapshotError::NoSuchSnapshot(_) => plain.hint("lighter snapshot ls shows the snapshots there are"),
            SnapshotError::Ambiguous { found, .. } => Self::of(Code::Usage, &error)
                .hint(format!("name the VM, too: {}", found.first().map_or("", |name| name))),
            SnapshotError::Exists(name) => {
                plain.hint(format!("choose another name, or lighter snapshot rm {name}"))
            }
            SnapshotError::Busy(_) => plain.hint("try again when that is done"),
            SnapshotError::Read(_, error) if error.kind() == io::ErrorKind::NotFound => {
                plain.hint("the snapshot is not whole: put the file back, or remove the snapshot with lighter snapshot rm")
            }
            SnapshotError::Read(..) | SnapshotError::Write(..) => {
                plain.hint("check the folder's permissions and the free space")
            }
            SnapshotError::Manifest(..) | SnapshotError::Format { .. } => {
                plain.hint("use the Lighter that took it, or take the snapshot anew")
            }
            SnapshotError::Length { .. } | SnapshotError::Checksum(_) | SnapshotError::Layer(..) => plain.hint(
                "nothing was started from it: import it anew if you exported it, or remove it with lighter snapshot rm",
            ),
            SnapshotError::NotExported { .. } => {
                plain.hint("lighter snapshot export makes such files; decompress one that was compressed")
            }
            SnapshotError::Booted { what, .. } => plain.hint(format!(
                "put that {what} back in its place, or start the VM with the new one and take the snapshot anew"
            )),
        }
    }
}
