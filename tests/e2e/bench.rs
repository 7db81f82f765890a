//! Benchmarks other than of the boot: that they measure, and leave nothing.

use super::Test;
use super::world::{Home, SMALL, processes_of, until};
use rustix::process::Signal;
use serde_json::Value;
use std::path::PathBuf;

pub const TESTS: &[Test] = &[
    ("the_api_benchmark_measures_both_ends", api),
    ("the_fs_and_net_benchmarks_measure_every_way", fs_and_net),
    ("the_density_benchmark_measures_each_engine", density),
    ("the_density_benchmark_keeps_its_reserve", reserve),
    ("an_interrupted_density_benchmark_leaves_nothing", interrupted),
    ("the_fork_benchmark_measures_each_number_of_forks", forks),
    ("an_interrupted_fork_benchmark_leaves_nothing", interrupted_forks),
    ("the_run_benchmark_leaves_a_template_and_starts_from_it", runs),
];

#[track_caller]
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn api() {
    let home = Home::new();
    let report = home
        .run(&[
            "bench",
            "api",
            "-n",
            "20",
            "--clients",
            "2",
            "--image-mib",
            "2",
            "--json",
            "-c",
            "1",
            "-m",
            "1g",
        ])
        .ok();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    // Two rounds.
    assert_eq!(report["requests"], 40, "{report}");
    for end in ["host", "guest"] {
        let figures = &report[end];
        for latency in ["kept_alive_us", "new_connection_us"] {
            let sorted = ["min", "p50", "p99"].map(|part| number(&figures[latency][part]));
            assert!(0.0 < sorted[0] && sorted.is_sorted(), "{report}");
        }
        let rates = ["requests_per_s", "load_mib_per_s", "save_mib_per_s"].map(|rate| number(&figures[rate]));
        assert!(rates.iter().all(|&rate| rate > 0.0), "{report}");
    }
    // The way of the bytes is the longer one, whatever the machine is busy with.
    assert!(number(&report["cost"]["new_connection"]["min"]) > 1.0, "{report}");
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}

/// Checks that each of `rows` figures of a table was measured on the host and in Lighter's guest, round by round.
fn check_table(table: &Value, rows: usize) {
    let found = table["rows"].as_array().expect("rows");
    assert_eq!(found.len(), rows, "{table}");
    for row in found {
        let others = row["others"].as_array().expect("others");
        let [host] = &others[..] else {
            panic!("{table}");
        };
        assert_eq!(host["way"], "host", "{table}");
        for spread in [&row["lighter"], &host["spread"]] {
            let sorted = ["min", "median", "max"].map(|part| number(&spread[part]));
            assert!(0.0 < sorted[0] && sorted.is_sorted(), "{table}");
        }
        assert!(number(&host["lighter_faster"]["median"]) > 0.0, "{table}");
    }
}

fn fs_and_net() {
    let home = Home::new();
    let measure = |arguments: &[&str]| {
        let small = ["-n", "1", "--json", "-c", "1", "-m", "1g", "-d", "2g"];
        let report = home.run(&[&["bench"], arguments, &small[..]].concat()).ok();
        serde_json::from_str::<Value>(&report).expect("JSON")
    };
    let report = measure(&["fs", "--files", "20", "--large-mib", "1", "--reads", "10"]);
    check_table(&report["tables"][0], 9);
    let report = measure(&[
        "net",
        "--requests",
        "5",
        "--clients",
        "2",
        "--mib",
        "1",
        "--no-mounts",
    ]);
    for table in [0, 1] {
        check_table(&report["tables"][table], 7);
    }
    assert_eq!(report["rounds"], 1, "{report}");
    // The shared folder went with the VM.
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
    let vms = std::fs::read_dir(home.path().join("vms")).expect("the folder of VMs");
    let left: Vec<PathBuf> = vms
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(left, Vec::<PathBuf>::new());
    // What is missing or makes no sense is told before anything boots.
    for (arguments, code, told) in [
        (
            &["bench", "fs", "--peer", "qemu", "--virtiofsd", "/nonexistent"][..],
            1,
            "/nonexistent",
        ),
        (&["bench", "fs", "--no-mounts"], 2, "shares a folder of its own"),
        (&["bench", "net", "--peer", "firecracker"], 2, "compare with QEMU"),
        (
            &["bench", "net", "--network", "none"],
            2,
            "cannot reach a server on the host",
        ),
    ] {
        let said = home.run(arguments).fails_with(code);
        assert!(said.contains(told), "{said}");
    }
}

