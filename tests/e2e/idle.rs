//! What an idle VM gives back to the host.

use super::Test;
use super::world::{Home, shared, until, with_shared_home};

pub const TESTS: &[Test] = &[(
    "memory_and_disk_of_past_work_go_back_to_the_host",
    past_work_costs_nothing,
)];

/// What the shared VM costs: host memory and disk, KiB; once it is idle and has given back what it had.
fn idle_cost(home: &Home) -> (u64, u64) {
    let mut last = None;
    until("rest", || {
        let rows: serde_json::Value =
            serde_json::from_str(&home.run(&["stats", "--json", "shared"]).ok()).expect("JSON");
        let number = |pointer: &str| {
            rows.pointer(pointer)
                .and_then(serde_json::Value::as_u64)
                .unwrap_or_else(|| panic!("no {pointer} in {rows}"))
        };
        let now = (number("/0/host_memory_kib"), number("/0/host_disk_bytes") / 1024);
        let cache = rows
            .pointer("/0/guest/cache_kib")
            .and_then(serde_json::Value::as_u64);
        // The agent has dropped what was in the cache, and nothing changes any more.
        let rests = cache.is_some_and(|kib| kib < 64 << 10)
            && last.is_some_and(|last: (u64, u64)| last.0.abs_diff(now.0) < 2048 && last.1 == now.1);
        last = Some(now);
        if !rests {
            std::thread::sleep(std::time::Duration::from_secs(12));
        }
        rests.then_some(now)
    })
}

fn past_work_costs_nothing() {
    const MIB: u64 = 400;
    let docker = shared();
    let before = with_shared_home(idle_cost);
    docker.ok(&["volume", "create", "filled"]);
    let fill =
        format!("dd if=/dev/urandom of=/data/file bs=1M count={MIB} && sync && cat /data/file > /dev/null");
    docker.ok(&["run", "--rm", "-v", "filled:/data", "busybox", "sh", "-c", &fill]);
    let full = with_shared_home(|home| home.run(&["stats", "--json", "shared"]).ok());
    let full: serde_json::Value = serde_json::from_str(&full).expect("JSON");
    let disk = full[0]["host_disk_bytes"].as_u64().expect("a size") / 1024;
    assert!(disk >= before.1 + (MIB << 10), "{before:?} {full}");
    docker.ok(&["volume", "rm", "filled"]);
    let after = with_shared_home(idle_cost);
    let back = |before: u64, after: u64| after * 10 <= before * 11;
    assert!(
        back(before.0, after.0) && back(before.1, after.1),
        "{before:?} KiB before, {after:?} after, {full}"
    );
}
