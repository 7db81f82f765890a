//! The file descriptors that the supervisor handed over: each is taken once, and checked before.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Why a descriptor cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DescriptorError {
    /// It is not open.
    #[error("descriptor {fd} for the {what} is not open")]
    NotOpen {
        /// The number.
        fd: RawFd,
        /// What it was meant for.
        what: String,
    },
    /// It is standard input, output or error, or was named twice.
    #[error("descriptor {fd} for the {what} is in use for something else")]
    InUse {
        /// The number.
        fd: RawFd,
        /// What it was meant for.
        what: String,
    },
}

/// Takes inherited descriptors into ownership.
#[derive(Debug, Default)]
pub struct Inherited {
    taken: BTreeSet<RawFd>,
}

impl Inherited {
    /// Nothing taken yet. Make one for the process, before it opens anything.
    ///
    /// # Safety
    /// No descriptor above 2 may be owned by anything in this process: those that are open were inherited.
    pub unsafe fn new() -> Self {
        Self::default()
    }

    /// Takes `fd`; `what` names it in errors. It is closed when programs are started from here on.
    ///
    /// # Errors
    /// When it is not open, or was taken before.
    pub fn take(&mut self, fd: RawFd, what: &str) -> Result<OwnedFd, DescriptorError> {
        if fd <= libc::STDERR_FILENO || !self.taken.insert(fd) {
            return Err(DescriptorError::InUse {
                fd,
                what: what.to_owned(),
            });
        }
        // SAFETY: fcntl with F_SETFD on any number is harmless.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(DescriptorError::NotOpen {
                fd,
                what: what.to_owned(),
            });
        }
        // SAFETY: it is open, and by the contract of `new` and `taken` nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_it_is_open() {
        // SAFETY: the descriptors taken here are given up by their owners first.
        let mut inherited = unsafe { Inherited::new() };
        let fd = tempfile::tempfile().unwrap().into_raw_fd();
        let owned = inherited.take(fd, "disk").unwrap();
        assert!(matches!(
            inherited.take(fd, "kernel"),
            Err(DescriptorError::InUse { .. })
        ));
        assert!(matches!(
            inherited.take(1, "kernel"),
            Err(DescriptorError::InUse { .. })
        ));
        assert!(matches!(
            inherited.take(100_000, "kernel"),
            Err(DescriptorError::NotOpen { .. })
        ));
        drop(owned);
    }
}
