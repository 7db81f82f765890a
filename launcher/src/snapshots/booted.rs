//! The kernel and the image that a VM was booted from. They belong to no VM, and a snapshot only says which they were.

use super::error::SnapshotError;
use super::manifest::Booted;
use lighter_protocol::supervisor::UsedFile;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What tells the open `file` from another that may be at `path` later.
///
/// # Errors
/// When nothing can be told about it.
pub fn used(path: &Path, file: &File) -> io::Result<UsedFile> {
    let metadata = file.metadata()?;
    Ok(UsedFile {
        path: path.into(),
        inode: metadata.ino(),
        bytes: metadata.len(),
        modified_ns: metadata
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(metadata.mtime_nsec()),
    })
}

/// Whether the file that was used is at its path still.
pub fn is_there(file: &UsedFile) -> bool {
    File::open(&file.path)
        .and_then(|now| used(&file.path, &now))
        .is_ok_and(|now| now == *file)
}

/// Reads the file that was used, for a snapshot that is to outlast it.
///
/// # Errors
/// When it is gone.
pub fn hash(what: &'static str, file: &UsedFile) -> Result<Booted, SnapshotError> {
    let read = |error| SnapshotError::Read(file.path.clone(), error);
    let open = File::open(&file.path).map_err(read)?;
    if used(&file.path, &open).map_err(read)? != *file {
        return Err(replaced(what, file));
    }
    Ok(Booted {
        file: file.clone(),
        sha256: Some(sha256(open).map_err(read)?),
    })
}

/// That another is in its place.
pub fn replaced(what: &'static str, file: &UsedFile) -> SnapshotError {
    SnapshotError::Booted {
        what,
        wanted: file.path.display().to_string(),
        found: "that file has been replaced or changed since".into(),
    }
}

/// The file that VMs of the snapshot go on with: the one that its VM was booted from, or the one that a new VM would boot
/// from, if that has the same content.
///
/// # Errors
/// When neither is it, with what differs.
pub fn find(what: &'static str, booted: &Booted, chosen: &Path) -> Result<PathBuf, SnapshotError> {
    if is_there(&booted.file) {
        return Ok(booted.file.path.clone());
    }
    let mut found = vec![];
    for path in [booted.file.path.as_path(), chosen] {
        let Some(wanted) = &booted.sha256 else { break };
        match File::open(path).and_then(sha256) {
            Ok(sum) if sum == *wanted => return Ok(path.into()),
            Ok(sum) => found.push(format!("{} has SHA-256 {sum}", path.display())),
            Err(error) => found.push(format!("{} cannot be read: {error}", path.display())),
        }
    }
    found.dedup();
    match &booted.sha256 {
        None => Err(replaced(what, &booted.file)),
        Some(sum) => Err(SnapshotError::Booted {
            what,
            wanted: format!("{}, SHA-256 {sum}", booted.file.path.display()),
            found: found.join(", "),
        }),
    }
}

fn sha256(mut file: File) -> io::Result<String> {
    let mut sum = Sha256::new();
    io::copy(&mut file, &mut sum)?;
    Ok(sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_what_it_is_or_what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("vmlinux"), folder.path().join("other"));
        std::fs::write(&path, "kernel").unwrap();
        let file = used(&path, &File::open(&path).unwrap()).unwrap();
        let booted = hash("kernel", &file).unwrap();
        assert_eq!(find("kernel", &booted, &other).unwrap(), path);
        // Rewritten alike, and moved.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "kernel").unwrap();
        assert_eq!(find("kernel", &booted, &other).unwrap(), path);
        std::fs::rename(&path, &other).unwrap();
        assert_eq!(find("kernel", &booted, &other).unwrap(), other);
        std::fs::write(&other, "Kernel").unwrap();
        let error = find("kernel", &booted, &other).unwrap_err().to_string();
        assert!(
            error.contains("SHA-256") && error.contains("other has"),
            "{error}"
        );
        let unknown = Booted {
            sha256: None,
            ..booted
        };
        std::fs::write(&path, "kernel").unwrap();
        let error = find("kernel", &unknown, &other).unwrap_err().to_string();
        assert!(error.contains("replaced"), "{error}");
        assert!(hash("kernel", &file).is_err());
    }
}
