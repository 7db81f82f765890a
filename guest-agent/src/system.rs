//! Settings of the kernel and of this process: sysctls, limits; and the hostname.

use std::{fs, io};

use nix::sys::resource::{Resource, setrlimit};

use crate::log::Log;

/// The hostname until the supervisor tells another.
pub const DEFAULT_HOSTNAME: &str = "lighter";

/// What a Docker host wants, beside what dockerd sets itself.
const SYSCTLS: &[(&str, &str)] = &[
    // Containers reach the network through this machine. dockerd would do the first, but only when it comes to it.
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    // A port may be published on an address that only the host has.
    ("net/ipv4/ip_nonlocal_bind", "1"),
    ("net/ipv6/ip_nonlocal_bind", "1"),
    // Databases with many maps (Elasticsearch refuses to start below this).
    ("vm/max_map_count", "262144"),
    // Watchers of source trees, several in a VM.
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/inotify/max_user_instances", "8192"),
    // All containers' processes share one number space.
    ("kernel/pid_max", "4194304"),
    // The agent's lines are few and must not be dropped. This one wants its line break.
    ("kernel/printk_devkmsg", "on\n"),
];

/// Open files for the daemons and, through them, for containers.
const OPEN_FILES: u64 = 1_048_576;

/// Applies all settings. Failures are logged: none of them keeps the engine from starting.
pub fn prepare(log: &Log) {
    for (name, value) in SYSCTLS {
        let path = format!("/proc/sys/{name}");
        if let Err(error) = fs::write(&path, value) {
            log.warn(format!("cannot set {path} to {}: {error}", value.trim()));
        }
    }
    for (resource, value) in [
        (Resource::RLIMIT_NOFILE, OPEN_FILES),
        (Resource::RLIMIT_NPROC, libc::RLIM_INFINITY),
        (Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY),
    ] {
        if let Err(error) = setrlimit(resource, value, value) {
            log.warn(format!("cannot set the limit {resource:?} to {value}: {error}"));
        }
    }
    // When memory runs out, the kernel must not choose what keeps the VM usable.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        log.warn(format!(
            "cannot protect the agent from the out-of-memory killer: {error}"
        ));
    }
}

/// Has the kernel drop what it holds of files and nobody uses: `"1"` for pages, `"2"` for names and files.
///
/// # Errors
/// When it refuses.
pub fn drop_caches(what: &str) -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", what)
}

/// Sets the hostname, unless it is not one.
pub fn set_hostname(name: &str, log: &Log) {
    if !is_hostname(name) {
        log.error(format!(
            "the hostname {name:?} is not 1 to 63 letters, digits, dots and dashes; it is not set"
        ));
    } else if let Err(error) = nix::unistd::sethostname(name) {
        log.error(format!("cannot set the hostname {name}: {error}"));
    }
}

fn is_hostname(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    (1..=63).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with(['-', '.'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames_are_checked() {
        assert!(is_hostname("default"));
        assert!(is_hostname("ci-7.example"));
        for bad in ["", "-a", ".a", "a b", "a\n", "ä", &"a".repeat(64)] {
            assert!(!is_hostname(bad), "{bad:?}");
        }
    }
}
