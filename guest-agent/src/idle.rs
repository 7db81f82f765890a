//! What an idle guest gives back: the page cache that its last work left. Free pages go to the host by themselves (free page
//! reporting); pages of files are free only when somebody says so.
//!
//! The guest counts as idle when its processors have had next to nothing to do for half a minute. A cache that has not grown
//! since the last time is left alone: what is in it is in use.

use std::{fs, io, path::Path, time::Duration};

use lighter_protocol::agent::{AgentMessage, ContainersLoad, GuestMemory};
use tokio::{task::spawn_blocking, time::sleep};

use crate::{cgroup, log::Log, outbox::Outbox, system, timeline};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(10);

/// So many quiet looks in a row are idleness.
const QUIET_LOOKS: u32 = 3;

/// A look is quiet when the processors were busy for less than this part of the time, thousandths.
const QUIET_PER_MILLE: u64 = 30;

/// Less than this is not worth a look at the disk afterwards, KiB.
const WORTH_KIB: u64 = 32 << 10;

/// Where the data is.
const DATA: &str = "/var/lib";

/// Why nothing is given back.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}; memory of an idle guest stays where it is")]
struct Error {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// Time that processors spent since the start, in the kernel's ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    all: u64,
}

/// Reads the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq; what the host took follows, and does
/// not count.
fn ticks(stat: &str) -> Option<Ticks> {
    let fields = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = fields
        .split_ascii_whitespace()
        .take(7)
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, idle, iowait, irq, softirq] = fields.try_into().ok()?;
    let busy = user + nice + system + irq + softirq;
    Some(Ticks {
        busy,
        all: busy + idle + iowait,
    })
}

/// Reads /proc/meminfo.
fn memory(meminfo: &str) -> Option<GuestMemory> {
    let field = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    };
    Some(GuestMemory {
        total_kib: field("MemTotal:")?,
        available_kib: field("MemAvailable:")?,
        // Pages of memory file systems are counted as cache, and cannot be dropped.
        cache_kib: (field("Cached:")? + field("Buffers:")?).saturating_sub(field("Shmem:")?),
    })
}

/// Decides when the cache is dropped.
#[derive(Debug, Default)]
struct Watch {
    last: Ticks,
    quiet_looks: u32,
    /// The cache after it was last dropped, KiB.
    rest_kib: u64,
}

impl Watch {
    /// Whether the cache is to be dropped now.
    fn look(&mut self, now: Ticks, cache_kib: u64) -> bool {
        let busy = now.busy.saturating_sub(self.last.busy);
        let all = now.all.saturating_sub(self.last.all);
        self.last = now;
        self.rest_kib = self.rest_kib.min(cache_kib);
        if busy * 1000 > all * QUIET_PER_MILLE {
            self.quiet_looks = 0;
        } else {
            self.quiet_looks = self.quiet_looks.saturating_add(1);
        }
        self.quiet_looks >= QUIET_LOOKS && cache_kib >= self.rest_kib + WORTH_KIB
    }

    /// It was dropped, and this is what was left.
    fn dropped(&mut self, rest_kib: u64) {
        self.rest_kib = rest_kib;
    }
}

/// Tells the supervisor of the guest's memory and what containers do, and gives the cache of an idle guest back, for ever.
pub async fn watch(log: Log, outbox: Outbox) {
    let mut watch = Watch::default();
    loop {
        sleep(INTERVAL).await;
        let Some((ticks, now)) = read("/proc/stat", ticks).zip(read("/proc/meminfo", memory)) else {
            return log.error("cannot read the guest's load and memory, which stay untold");
        };
        outbox.push(AgentMessage::Memory(now));
        outbox.push(AgentMessage::Containers(ContainersLoad {
            cpu_us: cgroup::containers_cpu_us(),
            clock_us: u64::try_from(timeline::now_ns()).unwrap_or(0) / 1000,
        }));
        if !watch.look(ticks, now.cache_kib) {
            continue;
        }
        match spawn_blocking(drop_cache).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return log.error(lighter_protocol::causes::chain(&error)),
            Err(error) => return log.error(format!("giving memory back failed: {error}")),
        }
        let rest = read("/proc/meminfo", memory).unwrap_or(now);
        watch.dropped(rest.cache_kib);
        outbox.push(AgentMessage::Memory(rest));
    }
}

fn read<T>(path: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    parse(&fs::read_to_string(path).ok()?)
}

/// Writes what is to be written, since only clean pages can go, and drops the page cache.
fn drop_cache() -> Result<(), Error> {
    let failed = |what| move |source| Error { what, source };
    let data = fs::File::open(DATA).map_err(failed("open the data disk"))?;
    nix::unistd::syncfs(&data).map_err(|errno| Error {
        what: "write the data disk's cache",
        source: errno.into(),
    })?;
    // Pages alone: what is known of files' names is small, and is needed by the next command.
    system::drop_caches("1").map_err(failed("drop the page cache"))?;
    // The host takes whole blocks of pages; a kernel without compaction has what it has.
    let compact = Path::new("/proc/sys/vm/compact_memory");
    if compact.exists() {
        fs::write(compact, "1").map_err(failed("compact memory"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "cpu  10 1 5 1000 20 2 3 50 0 0\ncpu0 10 1 5 1000 20 2 3 50 0 0\n";
        assert_eq!(ticks(stat), Some(Ticks { busy: 21, all: 1041 }));
        assert_eq!(ticks("cpu  1 2"), None);
        let meminfo = "MemTotal:        2000 kB\nMemFree: 10 kB\nMemAvailable:    1500 kB\nBuffers:  7 kB\nCached:   500 \
                       kB\nShmem: 100 kB\n";
        assert_eq!(
            memory(meminfo),
            Some(GuestMemory {
                total_kib: 2000,
                available_kib: 1500,
                cache_kib: 407
            })
        );
        assert_eq!(memory("MemTotal: 1 kB\n"), None);
        // Those of a real kernel.
        assert!(read("/proc/stat", ticks).is_some());
        assert!(read("/proc/meminfo", memory).is_some());
    }

    #[test]
    fn the_cache_goes_when_the_guest_has_been_quiet_and_only_once() {
        let mut watch = Watch::default();
        let mut now = Ticks::default();
        let mut look = |watch: &mut Watch, busy, cache_kib| {
            now = Ticks {
                busy: now.busy + busy,
                all: now.all + 1000,
            };
            watch.look(now, cache_kib)
        };
        let cache = 300 << 10;
        assert!(!look(&mut watch, 500, cache));
        assert!(!look(&mut watch, 3, cache));
        assert!(!look(&mut watch, 3, cache));
        // Work in between begins the count anew.
        assert!(!look(&mut watch, 200, cache));
        assert!(!look(&mut watch, 3, cache));
        assert!(!look(&mut watch, 30, cache));
        assert!(look(&mut watch, 3, cache));
        watch.dropped(40 << 10);
        assert!(!look(&mut watch, 3, 60 << 10));
        assert!(look(&mut watch, 3, 80 << 10));
    }
}
