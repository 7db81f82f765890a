//! The guest's machine-id (machine-id(5)), for containers that mount /etc/machine-id: kept on the data disk, so that a VM has the
//! same for as long as it has its data. A fork gets another.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::random_id;

/// Where it is kept.
const KEPT: &str = "/var/lib/lighter/machine-id";

/// Where programs look.
const SHOWN: &str = "/etc/machine-id";

/// It cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No new one.
    #[error(transparent)]
    Random(#[from] random_id::Error),
    /// A file.
    #[error("cannot write the machine-id to {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// Shows the one that the disk has, or a new one.
///
/// # Errors
/// When there is none afterwards.
pub fn prepare() -> Result<(), Error> {
    match kept(Path::new(KEPT)) {
        Some(id) => write(Path::new(SHOWN), &id),
        None => renew(),
    }
}

/// Makes a new one.
///
/// # Errors
/// When the old one is still there.
pub fn renew() -> Result<(), Error> {
    let id = random_id::uuid()?.replace('-', "");
    write(Path::new(KEPT), &id)?;
    write(Path::new(SHOWN), &id)
}

fn kept(path: &Path) -> Option<String> {
    let id = fs::read_to_string(path).ok()?.trim().to_owned();
    let is_valid = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_valid.then_some(id)
}

/// Into the file that is there: containers may have mounted it.
fn write(path: &Path, id: &str) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)
        .and_then(|()| random_id::write_over(path, &format!("{id}\n")))
        .map_err(|error| Error::Write(path.into(), error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_written_is_kept_in_the_same_file_and_nonsense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lighter/machine-id");
        assert_eq!(kept(&path), None);
        let (first, second) = ("0123456789abcdef".repeat(2), "f".repeat(32));
        write(&path, &first).unwrap();
        assert_eq!(kept(&path), Some(first));
        let inode = fs::metadata(&path).unwrap().ino();
        write(&path, &second).unwrap();
        assert_eq!(kept(&path), Some(second));
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        for bad in ["", "0", &"g".repeat(32)] {
            write(&path, bad).unwrap();
            assert_eq!(kept(&path), None, "{bad:?}");
        }
    }
}
