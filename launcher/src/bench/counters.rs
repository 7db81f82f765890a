//! What a monitor and its guest did, counted: the same work gives the same numbers, however busy the host is.

use crate::error::{Context, Error, Result};
use crate::supervisor::monitor::request;
use lighter_protocol::monitor::{Request, Response, Statistics};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Numbers by name.
pub type Counters = BTreeMap<String, u64>;

/// Where KVM counts, when debugfs is mounted and may be read: a folder `PID-FD` for each VM.
const KVM: &str = "/sys/kernel/debug/kvm";

/// Counts what the monitor `pid` with the control socket `socket` did so far.
///
/// # Errors
/// When it is gone or does not answer.
pub fn of(pid: u32, socket: &Path) -> Result<Counters> {
    // First, as asking makes the monitor work.
    let stat = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&stat).context(|| format!("cannot read {stat}"))?;
    let mut counters =
        page_faults(&text).ok_or_else(|| Error::failure(format!("cannot make sense of {stat}: {text}")))?;
    counters.extend(kvm_exits(Path::new(KVM), pid));
    counters.extend(from_statistics(statistics(socket)?));
    Ok(counters)
}

fn statistics(socket: &Path) -> Result<Statistics> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context(|| "cannot ask the monitor for its counters".into())?;
    match runtime.block_on(request(socket, &Request::Statistics))? {
        Response::Statistics(statistics) => Ok(statistics),
        other => Err(Error::failure(format!(
            "the monitor answered the request for its counters with {other:?}"
        ))),
    }
}

fn from_statistics(statistics: Statistics) -> Counters {
    let exits = statistics.exits.into_iter();
    let mut counters: Counters = exits
        .map(|(kind, count)| (format!("exits to the monitor: {kind}"), count))
        .collect();
    for (device, queues) in statistics.devices {
        let mut add = |what: &str, count: u64| counters.insert(format!("{device}: {what}"), count);
        add("requests", queues.iter().map(|queue| queue.chains).sum());
        add(
            "bytes to the guest",
            queues.iter().map(|queue| queue.written_bytes).sum(),
        );
    }
    counters
}

/// From `/proc/PID/stat`, see proc_pid_stat(5).
fn page_faults(stat: &str) -> Option<Counters> {
    // The process's own name, in parentheses, may hold anything. After it comes field 3.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Counters::from([
        ("page faults: minor".into(), field(10)?),
        ("page faults: major".into(), field(12)?),
    ]))
}

/// KVM's own numbers of the VM of `pid`; none where they may not be read.
fn kvm_exits(folder: &Path, pid: u32) -> Counters {
    let prefix = format!("{pid}-");
    let Ok(vms) = fs::read_dir(folder) else {
        return Counters::new();
    };
    let mut counters = Counters::new();
    for vm in vms.flatten() {
        if !vm.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        for file in fs::read_dir(vm.path()).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if !name.ends_with("exits") {
                continue;
            }
            let count = fs::read_to_string(file.path())
                .ok()
                .and_then(|text| text.trim().parse().ok());
            counters.extend(count.map(|count| (format!("KVM: {name}"), count)));
        }
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_protocol::monitor::QueueStatistics;

    #[test]
    fn a_process_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) S 1 42 42 0 -1 4194304 1234 0 5 0 11 22 0 0 20 0 1 0 99";
        let expected = [
            ("page faults: major".into(), 5),
            ("page faults: minor".into(), 1234),
        ];
        assert_eq!(page_faults(stat), Some(Counters::from(expected)));
        assert_eq!(page_faults("42 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_page_faults() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert!(page_faults(&stat).unwrap()["page faults: minor"] > 0);
    }

    #[test]
    fn queues_of_a_device_are_added_up() {
        let queue = |chains, written_bytes| QueueStatistics {
            chains,
            written_bytes,
            ..QueueStatistics::default()
        };
        let statistics = Statistics {
            exits: [("io-out".into(), 3)].into(),
            devices: [("block root".into(), vec![queue(1, 10), queue(2, 20)])].into(),
            ..Statistics::default()
        };
        let expected = [
            ("block root: bytes to the guest".into(), 30),
            ("block root: requests".into(), 3),
            ("exits to the monitor: io-out".into(), 3),
        ];
        assert_eq!(from_statistics(statistics), Counters::from(expected));
    }

    #[test]
    fn kvm_counts_each_vm_in_a_folder_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        for (folder, exits) in [("42-11", "7\n"), ("421-11", "8\n")] {
            fs::create_dir(root.path().join(folder)).unwrap();
            fs::write(root.path().join(folder).join("halt_exits"), exits).unwrap();
            fs::write(root.path().join(folder).join("other"), exits).unwrap();
        }
        let expected = Counters::from([("KVM: halt_exits".into(), 7)]);
        assert_eq!(kvm_exits(root.path(), 42), expected);
        assert_eq!(kvm_exits(&root.path().join("none"), 42), Counters::new());
    }
}
