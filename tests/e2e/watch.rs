//! Watches the VMs of every test, and fails one that leaves something behind, whose processes take more memory of their own than
//! they may, or in one of whose logs something has panicked.
//!
//! A thread looks at the homes of VMs every now and then, for what comes and goes in the middle of a test: it keeps each log open,
//! so that it can be read when its VM is gone, and measures each process. A home is looked through once more when it ends, and
//! all of them after each test.

use super::Test;
use super::cost::Cost;
use super::world::{Home, Process, processes_of, until};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[("whatever_is_left_or_grows_or_panics_is_seen", provoke)];

/// What a process of Lighter's has at most of its own, KiB, whatever its guest does.
const MOST_OWN_KIB: u64 = 32 << 10;

/// What tells of a panic: of Rust, of Go, of the guest's kernel, and of what that prints before and after.
const PANICS: [&str; 8] = [
    "panicked at",
    "panic: ",
    "fatal error: ",
    "Kernel panic",
    "BUG: ",
    "Oops: ",
    "WARNING: CPU",
    "Call Trace",
];

/// Files in the folder of VMs that are there without a VM: they are held, and not removed.
const LOCKS: [&str; 2] = [".config.lock", ".docker-contexts.lock"];

/// A VM that was removed has no process any more when it has none after this.
const GRACE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Watch {
    homes: Vec<PathBuf>,
    /// By file system and number.
    logs: BTreeMap<(u64, u64), Log>,
    complaints: Vec<String>,
    /// Which lines are no complaint in this test.
    expected: Vec<&'static str>,
    /// What is too large, by process.
    large: BTreeMap<u32, String>,
    /// The most that each kind of process had of its own, KiB.
    most: BTreeMap<String, u64>,
}

static WATCH: LazyLock<Mutex<Watch>> = LazyLock::new(Mutex::default);

fn watch() -> MutexGuard<'static, Watch> {
    WATCH.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the thread that looks. It takes a twentieth of a processor's time at most.
pub fn begin() {
    std::thread::spawn(|| {
        loop {
            let begun = Instant::now();
            watch().look(Looks::Beside);
            std::thread::sleep((begun.elapsed() * 20).max(Duration::from_millis(100)));
        }
    });
}

/// There is a new home.
pub fn home_begins(home: &Path) {
    watch().homes.push(home.to_owned());
}

/// The VMs of a home have been removed, and it is about to be.
pub fn home_ends(home: &Path) {
    let mut left = left_in(home);
    let deadline = Instant::now() + GRACE;
    // The lock is free a moment before its process is gone.
    while !left.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
        left = left_in(home);
    }
    let mut watch = watch();
    watch.complaints.append(&mut left);
    watch.homes.retain(|watched| watched != home);
}

/// What cannot be done at the end of a home, where nobody may panic.
pub fn complain(what: String) {
    watch().complaints.push(what);
}

/// The test has something panic on purpose: lines with `text` are right in it.
pub fn expect(text: &'static str) {
    watch().expected.push(text);
}

/// Looks now, at what is about to be gone.
pub fn look() {
    watch().look(Looks::Between);
}

/// Reads what the kernel of a running VM has said: of its warnings nothing is in the console's log.
pub fn read_kernel(home: &Home, vm: &str) {
    let said = home.run(&["exec", vm, "--", "dmesg"]);
    let mut watch = watch();
    if !said.status.success() {
        watch.complaints.push(format!(
            "cannot read what the kernel of VM {vm} has said: {said:?}"
        ));
    }
    let bad = said.stdout.lines().filter(|line| is_panic(line));
    watch
        .complaints
        .extend(bad.map(|line| format!("kernel of VM {vm}: {line}")));
}

/// What was seen since the test began.
pub fn end_of_test() -> Vec<String> {
    let mut watch = watch();
    watch.look(Looks::Between);
    watch.read_logs();
    watch.expected.clear();
    watch.complaints()
}

/// The most that each kind of process had of its own, for whoever reads the results.
pub fn most() -> String {
    let most: Vec<_> = watch()
        .most
        .iter()
        .map(|(name, kib)| format!("a process {name} had {kib} KiB of its own at most"))
        .collect();
    most.join("\n")
}

/// When somebody looks.
#[derive(Clone, Copy, PartialEq)]
enum Looks {
    /// Between two steps of the test.
    Between,
    /// While the test does something.
    Beside,
}

