//! What of the host's files and networks a thread can reach by paths and addresses: nothing, or one folder (landlock(7)).
//!
//! Each thread restricts itself, since a folder's may do more than the others: what one of them has is no other's.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The newest rights that are asked for; a kernel that knows fewer enforces those.
const LANDLOCK: ABI = ABI::V6;

/// Whether this kernel has Landlock; found out by asking for its version.
pub fn is_possible() -> bool {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no attributes, and only returns a number.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, VERSION) > 0 }
}

/// Lets the calling thread, and those that it makes, open nothing and connect to nothing from here on.
///
/// # Errors
/// When the kernel has Landlock and refuses.
pub fn nothing() -> io::Result<()> {
    restrict(Ok)
}

/// Makes the calling thread one that can serve `folder`: its working directory, and all that it can open and change from here on;
/// with `read_only` it can change nothing there. It gets a working directory and a umask of its own: the FUSE server changes
/// directories to reach files by their descriptors, and the guest has applied the umask of whoever creates a file.
///
/// # Errors
/// When the host refuses.
pub fn folder(folder: &(impl AsFd + AsRawFd), read_only: bool) -> io::Result<()> {
    // SAFETY: unshare takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: any number is harmless.
    if unsafe { libc::fchdir(folder.as_raw_fd()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: umask cannot fail, and is this thread's own now.
    unsafe { libc::umask(0) };
    restrict(|rules| rules.add_rule(PathBeneath::new(folder, rights(read_only))))
}

/// A kernel without Landlock restricts nothing.
fn restrict(allow: impl FnOnce(RulesetCreated) -> Result<RulesetCreated, RulesetError>) -> io::Result<()> {
    let restrict = || {
        let rules = Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::from_all(LANDLOCK))?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?;
        allow(rules)?.restrict_self()
    };
    let status = restrict().map_err(io::Error::other)?;
    if status.ruleset == RulesetStatus::NotEnforced && is_possible() {
        return Err(io::Error::other("Landlock was asked for and does not restrict"));
    }
    Ok(())
}

/// Everything that files need but devices and programs.
fn rights(read_only: bool) -> BitFlags<AccessFs> {
    if read_only {
        return make_bitflags!(AccessFs::{ReadFile | ReadDir});
    }
    let never = make_bitflags!(AccessFs::{Execute | MakeChar | MakeBlock | IoctlDev});
    AccessFs::from_all(LANDLOCK) & !never
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    #[test]
    fn a_thread_stays_in_its_folder() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = outside.path().join("secret");
        fs::write(&secret, "x").unwrap();
        fs::write(inside.path().join("old"), "x").unwrap();
        for read_only in [false, true] {
            let (inside, outside) = (inside.path().to_owned(), outside.path().to_owned());
            let thread = std::thread::spawn(move || {
                folder(&File::open(&inside).unwrap(), read_only).unwrap();
                assert_eq!(fs::read("old").unwrap(), b"x", "it is the working directory");
                if !is_possible() {
                    return;
                }
                assert!(fs::read(outside.join("secret")).is_err());
                assert!(fs::write(outside.join("new"), "x").is_err());
                assert!(fs::read_dir(&outside).is_err());
                assert_eq!(fs::read(inside.join("old")).unwrap(), b"x");
                assert_eq!(fs::write(inside.join("new"), "x").is_ok(), !read_only);
                assert_eq!(fs::create_dir(inside.join("folder")).is_ok(), !read_only);
            });
            thread.join().unwrap();
            // Other threads are free.
            fs::write(&secret, "y").unwrap();
        }
    }

    #[test]
    fn a_thread_without_a_folder_reaches_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let thread = std::thread::spawn(move || {
            nothing().unwrap();
            if is_possible() {
                assert!(fs::read(file.path()).is_err());
                assert!(fs::read_dir("/").is_err());
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_thread_has_a_umask_of_its_own() {
        // SAFETY: umask cannot fail.
        let ours = || unsafe { libc::umask(0o22) };
        ours();
        let here = File::open(".").unwrap();
        std::thread::spawn(move || folder(&here, true).unwrap())
            .join()
            .unwrap();
        assert_eq!(ours(), 0o22);
    }
}
