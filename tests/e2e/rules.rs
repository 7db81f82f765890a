//! Which rules of the monitor's filters are needed: those that a system call is seen to need while VMs do what VMs do.

use super::world::{Home, Ran, Running, app_file, programs, write_program};
use super::{Test, tap};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;

pub const TESTS: &[Test] = &[("every_rule_of_every_filter_is_needed", rules)];

const FILTERS: &str = include_str!("../../vmm/src/cage/filters.json");

/// A rule that is not needed here, by its list, call and comment, and where it is.
type Elsewhere = (&'static str, &'static str, &'static str, &'static str);

/// Guests of a few instructions, and hostile ones: `vmm/tests`, by `strace` on them.
const MONITOR_S_TESTS: &str = "the monitor's own tests";
const OTHER_HOSTS: &str = "other hosts";
/// By what the library for shared folders does when a guest asks for it, which Linux does not.
const OTHER_GUESTS: &str = "guests that are no Linux";
const BY_CHANCE: &str = "what seldom comes together";
/// To be removed one by one, each with all tests after it: without one that is needed, a VM dies.
const UNSEEN: &str = "nothing that was ever seen";

const ELSEWHERE: &[Elsewhere] = &[
    (
        "every",
        "fcntl",
        "a debug build looks whether what it closes is open: F_GETFD",
        MONITOR_S_TESTS,
    ),
    ("every", "mremap", "large buffers grow", MONITOR_S_TESTS),
    (
        "every",
        "poll",
        "a device that failed waits for its reset",
        MONITOR_S_TESTS,
    ),
    (
        "every",
        "restart_syscall",
        "a wait goes on after the process was stopped",
        MONITOR_S_TESTS,
    ),
    ("every", "tgkill", "abort: SIGABRT", MONITOR_S_TESTS),
    (
        "fs",
        "capget",
        "a file that is written to loses its set-user-ID bit",
        MONITOR_S_TESTS,
    ),
    (
        "fs",
        "capset",
        "a file that is written to loses its set-user-ID bit",
        MONITOR_S_TESTS,
    ),
    (
        "fs",
        "setresuid",
        "as whom a file is made: the library asks for who it is already",
        MONITOR_S_TESTS,
    ),
    (
        "fs",
        "prctl",
        "which capabilities there are: PR_CAPBSET_READ",
        MONITOR_S_TESTS,
    ),
    (
        "fs",
        "prctl",
        "which capabilities there are: PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET",
        MONITOR_S_TESTS,
    ),
    (
        "prefetch",
        "fadvise64",
        "a snapshot's pages are read ahead",
        MONITOR_S_TESTS,
    ),
    (
        "prefetch",
        "sched_getaffinity",
        "whether a processor is free for it",
        MONITOR_S_TESTS,
    ),
    (
        "vcpu",
        "ioctl",
        "KVM_GET_REGS, for the message of a crash",
        MONITOR_S_TESTS,
    ),
    (
        "vcpu",
        "lseek",
        "the console's log, when it is full",
        MONITOR_S_TESTS,
    ),
    (
        "vcpu",
        "ftruncate",
        "the console's log, when it is full",
        MONITOR_S_TESTS,
    ),
    (
        "every",
        "clock_gettime",
        "times, where the vDSO does not tell them",
        OTHER_HOSTS,
    ),
    (
        "fs",
        "prctl",
        "which capabilities there are: PR_GET_SECUREBITS",
        UNSEEN,
    ),
    (
        "fs",
        "prctl",
        "which capabilities there are: PR_GET_NO_NEW_PRIVS",
        UNSEEN,
    ),
    ("fs", "pread64", "reads", UNSEEN),
    ("fs", "pwrite64", "writes", UNSEEN),
    (
        "fs",
        "setresgid",
        "as whom a file is made: the library asks for who it is already",
        UNSEEN,
    ),
    ("fs", "fchmod", "a file's mode", OTHER_GUESTS),
    ("fs", "fcntl", "flags of what is open: F_GETFL", UNSEEN),
    ("fs", "getxattr", "an extended attribute", OTHER_GUESTS),
    ("fs", "setxattr", "an extended attribute", OTHER_GUESTS),
    ("fs", "removexattr", "an extended attribute", OTHER_GUESTS),
    (
        "vcpu",
        "pwrite64",
        "a disk's map, when its driver resets it",
        OTHER_GUESTS,
    ),
    (
        "vcpu",
        "fdatasync",
        "a disk's map, when its driver resets it",
        OTHER_GUESTS,
    ),
    ("main", "fcntl", "a tap does not block: F_SETFL", UNSEEN),
    ("main", "ioctl", "a tap is plugged in: TUNSETOFFLOAD", UNSEEN),
    (
        "main",
        "fcntl",
        "a descriptor for another thread: F_DUPFD_CLOEXEC",
        UNSEEN,
    ),
    (
        "every",
        "sched_yield",
        "a channel waits for the other side",
        BY_CHANCE,
    ),
    (
        "block",
        "clock_nanosleep",
        "waits for the kernel to have memory for a ring",
        BY_CHANCE,
    ),
];

