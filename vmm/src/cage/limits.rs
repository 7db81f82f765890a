//! What a process may use of the host, whatever it does.

use std::io;

/// Threads and processes that a monitor has at most: 64 vCPUs, devices, and the copy that writes a snapshot.
const TASKS: u64 = 160;

/// Limits this process: no core file, in which its guest's memory might be; `memory` bytes of memory, mapped or not; and
/// as many tasks as it needs, if only its own are `counted`: where it has a user namespace of its own.
///
/// # Errors
/// When the host refuses.
pub fn set(memory: u64, counted: bool) -> io::Result<()> {
    let limit = |resource, value: u64| {
        let limit = libc::rlimit {
            rlim_cur: value,
            rlim_max: value,
        };
        // SAFETY: `limit` is valid for reading.
        match unsafe { libc::setrlimit(resource, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_AS, memory)?;
    match counted {
        true => limit(libc::RLIMIT_NPROC, TASKS),
        false => Ok(()),
    }
}
