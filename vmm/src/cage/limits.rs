//! What a process may use of the host, whatever it does.

use std::io;

/// Threads and processes that a monitor has at most: 64 vCPUs, devices, and the copy that writes a snapshot.
const TASKS: u64 = 160;

/// Limits this process: no core file, in which its guest's memory might be; `memory` bytes of memory, mapped or not; and
/// as many tasks as it needs, if only its own are `counted`: where it has a user namespace of its own, and the kernel counts by
/// namespaces.
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
    match counted && counts_by_namespace(&release()) {
        true => limit(libc::RLIMIT_NPROC, TASKS),
        false => Ok(()),
    }
}

/// The release of the host's kernel, such as `6.1.0-13-amd64`.
fn release() -> String {
    // SAFETY: a utsname is arrays of bytes, which may be zero; it is valid for writing.
    let name = unsafe {
        let mut name: libc::utsname = std::mem::zeroed();
        libc::uname(&raw mut name);
        name
    };
    let bytes = name.release.iter().map(|byte| byte.to_ne_bytes()[0]);
    let bytes = Vec::from_iter(bytes.take_while(|byte| *byte != 0));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Whether the kernel of that `release` counts the tasks of a user namespace by themselves, as Linux does since 5.14. Before, all
/// tasks of the user count, of which there may be any number.
fn counts_by_namespace(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    (next(), next()) >= (Some(5), Some(14))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_limited_where_they_are_counted_apart() {
        for (release, counts) in [
            ("5.4.0-216-generic", false),
            ("5.13.19", false),
            ("5.14.0-rc1", true),
            ("6.1.0-13-amd64", true),
            ("4.19", false),
            ("10.0", true),
            ("", false),
        ] {
            assert_eq!(counts_by_namespace(release), counts, "{release}");
        }
        assert!(!release().is_empty());
    }
}
