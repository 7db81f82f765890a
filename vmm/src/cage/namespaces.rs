//! Namespaces (namespaces(7)): an empty root, a network without interfaces, no other's IPC or host name.
//!
//! What was opened before stays open, shared folders with the mounts below them included: a descriptor keeps the mount that it was
//! opened through.

use super::processes::Standing;
use crate::threads;
use std::fs;
use std::io;
use std::thread::JoinHandle;

/// Why there are no namespaces for this process.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Forbidden to this user, or altogether.
    #[error(
        "the host lets this user make no namespaces: look at kernel.apparmor_restrict_unprivileged_userns, \
         kernel.unprivileged_userns_clone, user.max_user_namespaces and user.max_pid_namespaces ({0})"
    )]
    Refused(io::Error),
    /// Something of it.
    #[error("cannot {0} in new namespaces ({1})")]
    Step(&'static str, io::Error),
}

const NAMESPACES: libc::c_int =
    libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

/// The root that the process had, which a thread takes away: the kernel waits until nobody is in it any more.
#[derive(Debug)]
pub struct OldRoot(JoinHandle<io::Result<()>>);

impl OldRoot {
    /// Waits until it is gone.
    ///
    /// # Errors
    /// When it stays.
    pub fn wait_gone(self) -> Result<(), NamespaceError> {
        let gone = self
            .0
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
        gone.map_err(|error| NamespaceError::Step("take the old root away", error))
    }
}

/// Moves this process, which must have one thread, into new namespaces with an empty root. One that is neither root nor has a user
/// namespace of its own gets that as well.
///
/// # Errors
/// When the host does not allow it: the process is where it was, or has a root that is not empty.
pub fn enter(standing: &Standing) -> Result<OldRoot, NamespaceError> {
    let needs_users = !standing.is_root && !standing.has_users;
    let users = if needs_users { libc::CLONE_NEWUSER } else { 0 };
    // SAFETY: these cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    // SAFETY: takes no pointers.
    check(unsafe { libc::unshare(NAMESPACES | users) }).map_err(NamespaceError::Refused)?;
    if needs_users {
        name_user(uid, gid)?;
    }
    empty_root().map_err(|error| NamespaceError::Step("make the root empty", error))
}

/// Has this process's new user namespace know its user and group, by the numbers they have outside.
///
/// # Errors
/// When the host does not allow it.
pub fn name_user(uid: libc::uid_t, gid: libc::gid_t) -> Result<(), NamespaceError> {
    let write = |path: &str, text: String| fs::write(format!("/proc/self/{path}"), text);
    write("setgroups", "deny".into())
        .and_then(|()| write("uid_map", format!("{uid} {uid} 1")))
        .and_then(|()| write("gid_map", format!("{gid} {gid} 1")))
        .map_err(|error| NamespaceError::Step("name the user", error))
}

/// Has an empty, read-only file system take the place of the root.
fn empty_root() -> io::Result<OldRoot> {
    let none = c"none".as_ptr();
    // Any folder that there is: what the new file system covers is never seen.
    let place = c"/proc".as_ptr();
    let here = c".";
    let flags = libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: strings that end with zero; mounts change only in this process's own namespace, from which nothing is passed on.
    unsafe {
        let private = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(
            none,
            c"/".as_ptr(),
            std::ptr::null(),
            private,
            std::ptr::null(),
        ))?;
        let options = c"size=4k,nr_inodes=1,mode=555".as_ptr().cast();
        check(libc::mount(none, place, c"tmpfs".as_ptr(), flags, options))?;
        check(libc::chdir(place))?;
        // The old root lies on the new one then, and is taken away.
        check(libc::syscall(libc::SYS_pivot_root, here.as_ptr(), here.as_ptr()) as libc::c_int)?;
    }
    let remove = || {
        // SAFETY: as above. All threads have the same working directory.
        unsafe {
            check(libc::umount2(here.as_ptr(), libc::MNT_DETACH))?;
            check(libc::chdir(c"/".as_ptr()))
        }
    };
    Ok(OldRoot(threads::builder("old root").spawn(remove)?))
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
