//! What an idle VM gives back to the host.

use super::Test;
use super::world::{Docker, Home, Running, shared, until, with_shared_home};
use std::time::Duration;

pub const TESTS: &[Test] = &[(
    "memory_and_disk_of_past_work_go_back_to_the_host",
    past_work_costs_nothing,
)];

/// So many looks at the same costs, one every [`PAUSE`], are rest: longer than the agent waits before it gives memory back.
const LOOKS: usize = 5;

const PAUSE: Duration = Duration::from_secs(12);

/// What the shared VM costs when it has come to rest: host memory and disk, KiB.
fn idle_cost(home: &Home) -> (u64, u64) {
    let mut seen: Vec<(u64, u64)> = vec![];
    until("rest", || {
        let rows = home.run(&["stats", "--json", "shared"]).ok();
        let rows: serde_json::Value = serde_json::from_str(&rows).expect("JSON");
        let number = |key: &str| {
            rows[0][key]
                .as_u64()
                .unwrap_or_else(|| panic!("no {key} in {rows}"))
        };
        let now = (number("host_memory_kib"), number("host_disk_bytes") / 1024);
        let same = |then: &(u64, u64)| then.0.abs_diff(now.0) < 4096 && then.1 == now.1;
        if !seen.iter().all(same) {
            seen.clear();
        }
        seen.push(now);
        if seen.len() < LOOKS {
            std::thread::sleep(PAUSE);
            return None;
        }
        eprintln!("at rest: {rows}");
        Some(now)
    })
}

fn past_work_costs_nothing() {
    const MIB: u64 = 240;
    const IMAGE_MIB: u64 = 80;
    let docker = shared();
    build(&docker, 1);
    forget(&docker);
    let before = with_shared_home(idle_cost);
    docker.ok(&["volume", "create", "filled"]);
    let fill =
        format!("dd if=/dev/urandom of=/data/file bs=1M count={MIB} && sync && cat /data/file > /dev/null");
    docker.ok(&["run", "--rm", "-v", "filled:/data", "busybox", "sh", "-c", &fill]);
    build(&docker, IMAGE_MIB);
    let full = with_shared_home(|home| home.run(&["stats", "--json", "shared"]).ok());
    let full: serde_json::Value = serde_json::from_str(&full).expect("JSON");
    let disk = full[0]["host_disk_bytes"].as_u64().expect("a size") / 1024;
    assert!(disk >= before.1 + ((MIB + IMAGE_MIB) << 10), "{before:?} {full}");
    docker.ok(&["volume", "rm", "filled"]);
    forget(&docker);
    let after = with_shared_home(idle_cost);
    let back = |before: u64, after: u64| after * 10 <= before * 11;
    assert!(
        back(before.0, after.0) && back(before.1, after.1),
        "{before:?} KiB before, {after:?} after, {full}"
    );
}

/// Builds the image `filled`, which has a layer of so many random bytes.
pub fn build(docker: &Docker, mib: u64) {
    let folder = tempfile::tempdir().expect("make a folder");
    let file = format!(
        "FROM busybox\nRUN dd if=/dev/urandom of=/file bs=1M count={mib} && sync && cat /file > /dev/null\n"
    );
    std::fs::write(folder.path().join("Dockerfile"), file).expect("write");
    let mut command = docker.command(&["build", "-t", "filled", "."]);
    command.current_dir(folder.path());
    Running::start(&mut command, b"").wait().ok();
}

/// Removes that image, and what its build has left.
pub fn forget_build(docker: &Docker) {
    docker.ok(&["image", "rm", "filled"]);
    docker.ok(&["builder", "prune", "--all", "--force"]);
}

fn forget(docker: &Docker) {
    forget_build(docker);
    docker.ok(&["system", "prune", "--force"]);
}
