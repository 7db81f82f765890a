//! cgroup v2: the tree that containers hang on.
//!
//! ```text
//! /sys/fs/cgroup            every controller enabled for the children
//! ├── lighter               PID 1, the agent, commands of `lighter exec`
//! ├── engine                containerd, its shims, dockerd
//! └── docker/<container>    made by runc
//! ```
//!
//! The root has no processes of its own: their use could not be limited or told from the kernel's.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::Path,
};

use crate::log::Log;

const ROOT: &str = "/sys/fs/cgroup";

/// Membership file of the daemons' group.
pub const ENGINE_PROCS: &std::ffi::CStr = c"/sys/fs/cgroup/engine/cgroup.procs";

/// Shares of the processors when there are not enough: containers have 100, and cannot starve who serves their clients.
const WEIGHTS: [(&str, &str); 2] = [("lighter", "1000"), ("engine", "400")];

/// The group that dockerd makes its containers' groups in.
const CONTAINERS: &str = "/sys/fs/cgroup/docker";

/// Makes the groups and enables the controllers. Failures are logged: the engine tells best what it cannot do
/// without.
pub fn prepare(log: &Log) {
    let root = Path::new(ROOT);
    for group in ["lighter", "engine"] {
        if let Err(error) = fs::create_dir(root.join(group)) {
            log.error(format!("cannot create the cgroup {ROOT}/{group}: {error}"));
        }
    }
    for process in [1, std::process::id()] {
        if let Err(error) = write(&root.join("lighter/cgroup.procs"), &process.to_string()) {
            log.error(format!(
                "cannot move process {process} to the cgroup {ROOT}/lighter: {error}"
            ));
        }
    }
    match fs::read_to_string(root.join("cgroup.controllers")) {
        Ok(available) => {
            if let Err(error) = write(&root.join("cgroup.subtree_control"), &enabling(&available)) {
                log.error(format!(
                    "cannot enable the cgroup controllers {}: {error}",
                    available.trim()
                ));
            }
        }
        Err(error) => log.error(format!("cannot read {ROOT}/cgroup.controllers: {error}")),
    }
    for (group, weight) in WEIGHTS {
        if let Err(error) = write(&root.join(group).join("cpu.weight"), weight) {
            log.error(format!(
                "cannot set the weight of the cgroup {ROOT}/{group}: {error}"
            ));
        }
    }
}

/// Kills every process of every container at once.
///
/// # Errors
/// From the write; there being no group of containers is fine.
pub fn kill_containers() -> io::Result<()> {
    match write(&Path::new(CONTAINERS).join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The processor time of all containers since the guest was booted, microseconds. Those of a `--cgroup-parent` elsewhere are not
/// in it.
pub fn containers_cpu_us() -> u64 {
    // Before the first container there is no group.
    let stat = fs::read_to_string(Path::new(CONTAINERS).join("cpu.stat")).unwrap_or_default();
    usage_us(&stat).unwrap_or(0)
}

/// How many of the daemons' processes the kernel has killed for want of memory.
pub fn daemons_killed_for_memory() -> u64 {
    let events = fs::read_to_string(Path::new(ROOT).join("engine/memory.events")).unwrap_or_default();
    number(&events, "oom_kill").unwrap_or(0)
}

/// Reads cpu.stat.
fn usage_us(stat: &str) -> Option<u64> {
    number(stat, "usage_usec")
}

/// The number in the line of `file` that begins with `key`.
fn number(file: &str, key: &str) -> Option<u64> {
    let value = file
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))?;
    value.trim().parse().ok()
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// `cpu io` as `+cpu +io`.
fn enabling(controllers: &str) -> String {
    controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_controller_is_enabled() {
        assert_eq!(enabling("cpuset cpu io\n"), "+cpuset +cpu +io");
        assert_eq!(enabling("\n"), "");
    }

    #[test]
    fn the_time_of_a_group_is_read() {
        let stat = "usage_usec 14873\nuser_usec 10000\nsystem_usec 4873\n";
        assert_eq!(usage_us(stat), Some(14_873));
        assert_eq!(usage_us(""), None);
        let events = "low 0\noom 1\noom_kill 3\noom_group_kill 0\n";
        assert_eq!(number(events, "oom_kill"), Some(3));
    }
}
