//! Memory of a monitor beside its guest's, of a process with its part of what it shares, and of the host: from `/proc`.

use crate::error::{Context, Error, Result};
use lighter_protocol::supervisor::Status;
use serde::{Deserialize, Serialize};

/// What marks guest memory among the mappings of a monitor: it alone is left out of core dumps.
const GUEST_FLAG: &str = "dd";

/// Memory of one process, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident memory that is not the guest's, file pages shared with others included.
    pub monitor_rss_kib: u64,
    /// The part of it that nobody else has: what one more VM costs.
    pub monitor_private_kib: u64,
    /// Resident guest memory.
    pub guest_rss_kib: u64,
}

/// Measures a process.
///
/// # Errors
/// When it is gone, or its `smaps` may not be read.
pub fn of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    Ok(parse(&smaps))
}

/// The proportional set size of a process, KiB: what it alone has, and its part of what it shares.
///
/// # Errors
/// When it is gone, or its `smaps_rollup` may not be read.
pub fn proportional_kib(pid: u32) -> Result<u64> {
    rollup_kib(pid, "Pss:")
}

/// Memory of a process that is no file's, KiB: with pages of a file that it has written to for itself, without those that it
/// only reads.
fn own_kib(pid: u32) -> Result<u64> {
    rollup_kib(pid, "Anonymous:")
}

/// What the passt of a VM takes, KiB: nothing where there is none, or it has just ended. It forbids others to look closely at its memory, and
/// then pages of files count whole.
pub fn of_network_kib(status: &Status) -> u64 {
    let resident = |pid| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        field(&text, "VmRSS:")
    };
    let of = |pid| proportional_kib(pid).ok().or_else(|| resident(pid));
    status.network_pid.and_then(of).unwrap_or(0)
}

fn rollup_kib(pid: u32, key: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
    field(&rollup, key).ok_or_else(|| Error::failure(format!("{path} has no {key:?}")))
}

/// Proportional set size of a whole VM, KiB: its supervisor and its monitor, with the guest's memory.
///
/// # Errors
/// As [`proportional_kib`].
pub fn of_vm_kib(status: &Status) -> Result<u64> {
    processes_of(status).map(proportional_kib).sum()
}

/// Own memory of a whole VM, KiB: what its supervisor, its monitor and its guest have that no file holds. Of a VM that goes on
/// from a snapshot, guest memory that it has not written to is the snapshot's.
///
/// # Errors
/// As [`proportional_kib`].
pub fn own_of_vm_kib(status: &Status) -> Result<u64> {
    processes_of(status).map(own_kib).sum()
}

fn processes_of(status: &Status) -> impl Iterator<Item = u32> {
    [Some(status.supervisor_pid), status.monitor_pid]
        .into_iter()
        .flatten()
}

/// The host's memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// All of it, KiB.
    pub total_kib: u64,
    /// What programs can have without swapping, KiB: the kernel's estimate.
    pub available_kib: u64,
    /// Pages that were swapped out since the host started.
    pub swapped_out_pages: u64,
}

impl Host {
    /// Now.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn now() -> Result<Self> {
        let read = |path: &str| std::fs::read_to_string(path).context(|| format!("cannot read {path}"));
        let (memory, events) = (read("/proc/meminfo")?, read("/proc/vmstat")?);
        let find = |text: &str, path: &str, key: &str| {
            field(text, key).ok_or_else(|| Error::failure(format!("{path} has no {key:?}")))
        };
        Ok(Self {
            total_kib: find(&memory, "/proc/meminfo", "MemTotal:")?,
            available_kib: find(&memory, "/proc/meminfo", "MemAvailable:")?,
            // A kernel without swap counts none.
            swapped_out_pages: field(&events, "pswpout").unwrap_or(0),
        })
    }
}

/// The number behind `key`.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok())?
    })
}

fn parse(smaps: &str) -> Memory {
    let mut memory = Memory::default();
    let (mut resident, mut private) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next() else { continue };
        let mut kib = || {
            words
                .next()
                .and_then(|value| value.parse::<u64>().ok())
                .unwrap_or(0)
        };
        match key {
            "Rss:" => resident += kib(),
            "Private_Clean:" | "Private_Dirty:" => private += kib(),
            // The last line of a mapping.
            "VmFlags:" => {
                if words.any(|flag| flag == GUEST_FLAG) {
                    memory.guest_rss_kib += resident;
                } else {
                    memory.monitor_rss_kib += resident;
                    memory.monitor_private_kib += private;
                }
                (resident, private) = (0, 0);
            }
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_counted_apart() {
        let smaps = "\
55d0-55d8 r-xp 00000000 08:01 42                         /usr/bin/lighter-vmm
Size:                 32 kB
Rss:                  24 kB
Private_Clean:         8 kB
Private_Dirty:         0 kB
VmFlags: rd ex mr
7f00-7f80 rw-p 00000000 00:00 0
Rss:              204800 kB
Private_Dirty:    204800 kB
VmFlags: rd wr mr mw me dd nr hg
7f80-7f90 rw-p 00000000 00:00 0
Rss:                 100 kB
Private_Dirty:       100 kB
VmFlags: rd wr mr mw me
";
        assert_eq!(
            parse(smaps),
            Memory {
                monitor_rss_kib: 124,
                monitor_private_kib: 108,
                guest_rss_kib: 204_800,
            }
        );
    }

    #[test]
    fn this_process_has_memory() {
        let memory = of(std::process::id()).unwrap();
        assert!(memory.monitor_private_kib > 0);
        let proportional = proportional_kib(std::process::id()).unwrap();
        assert!(0 < proportional && proportional < Host::now().unwrap().total_kib);
    }

    #[test]
    fn a_network_costs_what_its_passt_takes_and_nothing_without() {
        let (_, state) = crate::supervisor::state::testing::vm_and_state();
        let of = |pid| {
            state.network(pid);
            of_network_kib(&state.watch().borrow())
        };
        assert!(of(Some(std::process::id())) > 0);
        assert_eq!([of(None), of(Some(1 << 30))], [0, 0]);
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_that_names_it() {
        // Above every process id that Linux gives.
        let error = proportional_kib(1 << 30).unwrap_err();
        assert!(error.message.contains("/proc/1073741824/smaps_rollup"), "{error}");
    }

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "SwapCached: 1 kB\nSwap: x kB\nPss_Dirty: 2 kB\nPss: 37 kB\n";
        assert_eq!(field(text, "Pss:"), Some(37));
        assert_eq!(field(text, "Swap:"), None);
        assert_eq!(field(text, "Free:"), None);
    }
}
