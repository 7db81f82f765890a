//! Random names for things, and files that hold one.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

const SOURCE: &str = "/proc/sys/kernel/random/uuid";

/// The kernel does not give one.
#[derive(Debug, thiserror::Error)]
#[error("cannot read a random identifier from {SOURCE}")]
pub struct Error(#[source] io::Error);

/// A new UUID (version 4).
///
/// # Errors
/// When the kernel gives none.
pub fn uuid() -> Result<String, Error> {
    Ok(fs::read_to_string(SOURCE).map_err(Error)?.trim().to_owned())
}

/// Writes an identifier over the one in the file at `path`, or to a new file. They are of one length; and a file that is emptied first,
/// or that takes another's place, ext4 would write to the disk at once, for which nobody need wait.
///
/// # Errors
/// When it cannot be written.
pub fn write_over(path: &Path, id: &str) -> io::Result<()> {
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(id.as_bytes())?;
    let length = id.len() as u64;
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_the_same() {
        let (one, other) = (uuid().unwrap(), uuid().unwrap());
        assert_eq!((one.len(), one.matches('-').count()), (36, 4));
        assert_ne!(one, other);
    }

    #[test]
    fn what_is_written_over_another_is_all_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("id");
        for id in ["long one", "one", "another"] {
            write_over(&path, id).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), id);
        }
    }
}
