//! Capabilities (capabilities(7)): given up by each thread, since they are each thread's own.

use std::io;

const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_FOWNER: u32 = 3;
const CAP_SYS_ADMIN: u32 = 21;

/// _LINUX_CAPABILITY_VERSION_3.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    /// 0 is the calling thread.
    pid: i32,
}

/// The lower 32 capabilities, then the upper.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

impl Header {
    fn of_this_thread() -> Self {
        Self {
            version: VERSION,
            pid: 0,
        }
    }
}

/// Whether this process is the host's root, with all that root may do, and not one that is only called so.
pub fn are_roots() -> bool {
    let mut header = Header::of_this_thread();
    let mut sets = [Sets::default(); 2];
    // SAFETY: a header, to which the kernel may write, and the two sets that its version has.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    got == 0 && sets[0].effective & 1 << CAP_SYS_ADMIN != 0
}

/// Has no program that is started from here on get privileges by its file (no_new_privs).
///
/// # Errors
/// When the kernel does not know it.
pub fn never_more() -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives up the calling thread's capabilities; with `roots_files` it keeps what lets root read and change the files of others.
///
/// # Errors
/// When the kernel refuses.
pub fn give_up(roots_files: bool) -> io::Result<()> {
    let kept = if roots_files {
        1 << CAP_DAC_OVERRIDE | 1 << CAP_FOWNER
    } else {
        0
    };
    let lower = Sets {
        effective: kept,
        permitted: kept,
        inheritable: 0,
    };
    let mut header = Header::of_this_thread();
    let sets = [lower, Sets::default()];
    // SAFETY: as in `are_roots`.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_up_what_it_has_and_others_keep_theirs() {
        let before = are_roots();
        let thread = std::thread::spawn(|| {
            give_up(false).unwrap();
            assert!(!are_roots());
            assert!(give_up(true).is_err(), "they do not come back");
        });
        thread.join().unwrap();
        assert_eq!(are_roots(), before);
    }
}