/// Whose filter a thread has, by the beginning of its name.
const DUTIES: [(&str, &str); 9] = [
    ("vcpu", "vcpu"),
    ("block", "block"),
    ("net", "net"),
    ("vsock", "vsock"),
    ("fs", "fs"),
    ("rng", "memory"),
    ("balloon", "memory"),
    ("prefetch", "prefetch"),
    ("lighter-vmm", "main"),
];

/// A rule of a list, and whether a call was seen that it allows.
struct Rule {
    list: String,
    call: String,
    comment: String,
    arguments: Vec<Condition>,
    seen: bool,
}

/// What an argument has to be.
struct Condition {
    index: usize,
    mask: u64,
    value: u64,
}

impl Rule {
    fn new(list: &str, rule: &Value) -> Self {
        let text = |key: &str| rule[key].as_str().expect(key).to_owned();
        let condition = |of: &Value| {
            let width = match of["type"].as_str() {
                Some("dword") => u64::from(u32::MAX),
                Some("qword") => u64::MAX,
                other => panic!("an argument's type is {other:?}"),
            };
            Condition {
                index: of["index"].as_u64().expect("index") as usize,
                mask: of["op"]["masked_eq"].as_u64().unwrap_or(width),
                value: of["val"].as_u64().expect("val"),
            }
        };
        Self {
            list: list.into(),
            call: text("syscall"),
            comment: text("comment"),
            arguments: rule["args"]
                .as_array()
                .into_iter()
                .flatten()
                .map(condition)
                .collect(),
            seen: false,
        }
    }

    fn allows(&self, duty: &str, call: &str, arguments: &[u64]) -> bool {
        let is_met = |of: &Condition| {
            let argument = arguments.get(of.index);
            argument.is_some_and(|argument| argument & of.mask == of.value)
        };
        (self.list == "every" || self.list == duty) && self.call == call && self.arguments.iter().all(is_met)
    }
}

/// One line of `strace -f -Y -X raw -e raw=all`, if it is the beginning of a call: who makes it, by number and name, and which.
fn call(line: &str) -> Option<(u32, &str, &str, Vec<u64>)> {
    let (number, rest) = line.split_once('<')?;
    let (thread, rest) = rest.split_once('>')?;
    let (call, rest) = rest.trim_start().split_once('(')?;
    let arguments = rest.split(&[')', '<'][..]).next()?;
    let number_of = |text: &str| match text.trim().strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.trim().parse().ok(),
    };
    let arguments = arguments.split(',').filter_map(number_of).collect();
    Some((number.trim().parse().ok()?, thread, call, arguments))
}

/// Marks the rules that a monitor has needed, by what strace wrote of it.
fn mark(rules: &mut [Rule], trace: &Path) {
    // Threads with a filter of their own; the others have the main thread's, once that has one.
    let mut filtered = BTreeSet::new();
    let mut main_is = false;
    // As often as not the same.
    let mut known: BTreeMap<(String, String), BTreeSet<Vec<u64>>> = BTreeMap::new();
    for line in BufReader::new(File::open(trace).expect("open")).lines() {
        // Names of threads need not be text.
        let Ok(line) = line else { continue };
        let Some((number, thread, call, arguments)) = call(&line) else {
            continue;
        };
        let duty = DUTIES.iter().find(|(name, _)| thread.starts_with(name));
        let own = duty.map_or("main", |(_, duty)| *duty);
        if call == "seccomp" {
            filtered.insert(number);
            main_is |= own == "main";
        }
        let duty = match filtered.contains(&number) {
            true => own,
            false if main_is => "main",
            false => continue,
        };
        let key = (duty.to_owned(), call.to_owned());
        if !known.entry(key).or_default().insert(arguments.clone()) {
            continue;
        }
        for rule in rules
            .iter_mut()
            .filter(|rule| rule.allows(duty, call, &arguments))
        {
            rule.seen = true;
        }
    }
}

/// A file beside the traces: more options for strace.
const OPTIONS: &str = "options";

/// A monitor in whose place `strace` is started, which writes what it does to a file in `folder`.
fn traced(folder: &Path) {
    let script = format!(
        "#!/bin/sh\nexec strace -D -f -qq -Y -X raw -e raw=all $(cat {0}/{OPTIONS}) -o {0}/trace.$$ {1} \"$@\"\n",
        folder.display(),
        programs().join("lighter-vmm").display()
    );
    write_program(&folder.join("monitor"), script);
}