impl Watch {
    fn look(&mut self, when: Looks) {
        for home in self.homes.clone() {
            match is_mounted(&home.join("vms"), &home) {
                false => self.open_logs(&home),
                // The test is to unmount it, with nothing open there, also while it is looked at.
                true if when == Looks::Between => {
                    self.open_logs(&home);
                    self.read_logs();
                    self.logs.retain(|_, log| !log.path.starts_with(&home));
                }
                true => {}
            }
            for process in processes_of(&home.to_string_lossy()) {
                self.measure(&home, &process);
            }
        }
    }

    /// All complaints since the last time.
    fn complaints(&mut self) -> Vec<String> {
        let mut complaints = std::mem::take(&mut self.complaints);
        complaints.extend(std::mem::take(&mut self.large).into_values());
        complaints
    }

    fn measure(&mut self, home: &Path, process: &Process) {
        let name = process.name.trim();
        // The programs of tests are no concern of ours, nor is passt.
        if !name.starts_with("lighter") {
            return;
        }
        let cost = match Cost::try_of(process.pid) {
            Ok(cost) => cost,
            // It has ended.
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::SRCH)) => return,
            Err(error) => {
                let what = format!("cannot look at {process:?} of {}: {error}", home.display());
                return self.complaints.push(what);
            }
        };
        let most = self.most.entry(name.to_owned()).or_default();
        *most = cost.own_kib.max(*most);
        if cost.own_kib > MOST_OWN_KIB {
            let of = home.display();
            let what = format!("{process:?} of {of} has more than {MOST_OWN_KIB} KiB of its own: {cost:?}");
            let pid = process.pid.as_raw_nonzero().get().unsigned_abs();
            self.large.insert(pid, what);
        }
    }

    fn open_logs(&mut self, home: &Path) {
        for path in logs_in(home) {
            // One that is gone again was renamed, and is had by its other name, or was of a VM that is removed.
            let Ok(metadata) = path.metadata() else { continue };
            let key = (metadata.dev(), metadata.ino());
            if !self.logs.contains_key(&key)
                && let Ok(file) = File::open(&path)
                && let Ok(metadata) = file.metadata()
            {
                let log = Log { path, file, read: 0 };
                // While it is open, no other file has its number.
                self.logs.insert((metadata.dev(), metadata.ino()), log);
            }
        }
    }

    /// Reads what is new in each log, and forgets those that were removed.
    fn read_logs(&mut self) {
        let (expected, complaints) = (&self.expected, &mut self.complaints);
        self.logs.retain(|_, log| {
            let text = log.rest();
            let bad = text.lines().filter(|line| {
                let is_expected = expected.iter().any(|text| line.contains(text));
                is_panic(line) && !is_expected
            });
            complaints.extend(bad.map(|line| format!("{}: {line}", log.path.display())));
            log.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
        });
    }
}

/// Whether a line tells of a panic.
fn is_panic(line: &str) -> bool {
    PANICS.iter().any(|text| line.contains(text))
}

/// A log of a VM, open for as long as the VM is there.
struct Log {
    path: PathBuf,
    file: File,
    read: u64,
}

impl Log {
    /// All whole lines from where it was read to.
    fn rest(&mut self) -> String {
        let mut bytes = vec![];
        let mut buffer = vec![0; 1 << 16];
        loop {
            match self.file.read_at(&mut buffer, self.read + bytes.len() as u64) {
                Ok(0) => break,
                Ok(length) => bytes.extend_from_slice(&buffer[..length]),
                Err(error) => panic!("{}: {error}", self.path.display()),
            }
        }
        let whole = bytes
            .iter()
            .rposition(|&byte| byte == b'\n')
            .map_or(0, |end| end + 1);
        bytes.truncate(whole);
        self.read += whole as u64;
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Whether `folder` is in another file system than its `home`.
fn is_mounted(folder: &Path, home: &Path) -> bool {
    let [folder, home] = [folder, home].map(|path| path.metadata().map(|metadata| metadata.dev()));
    matches!((folder, home), (Ok(folder), Ok(home)) if folder != home)
}

/// The entries of a folder, if it is there.
fn entries(folder: PathBuf) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

fn logs_in(home: &Path) -> impl Iterator<Item = PathBuf> {
    entries(home.join("vms")).flat_map(entries).filter(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().contains(".log"))
    })
}

