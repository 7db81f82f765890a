//! Locks between `lighter` processes: `flock` on a file, released by the kernel when its holder ends, however it ends.

use crate::error::{Code, Error};
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a lock could not be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot lock {}", path.display())]
pub struct LockError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl From<LockError> for Error {
    fn from(error: LockError) -> Self {
        Self::of(Code::Failure, &error).hint("check the folder's permissions and the free space")
    }
}

/// A held lock.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock, waiting for as long as another process holds it.
    ///
    /// # Errors
    /// When the file cannot be opened or made.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        Ok(Self::take(path, FlockOperation::LockExclusive)?
            .expect("a blocking flock waits until it has the lock"))
    }

    /// Takes the lock, or returns `None` when another process holds it.
    ///
    /// # Errors
    /// When the file cannot be opened or made.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>, LockError> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Option<Self>, LockError> {
        let error = |source| LockError {
            path: path.into(),
            source,
        };
        loop {
            let mut options = OpenOptions::new();
            options
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .mode(0o600);
            let file = options.open(path).map_err(error)?;
            match flock(&file, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(error(errno.into())),
            }
            // The last holder may have removed the file while this process waited: that lock is nobody's.
            let held = file.metadata().map_err(error)?;
            if std::fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (held.dev(), held.ino())) {
                return Ok(Some(Self {
                    _file: file,
                    path: path.into(),
                }));
            }
        }
    }

    /// Removes the file and releases the lock.
    pub fn remove(self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes the file of a lock that nobody holds.
pub fn sweep(path: &Path) {
    if let Ok(Some(lock)) = Lock::try_acquire(path) {
        lock.remove();
    }
}

/// Whether another process holds the lock. Makes no file.
pub fn is_held(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| {
        matches!(
            flock(&file, FlockOperation::NonBlockingLockShared),
            Err(rustix::io::Errno::WOULDBLOCK)
        )
    })
}

/// Waits until nobody holds the lock. Makes no file.
pub fn wait_until_free(path: &Path) {
    if let Ok(file) = File::open(path) {
        while flock(&file, FlockOperation::LockShared) == Err(rustix::io::Errno::INTR) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_seen_and_refused_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        assert!(!is_held(&path));
        assert!(!path.exists());
        let lock = Lock::acquire(&path).unwrap();
        assert!(is_held(&path));
        assert!(Lock::try_acquire(&path).unwrap().is_none());
        drop(lock);
        assert!(!is_held(&path));
        wait_until_free(&path);
        let lock = Lock::try_acquire(&path).unwrap();
        sweep(&path);
        assert!(lock.is_some() && path.exists());
        drop(lock);
        sweep(&path);
        assert!(!path.exists());
    }

    #[test]
    fn a_lock_whose_file_was_removed_is_taken_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = Lock::acquire(&path).unwrap();
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || Lock::acquire(&path).unwrap()
        });
        first.remove();
        let second = waiting.join().unwrap();
        assert!(
            is_held(&path),
            "the file that is there now is the one that is locked"
        );
        drop(second);
    }
}