fn density() {
    let home = Home::new();
    let report = home
        .run(&[
            "bench", "density", "--max", "2", "--memory", "512m", "--cpus", "1", "--json",
        ])
        .ok();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["limit"]["kind"], "max", "{report}");
    let engines = report["engines"].as_array().expect("engines");
    assert_eq!(engines.len(), 2, "{report}");
    for engine in engines {
        let [boot_ms, pss, supervisor, monitor, guest] = [
            "boot_ms",
            "pss_kib",
            "supervisor_pss_kib",
            "monitor_rss_kib",
            "guest_rss_kib",
        ]
        .map(|name| number(&engine[name]));
        assert!(boot_ms > 0.0 && supervisor > 0.0 && monitor > 0.0, "{report}");
        // No engine runs in less, and none has more than its guest and a little beside it.
        let mib = 1024.0;
        assert!((30.0 * mib..=512.0 * mib).contains(&guest), "{report}");
        assert!(guest <= pss && pss < guest + 40.0 * mib, "{report}");
    }
    let together = &report["together"];
    assert!(number(&together["answer_ms"]["min"]) > 0.0, "{report}");
    assert!(
        number(&together["pss_kib"]) > number(&engines[0]["pss_kib"]),
        "{report}"
    );
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}

fn reserve() {
    let home = Home::new();
    // A reserve that no host can keep: the first engine is not started, and that is no failure.
    let report = home
        .run(&["bench", "density", "--reserve", "1000t", "--json"])
        .ok();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["limit"]["kind"], "memory", "{report}");
    assert_eq!(report["engines"], Value::Array(vec![]), "{report}");
}

fn interrupted() {
    let home = Home::new();
    let bench = home.start(&["bench", "density", "--memory", "512m", "--cpus", "1"], b"");
    until("second engine", || {
        let names = home.run(&["ls", "-q"]).ok();
        (names.lines().count() == 2).then_some(())
    });
    bench.signal(Signal::INT);
    assert!(!bench.wait().status.success());
    // Each is ended by its own supervisor.
    let left = || processes_of(&home.path().to_string_lossy());
    until("end of all engines", || left().is_empty().then_some(()));
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
}

fn forks() {
    let home = Home::new();
    let report = home
        .run(
            &[
                &["bench", "fork", "-n", "1,2", "--runs", "1", "--json"],
                &SMALL[..],
            ]
            .concat(),
        )
        .ok();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["cold"]["vms"], 1, "{report}");
    let forks = report["warm"].as_array().expect("forks");
    let vms: Vec<&Value> = forks.iter().map(|forks| &forks["vms"]).collect();
    assert_eq!(vms, [1, 2], "{report}");
    for forks in forks {
        let answer = ["min", "p50", "p99"].map(|part| number(&forks["answer_ms"][part]));
        assert!(0.0 < answer[0] && answer.is_sorted(), "{report}");
        assert!(number(&forks["container_ms"]["min"]) > answer[0], "{report}");
        // It goes on from memory that it need not have of its own, and does not boot.
        assert!(
            number(&forks["own_kib"]["max"]) < number(&report["cold"]["own_kib"]["min"]),
            "{report}"
        );
        assert!(number(&forks["answer_faster"]["median"]) > 1.0, "{report}");
        let parts = ["own_kib", "disk_kib", "paused_ms", "saved_kib"];
        assert!(
            parts.iter().all(|&part| number(&forks[part]["min"]) > 0.0),
            "{report}"
        );
    }
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
    assert_eq!(saved(&home), Vec::<PathBuf>::new());
}

fn runs() {
    // By itself it measures with templates, whatever the configuration says.
    let home = Home::new();
    let report = home.run(&[&["bench", "run", "--runs", "1", "--json"], &SMALL[..]].concat());
    let report: Value = serde_json::from_str(&report.ok()).expect("JSON");
    let ways = report["warm"].as_array().expect("two ways");
    let [first, later] = &ways[..] else {
        panic!("{report}");
    };
    assert!(number(&first["saved_kib"]["min"]) > 0.0, "{report}");
    assert!(number(&later["answer_faster"]["median"]) > 1.0, "{report}");
    // As a fork, it has little of its own.
    assert!(
        number(&later["own_kib"]["max"]) < number(&first["own_kib"]["min"]),
        "{report}"
    );
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
    assert_eq!(home.run(&["template", "ls", "-q"]).ok().lines().count(), 1);
}

/// What there is in the folder of snapshots.
fn saved(home: &Home) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(home.path().join("snapshots"))
        .into_iter()
        .flatten();
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

fn interrupted_forks() {
    let home = Home::new();
    let bench = home.start(&[&["bench", "fork", "-n", "2"], &SMALL[..]].concat(), b"");
    until("fork", || {
        let saving = saved(&home)
            .into_iter()
            .map(|source| source.join(".fork.partial"));
        saving.into_iter().find(|folder| folder.exists())
    });
    bench.signal(Signal::INT);
    assert!(!bench.wait().status.success());
    let left = || processes_of(&home.path().to_string_lossy());
    until("end of all VMs", || left().is_empty().then_some(()));
    assert_eq!(home.run(&["ls", "-q"]).ok(), "");
    assert_eq!(saved(&home), Vec::<PathBuf>::new());
}