fn rules() {
    let home = Home::new();
    let folder = tempfile::tempdir().expect("a folder");
    traced(folder.path());
    let lighter = |arguments: &[&str]| -> Ran {
        let mut command = home.lighter(arguments);
        command.env("LIGHTER_VMM", folder.path().join("monitor"));
        Running::start(&mut command, b"").wait()
    };
    let write_options = |options: &str| fs::write(folder.path().join(OPTIONS), options).expect("write");
    write_options("");
    let shared = tempfile::tempdir().expect("a folder");
    let path = shared.path().to_str().expect("text");
    let size = ["-c", "2", "-m", "1g", "-d", "4g", "--no-template", "--no-context"];
    lighter(&[&["start", "vm", "--mount", path][..], &size].concat()).ok();
    let docker = home.docker("vm");
    let image = app_file("app.tar");
    docker.ok(&["import", image.to_str().expect("text"), "app"]);
    let volume = format!("{path}:/shared");
    let script = include_str!("apps/calls.py");
    let run = [
        "run", "--rm", "-v", &volume, "app", "python3", "-c", script, "/shared",
    ];
    assert_eq!(docker.ok(&run), "all of them");
    // A file that is open when the VM is saved.
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "open",
        "-v",
        &volume,
        "app",
        "sh",
        "-c",
        "exec >> /shared/lines; while :; do echo line; sleep 1; done",
    ]);
    lighter(&["snapshot", "create", "vm", "one"]).ok();
    // Clusters of the layer below are read, copied and discarded.
    let inside = |script: &str| home.run(&["exec", "vm", "--", "sh", "-ec", script]).ok();
    inside("dd if=/dev/urandom of=/var/lib/x bs=1M count=20 conv=fsync; rm /var/lib/x; sync");
    lighter(&["snapshot", "create", "vm", "two"]).ok();
    lighter(&["suspend", "vm"]).ok();
    lighter(&["resume", "--no-context", "vm"]).ok();
    // A wait that is interrupted goes on.
    let monitor = home.pid("vm", "monitor_pid");
    for signal in [Signal::STOP, Signal::CONT] {
        kill_process(monitor, signal).expect("stop and go on");
    }
    assert!(docker.ok(&["ps", "-q"]).lines().count() == 1);
    home.run(&["rm", "--force", "vm"]).ok();

    // A VM on a tap, and without an io_uring, as where the host forbids them.
    let _tap = tap::new_tap("lt-rules", 0);
    write_options("-e inject=io_uring_setup:error=ENOSYS");
    let network = ["--network", "tap:lt-rules,address=198.18.51.2/24"];
    lighter(&[&["start", "vm", "--no-mounts"][..], &network, &size].concat()).ok();
    inside("dd if=/dev/urandom of=/var/lib/x bs=1M count=20 conv=fsync; rm /var/lib/x; sync");
    lighter(&["suspend", "vm"]).ok();
    lighter(&["resume", "--no-context", "vm"]).ok();
    home.run(&["rm", "--force", "vm"]).ok();

    let filters: Value = serde_json::from_str(FILTERS).expect("JSON");
    let lists = filters.as_object().expect("lists").iter();
    let mut rules: Vec<Rule> = lists
        .flat_map(|(list, rules)| {
            let rules = rules.as_array().expect("rules");
            rules.iter().map(move |rule| Rule::new(list, rule))
        })
        .filter(|rule| rule.list != "not_there")
        .collect();
    let traces = fs::read_dir(folder.path()).expect("traces").flatten();
    let traces: Vec<_> = traces
        .filter(|file| file.file_name().as_encoded_bytes().starts_with(b"trace"))
        .collect();
    assert_eq!(traces.len(), 4, "two VMs were booted, and went on");
    for trace in &traces {
        mark(&mut rules, &trace.path());
    }
    let is = |rule: &Rule, of: &Elsewhere| {
        (rule.list.as_str(), rule.call.as_str(), rule.comment.as_str()) == (of.0, of.1, of.2)
    };
    let unneeded: Vec<String> = rules
        .iter()
        .filter(|rule| !rule.seen && !ELSEWHERE.iter().any(|of| is(rule, of)))
        .map(|rule| format!("{}: {} ({})", rule.list, rule.call, rule.comment))
        .collect();
    assert!(unneeded.is_empty(), "nothing needs {unneeded:#?}");
    let gone = ELSEWHERE.iter().find(|of| !rules.iter().any(|rule| is(rule, of)));
    assert_eq!(gone, None, "there is no such rule");
    for (list, call, comment, place) in ELSEWHERE {
        eprintln!("{list}: {call} ({comment}) is for {place}");
    }
}
