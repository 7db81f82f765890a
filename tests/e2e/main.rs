//! End-to-end tests: the real `lighter`, the real docker CLI, real engines in real VMs.
//!
//! They need a KVM that runs Linux, so `scripts/test e2e [FILTER]` runs them in `scripts/with-kvm`. From the environment come
//! `LIGHTER_KERNEL` and `LIGHTER_IMAGE` (what to boot), `LIGHTER_TEST_CLIENTS` and `LIGHTER_TEST_APPS` (the folders of
//! `scripts/lib/test-clients` and `scripts/lib/test-apps`).
//!
//! Tests run one after another (`LIGHTER_TEST_HALF`, 1 or 2, chooses a half of them): most of them in one VM that the first one
//! starts, the others in VMs of their own, and all of them watched (`watch.rs`). A slow host makes them slow, and nothing else: they wait for events, with deadlines that
//! only a hang reaches. With `LIGHTER_TEST_LONG` set some take a long form, by themselves half an hour each in the emulated machine.

#![allow(clippy::print_stderr, reason = "a failed test shows logs")]

mod applications;
mod autostart;
mod bench;
mod broken_disk;
mod build;
mod containers;
mod cost;
mod descriptors;
mod durability;
mod events;
mod faults;
mod files;
mod folders;
mod forks;
mod host;
mod host_changes;
mod hostile;
mod identity;
mod idle;
mod kills;
mod ledger;
mod lifecycle;
mod names;
mod network;
mod platter;
mod ports;
mod posix;
mod recovery;
mod rules;
mod snapshots;
mod soak;
mod streams;
mod suspend;
mod tap;
mod templates;
mod terminal;
mod victims;
mod wake;
mod watch;
mod world;

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

type Test = (&'static str, fn());

/// Most of these use one VM.
const FIRST: &[(&str, &[Test])] = &[
    ("containers", containers::TESTS),
    ("streams", streams::TESTS),
    ("terminal", terminal::TESTS),
    ("files", files::TESTS),
    ("folders", folders::TESTS),
    ("events", events::TESTS),
    ("network", network::TESTS),
    ("names", names::TESTS),
    ("ports", ports::TESTS),
    ("build", build::TESTS),
    ("applications", applications::TESTS),
    ("idle", idle::TESTS),
    ("crowd", containers::CROWD),
    ("soak", soak::TESTS),
];

/// These have VMs of their own.
const SECOND: &[(&str, &[Test])] = &[
    ("watch", watch::TESTS),
    ("host", host::TESTS),
    ("lifecycle", lifecycle::TESTS),
    ("recovery", recovery::TESTS),
    ("identity", identity::TESTS),
    ("tap", tap::TESTS),
    ("durability", durability::TESTS),
    ("faults", faults::TESTS),
    ("broken_disk", broken_disk::TESTS),
    ("rules", rules::TESTS),
    ("victims", victims::TESTS),
    ("descriptors", descriptors::TESTS),
    ("host_changes", host_changes::TESTS),
    ("hostile", hostile::TESTS),
    ("snapshots", snapshots::TESTS),
    ("kills", kills::TESTS),
    ("suspend", suspend::TESTS),
    ("templates", templates::TESTS),
    ("wake", wake::TESTS),
    ("autostart", autostart::TESTS),
    ("bench", bench::TESTS),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The tests share a VM, and the emulated machine has one slow processor.
    arguments.test_threads = Some(1);
    let halves = match std::env::var("LIGHTER_TEST_HALF").as_deref() {
        Ok("1") => &[FIRST][..],
        Ok("2") => &[SECOND],
        Ok(other) => panic!("LIGHTER_TEST_HALF is {other:?}, and not 1 or 2"),
        Err(_) => &[FIRST, SECOND],
    };
    let mut trials: Vec<Trial> = vec![];
    for (group, tests) in halves.iter().copied().flatten() {
        for (name, test) in *tests {
            trials.push(watched(format!("{group}::{name}"), *test));
        }
    }
    trials.push(watched("nothing_is_left_behind".into(), || {
        world::shut_down_shared();
        world::assert_nothing_left();
    }));
    watch::begin();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Where a filter has left out the last one.
    world::shut_down_shared();
    let seen = watch::end_of_test();
    assert!(seen.is_empty(), "{seen:#?}");
    eprintln!("{}", watch::most());
    conclusion.exit_code()
}

/// A test that fails as well when something was seen meanwhile that is to be in none.
fn watched(name: String, test: fn()) -> Trial {
    Trial::test(name, move || {
        let ran = std::panic::catch_unwind(test);
        let seen = watch::end_of_test();
        if ran.is_err() || !seen.is_empty() {
            world::show_shared_logs();
        }
        let seen = seen.join("\n");
        match ran {
            Ok(()) if seen.is_empty() => Ok(()),
            Ok(()) => Err(seen.into()),
            Err(panic) => {
                eprintln!("{seen}");
                std::panic::resume_unwind(panic)
            }
        }
    })
}
