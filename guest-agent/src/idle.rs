//! What an idle guest gives back: the page cache that its last work left, and blocks of the data disk. Free pages go to the host by
//! themselves (free page reporting), as free blocks do (`discard`); pages of files are free only when somebody says so, and blocks
//! whose discard was missed when the file system is told to look.
//!
//! The guest counts as idle when its processors have had next to nothing to do for half a minute. A cache that has not grown
//! since the last time is left alone: what is in it is in use. So is a disk on which nothing was freed. A VM that goes on from a
//! snapshot begins with the cache that it finds: the host has those pages in the snapshot's file, for all VMs that go on from it,
//! and to drop them would write to others.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use lighter_protocol::agent::{AgentMessage, ContainersLoad, GuestMemory};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use crate::{cgroup, disk, log::Log, outbox::Outbox, system, timeline};

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(10);

/// So many quiet looks in a row are idleness.
const QUIET_LOOKS: u32 = 3;

/// A look is quiet when the processors were busy for less than this part of the time, thousandths.
const QUIET_PER_MILLE: u64 = 30;

/// Less than this is not worth a look at the disk afterwards, KiB.
const WORTH_KIB: u64 = 32 << 10;

/// Why nothing is given back.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}; what an idle guest does not need stays where it is")]
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
    /// The least that was free on the data disk since blocks were last given back, KiB; `None` before it is mounted.
    least_free_kib: Option<u64>,
}

impl Watch {
    /// Whether the guest is idle.
    fn look(&mut self, now: Ticks) -> bool {
        let busy = now.busy.saturating_sub(self.last.busy);
        let all = now.all.saturating_sub(self.last.all);
        self.last = now;
        if busy * 1000 > all * QUIET_PER_MILLE {
            self.quiet_looks = 0;
        } else {
            self.quiet_looks = self.quiet_looks.saturating_add(1);
        }
        self.quiet_looks >= QUIET_LOOKS
    }

    /// Whether a cache of `cache_kib` is worth dropping.
    fn has_cached(&mut self, cache_kib: u64) -> bool {
        self.rest_kib = self.rest_kib.min(cache_kib);
        cache_kib >= self.rest_kib + WORTH_KIB
    }

    /// Whether blocks were freed that are worth giving back, now that `free_kib` are free.
    fn has_freed(&mut self, free_kib: u64) -> bool {
        let least = self.least_free_kib.get_or_insert(free_kib);
        *least = free_kib.min(*least);
        free_kib >= *least + WORTH_KIB
    }

    /// Blocks were given back.
    fn trimmed(&mut self) {
        self.least_free_kib = None;
    }

    /// The VM goes on from a snapshot, with this cache.
    fn went_on(&mut self, cache_kib: u64) {
        self.quiet_looks = 0;
        self.rest_kib = cache_kib;
    }

    /// It was dropped, and this is what was left.
    fn dropped(&mut self, rest_kib: u64) {
        self.rest_kib = rest_kib;
    }
}

/// Tells the supervisor of the guest's memory and what containers do, and gives the cache of an idle guest back, for ever;
/// `went_on` tells that the VM goes on from a snapshot.
pub async fn watch(log: Log, outbox: Outbox, went_on: Arc<Notify>) {
    let mut watch = Watch::default();
    loop {
        // What the VM does first comes before a look at it.
        let has_gone_on = timeout(INTERVAL, went_on.notified()).await.is_ok();
        if has_gone_on {
            sleep(INTERVAL).await;
        }
        let Some((ticks, now)) = read("/proc/stat", ticks).zip(read("/proc/meminfo", memory)) else {
            return log.error("cannot read the guest's load and memory, which stay untold");
        };
        if has_gone_on {
            watch.went_on(now.cache_kib);
        }
        outbox.push(AgentMessage::Memory(now));
        outbox.push(AgentMessage::Containers(ContainersLoad {
            cpu_us: cgroup::containers_cpu_us(),
            clock_us: u64::try_from(timeline::now_ns()).unwrap_or(0) / 1000,
        }));
        let is_idle = watch.look(ticks);
        let has_cached = watch.has_cached(now.cache_kib);
        let has_freed = disk::free_kib().is_some_and(|free| watch.has_freed(free));
        if is_idle && has_freed {
            if !give_back(&log, trim).await {
                return;
            }
            watch.trimmed();
        }
        if is_idle && has_cached {
            if !give_back(&log, drop_cache).await {
                return;
            }
            let rest = read("/proc/meminfo", memory).unwrap_or(now);
            watch.dropped(rest.cache_kib);
            outbox.push(AgentMessage::Memory(rest));
        }
    }
}

/// Whether `give` has worked; why not, is told.
async fn give_back(log: &Log, give: fn() -> Result<(), Error>) -> bool {
    match spawn_blocking(give).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => log.error(lighter_protocol::causes::chain(&error)),
        Err(error) => log.error(format!("giving something back to the host failed: {error}")),
    }
    false
}

fn read<T>(path: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    parse(&fs::read_to_string(path).ok()?)
}

/// Writes what is to be written to the data disk.
fn write_data() -> Result<(), Error> {
    let failed = |what| move |source| Error { what, source };
    let data = fs::File::open(disk::MOUNT_POINT).map_err(failed("open the data disk"))?;
    let written = nix::unistd::syncfs(&data).map_err(io::Error::from);
    written.map_err(failed("write the data disk's cache"))
}

/// Has the blocks freed that were deleted, and gives the free ones back.
fn trim() -> Result<(), Error> {
    write_data()?;
    disk::trim().map_err(|source| Error {
        what: "discard the free blocks of the data disk",
        source,
    })
}

/// Writes what is to be written, since only clean pages can go, and drops the page cache.
fn drop_cache() -> Result<(), Error> {
    let failed = |what| move |source| Error { what, source };
    write_data()?;
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
    fn a_guest_is_idle_when_it_has_been_quiet_for_a_while() {
        let mut watch = Watch::default();
        let mut now = Ticks::default();
        let mut look = |busy| {
            now = Ticks {
                busy: now.busy + busy,
                all: now.all + 1000,
            };
            watch.look(now)
        };
        // Work in between begins the count anew.
        let looks = [500, 3, 3, 200, 3, 30, 3, 3].map(&mut look);
        assert_eq!(looks, [false, false, false, false, false, false, true, true]);
    }

    #[test]
    fn a_cache_is_worth_dropping_when_it_has_grown() {
        let mut watch = Watch::default();
        assert!(watch.has_cached(300 << 10));
        watch.dropped(40 << 10);
        assert!(!watch.has_cached(60 << 10));
        assert!(watch.has_cached(80 << 10));
        // What it was once is no measure when it has shrunk by itself.
        assert!(!watch.has_cached(20 << 10));
        assert!(watch.has_cached(60 << 10));
    }

    #[test]
    fn the_cache_of_a_snapshot_is_left_alone() {
        let mut watch = Watch::default();
        watch.went_on(300 << 10);
        assert!(!watch.has_cached(310 << 10));
        assert!(watch.has_cached(340 << 10));
    }

    #[test]
    fn blocks_are_given_back_when_some_were_freed() {
        let mut watch = Watch::default();
        let free = 900 << 10;
        assert!(!watch.has_freed(free));
        assert!(!watch.has_freed(free - (400 << 10)));
        assert!(!watch.has_freed(free - (390 << 10)));
        assert!(watch.has_freed(free));
        watch.trimmed();
        assert!(!watch.has_freed(free));
    }
}