/// What is left of a home's VMs when all of them are removed.
fn left_in(home: &Path) -> Vec<String> {
    let path = home.to_string_lossy();
    let mut left: Vec<String> = processes_of(&path)
        .iter()
        .map(|process| format!("process {process:?} is left of {path}"))
        .collect();
    let of_no_vm = |file: &PathBuf| LOCKS.iter().any(|lock| file.ends_with(lock));
    let files = entries(home.join("vms")).filter(|file| !of_no_vm(file));
    let files = files.chain(entries(home.join("run")));
    left.extend(files.map(|file| format!("{} is left", file.display())));
    for (list, what) in [("/proc/net/unix", "socket"), ("/proc/self/mountinfo", "mount")] {
        let list = std::fs::read(list).unwrap_or_else(|error| panic!("{list}: {error}"));
        let list = String::from_utf8_lossy(&list);
        let lines = list.lines().filter(|line| line.contains(&*path));
        left.extend(lines.map(|line| format!("a {what} is left: {line}")));
    }
    left
}

/// Does all that is wrong at the home of a VM, and undoes it when it was seen.
fn provoke() {
    let home = Home::new();
    let at = |name: &str| home.path().join(name);
    for folder in ["vms/vm", "run", "mounted"] {
        std::fs::create_dir_all(at(folder)).expect("make folders");
    }

    // Logs of VMs that are gone when they are read, and of which one has been renamed before.
    expect("on purpose");
    let bad = PANICS.map(|text| format!("[    1.5] {text} here")).join("\n");
    let good = "Command line: panic=-1\nBUG: on purpose\nBUG: not yet a line";
    let log = at("vms/vm/agent.log");
    for text in [bad.as_str(), "panicked at 1"] {
        std::fs::write(&log, format!("{text}\n{good}")).expect("write");
        look();
        std::fs::rename(&log, at("vms/vm/agent.log.1")).expect("rename");
    }
    std::fs::remove_dir_all(at("vms/vm")).expect("remove");

    // A monitor that has grown beside one that has not: both wait for somebody who reads what they have read.
    symlink("/usr/bin/dd", at("lighter-vmm")).expect("make a link");
    let hold = |kib: u64| {
        let mut command = Command::new(at("lighter-vmm"));
        command.args(["if=/dev/zero", &format!("bs={kib}K"), "count=1"]);
        command.env("LIGHTER_HOME", home.path()).stdout(Stdio::piped());
        command.spawn().expect("start")
    };
    let (mut large, mut small) = (hold(2 * MOST_OWN_KIB), hold(MOST_OWN_KIB / 2));
    until("grown monitor", || {
        look();
        watch().large.contains_key(&large.id()).then_some(())
    });
    assert!(!watch().large.contains_key(&small.id()));

    // What is left when the home ends: processes, files, sockets, mounts.
    let socket = UnixListener::bind(at("run/docker.sock")).expect("a socket");
    std::fs::write(at("vms/.config.lock"), "").expect("write");
    std::fs::write(at("vms/.vm.partial"), "").expect("write");
    mount("tmpfs", at("mounted"), "tmpfs", MountFlags::empty(), None).expect("mount");
    let left = left_in(home.path());
    let kinds = [
        "process",
        "process",
        "vms/.vm.partial",
        "run/docker.sock",
        "a socket",
        "a mount",
    ];
    assert!(
        kinds.iter().zip(&left).all(|(kind, left)| left.contains(kind)),
        "{left:#?}"
    );
    assert_eq!(left.len(), kinds.len(), "{left:#?}");
    unmount(at("mounted"), UnmountFlags::empty()).expect("unmount");
    for file in ["run/docker.sock", "vms/.vm.partial"] {
        std::fs::remove_file(at(file)).expect("remove");
    }
    for child in [&mut large, &mut small] {
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
    drop(socket);
    assert_eq!(left_in(home.path()), <[String; 0]>::default());
    // All that is complained of in the test, now that nobody sees any of it any more.
    let seen = {
        let mut watch = watch();
        watch.read_logs();
        watch.complaints()
    };
    assert_eq!(seen.len(), PANICS.len() + 2, "{seen:#?}");
}
