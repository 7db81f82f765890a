//! What keeps the thread of a shared folder in the folder, whatever goes wrong in the FUSE server.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use std::io;
use std::os::fd::AsFd;

/// The newest rights that are asked for; a kernel that knows fewer enforces those.
const LANDLOCK: ABI = ABI::V6;

/// Gives the calling thread a working directory and a umask of its own: the root, and none. The FUSE server changes
/// directories to reach files by their descriptors, and the guest has applied the umask of whoever creates a file.
///
/// # Errors
/// When the host refuses.
pub(super) fn separate() -> io::Result<()> {
    // SAFETY: unshare takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a string that ends with zero.
    if unsafe { libc::chdir(c"/".as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: umask cannot fail, and is this thread's own now.
    unsafe { libc::umask(0) };
    Ok(())
}

/// Lets the calling thread open and change nothing outside of `folder` from here on, and nothing in it if `read_only`. Says
/// how far this kernel goes along.
///
/// # Errors
/// When the kernel has Landlock and refuses.
pub(super) fn confine(folder: impl AsFd, read_only: bool) -> Result<RestrictionStatus, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .add_rule(PathBeneath::new(folder, rights(read_only)))?
        .restrict_self()
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
    use landlock::RulesetStatus;
    use std::fs::{self, File};

    #[test]
    fn a_confined_thread_stays_in_its_folder() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = outside.path().join("secret");
        fs::write(&secret, "x").unwrap();
        fs::write(inside.path().join("old"), "x").unwrap();
        for read_only in [false, true] {
            let (inside, outside) = (inside.path().to_owned(), outside.path().to_owned());
            let thread = std::thread::spawn(move || {
                separate().unwrap();
                let folder = File::open(&inside).unwrap();
                let status = confine(&folder, read_only).unwrap();
                if status.ruleset == RulesetStatus::NotEnforced {
                    return false;
                }
                assert!(fs::read(outside.join("secret")).is_err());
                assert!(fs::write(outside.join("new"), "x").is_err());
                assert!(fs::read_dir(&outside).is_err());
                assert_eq!(fs::read(inside.join("old")).unwrap(), b"x");
                assert_eq!(fs::write(inside.join("new"), "x").is_ok(), !read_only);
                assert_eq!(fs::create_dir(inside.join("folder")).is_ok(), !read_only);
                true
            });
            if thread.join().unwrap() {
                // Nobody else is confined.
                fs::write(&secret, "y").unwrap();
            }
        }
    }

    #[test]
    fn a_thread_has_a_umask_of_its_own() {
        // SAFETY: umask cannot fail.
        let ours = || unsafe { libc::umask(0o22) };
        ours();
        std::thread::spawn(|| separate().unwrap()).join().unwrap();
        assert_eq!(ours(), 0o22);
    }
}
