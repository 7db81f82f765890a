//! A namespace of processes (pid_namespaces(7)): this process and its own copies have numbers in it, and no others.
//!
//! Only a process that is made for it can be the first of one. So this process makes another, which goes on in its place.

use super::namespaces::{self, NamespaceError};
use super::{is_off, privileges};
use std::io;

/// Whose child the process is to be that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// This process's, which waits for it.
    This,
    /// This process's own parent's, so that this process can end.
    Its,
}

/// A process after it was to go on in a namespace of its own.
#[derive(Debug)]
pub enum Split {
    /// The one that goes on.
    GoesOn(Standing),
    /// The one that was before, and the number of the one that goes on.
    Before(libc::pid_t),
}

/// Where the process that goes on stands.
#[derive(Debug)]
pub struct Standing {
    /// It is the host's root, with all that root may do.
    pub(super) is_root: bool,
    /// It has a user namespace of its own.
    pub(super) has_users: bool,
    /// Why it has no namespace of processes.
    pub(super) refused: Option<NamespaceError>,
}

/// Has this process, which must have one thread, go on as the first of a namespace of processes, as a child of `parent`. It is killed
/// as this process would have been when its parent ends. Where the host does not allow it, this process itself goes on, without.
///
/// A process that is not the host's root gets a user namespace as well, in which it is who it was and nobody else is anybody.
///
/// The first process of a namespace ends by a signal from outside only if that is SIGKILL, and by its own faults.
pub fn split(parent: Parent) -> Split {
    let is_root = privileges::are_roots();
    let stay = |refused| {
        Split::GoesOn(Standing {
            is_root,
            has_users: false,
            refused,
        })
    };
    // What is neither is told by those who go into the cage.
    if !matches!(is_off(), Ok(false)) {
        return stay(None);
    }
    let users = if is_root { 0 } else { libc::CLONE_NEWUSER };
    let sibling = match parent {
        Parent::This => 0,
        Parent::Its => libc::CLONE_PARENT,
    };
    // SAFETY: these cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    let mut signal = 0;
    // SAFETY: `signal` is valid for writing.
    unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal) };
    let flags = libc::c_long::from(libc::CLONE_NEWPID | users | sibling | libc::SIGCHLD);
    // SAFETY: without a stack it is a copy, as fork(2) makes; with one thread, all of it is there. What libc keeps of a thread's number
    // is the old one, of which only robust and error-checking mutexes make use, and there are none.
    let process = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match process {
        0 => {
            // SAFETY: takes no pointers.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) };
            let refused = match is_root {
                true => None,
                false => namespaces::name_user(uid, gid).err(),
            };
            Split::GoesOn(Standing {
                is_root,
                has_users: !is_root,
                refused,
            })
        }
        1.. => Split::Before(process as libc::pid_t),
        _ => stay(Some(NamespaceError::Refused(io::Error::last_os_error()))),
    }
}
