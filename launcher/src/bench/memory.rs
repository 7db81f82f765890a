//! A monitor's memory beside its guest's, from `/proc/PID/smaps`.

use crate::error::{Context, Result};
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
        assert!(of(std::process::id()).unwrap().monitor_private_kib > 0);
    }
}
