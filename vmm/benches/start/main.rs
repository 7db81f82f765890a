//! How long from the start of the monitor's process to the first guest instruction, beside two others in the same run:
//! a floor (a program that makes only the KVM calls no monitor can do without) and, when named, Firecracker. The guest is
//! booted, or goes on from a snapshot; both with several sizes of guest memory, too. Last, how long a guest stands still when it is saved.
//!
//! ```text
//! cargo bench -p lighter-vmm --bench start -- [--runs N] [--firecracker PATH [--jailer PATH]]
//! ```
//!
//! The guest is a few instructions, so any /dev/kvm will do. Runs alternate; ratios are of neighbours.

#![allow(clippy::print_stdout, reason = "a benchmark shows its figures")]

mod firecracker;
mod floor;

use firecracker::{FIRST_BYTE, Firecracker, Took, ms, set_byte};
use lighter_protocol::monitor::{EventKind, Request};
use lighter_tests::tiny_guest::{Kernel, Setup};
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Guest memory of each contender, MiB.
const MEMORY_MIB: u64 = 128;

/// Guest memory of the saved guests whose whole life is compared, MiB.
const SAVED_MIB: u64 = 1024;

/// Guest memory of the runs that compare sizes, MiB.
const SIZES_MIB: [u64; 4] = [256, 1024, 4096, 16384];

/// Guest memory of the guest that is saved again and again, MiB.
const WRITTEN_MIB: u32 = 2048;

struct Arguments {
    runs: usize,
    firecracker: Option<PathBuf>,
    jailer: Option<PathBuf>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, mib] = &arguments[..]
        && first == floor::ARGUMENT
    {
        let mib: u64 = mib.parse().expect("MiB of guest memory");
        floor::run(mib << 20);
        return;
    }
    let arguments = parse(&arguments);
    println!(
        "{} runs each, {MEMORY_MIB} MiB of guest memory, 1 vCPU; milliseconds: min / median / max",
        arguments.runs
    );
    entry(arguments.runs);
    sizes(arguments.runs);
    lifetime(&arguments);
    pause(arguments.runs);
}

fn parse(arguments: &[String]) -> Arguments {
    let mut parsed = Arguments {
        runs: 100,
        firecracker: None,
        jailer: None,
    };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--runs" => parsed.runs = rest.next().and_then(|runs| runs.parse().ok()).expect("--runs N"),
            "--firecracker" => parsed.firecracker = Some(rest.next().expect("--firecracker PATH").into()),
            "--jailer" => parsed.jailer = Some(rest.next().expect("--jailer PATH").into()),
            // cargo bench adds this.
            "--bench" => {}
            other => panic!("unknown argument {other}"),
        }
    }
    parsed
}

/// Start of the process to right before the guest is entered, by the process's own clock reading.
fn entry(runs: usize) {
    let saved = Saved::new(MEMORY_MIB);
    let (mut floors, mut booted, mut restored) = (vec![], vec![], vec![]);
    for _ in 0..runs {
        floors.push(floor_entry(MEMORY_MIB));
        booted.push(monitor_entry(setup(idle())));
        restored.push(monitor_entry(saved.setup()));
    }
    println!("\nprocess start to first guest entry");
    show("floor", &floors);
    show("lighter-vmm", &booted);
    show_ratio("lighter-vmm / floor", &booted, &floors);
    show("lighter-vmm, from a snapshot", &restored);
    show_ratio("from a snapshot / floor", &restored, &floors);
}

/// The same with more and more guest memory.
fn sizes(runs: usize) {
    let saved = SIZES_MIB.map(Saved::new);
    let mut figures = SIZES_MIB.map(|_| (vec![], vec![], vec![]));
    for _ in 0..runs {
        for (saved, (floors, booted, restored)) in saved.iter().zip(&mut figures) {
            floors.push(floor_entry(saved.memory_mib));
            let mut setup = setup(idle());
            setup.memory_mib = saved.memory_mib;
            booted.push(monitor_entry(setup));
            restored.push(monitor_entry(saved.setup()));
        }
    }
    println!("\nthe same by guest memory");
    let smallest = figures[0].clone();
    for (mib, (floors, booted, restored)) in SIZES_MIB.into_iter().zip(figures) {
        println!("  {mib} MiB");
        show("floor", &floors);
        show("lighter-vmm", &booted);
        show_ratio("lighter-vmm / floor", &booted, &floors);
        show("lighter-vmm, from a snapshot", &restored);
        show_ratio("from a snapshot / floor", &restored, &floors);
        show("floor, more than smallest", &differences(&floors, &smallest.0));
        show("lighter-vmm, likewise", &differences(&booted, &smallest.1));
        show("from a snapshot, likewise", &differences(&restored, &smallest.2));
    }
}

/// Start of the process to the first guest instruction and to its end, with a guest that says that it runs and crashes: one
/// that boots, and one that goes on.
fn lifetime(arguments: &Arguments) {
    let jailer = arguments.jailer.as_deref();
    let booted = arguments
        .firecracker
        .as_ref()
        .map(|program| Firecracker::new(program, jailer, &crashing().to_bytes(), MEMORY_MIB));
    let saved = Saved::with(waiting(), SAVED_MIB);
    set_byte(&saved.folder.path().join("memory"), FLAG);
    let peer_saved = arguments
        .firecracker
        .as_ref()
        .map(|program| Firecracker::new(program, jailer, &waiting().to_bytes(), SAVED_MIB));
    if let Some(peer) = &peer_saved {
        peer.save(FLAG);
    }
    let (mut boots, mut peer_boots, mut restores, mut peer_restores) = (vec![], vec![], vec![], vec![]);
    for _ in 0..arguments.runs {
        boots.push(monitor_life(setup(crashing())));
        peer_boots.extend(booted.as_ref().map(Firecracker::boot));
        restores.push(monitor_life(saved.setup()));
        peer_restores.extend(peer_saved.as_ref().map(Firecracker::restore));
    }
    println!("\na guest that triple-faults at once");
    show_lives(&boots, &peer_boots);
    println!("\nthe same, from a snapshot of {SAVED_MIB} MiB of guest memory");
    show_lives(&restores, &peer_restores);
}

fn show_lives(ours: &[Took], theirs: &[Took]) {
    let all = |of: &[Took], part: fn(&Took) -> f64| -> Vec<f64> { of.iter().map(part).collect() };
    let show_part = |until: &str, part: fn(&Took) -> f64| {
        println!("  process start to {until}");
        show("lighter-vmm", &all(ours, part));
        if !theirs.is_empty() {
            show("firecracker", &all(theirs, part));
            show_ratio("lighter-vmm / firecracker", &all(ours, part), &all(theirs, part));
        }
    };
    show_part("first guest instruction", |took| took.entered);
    show_part("end", |took| took.ended);
}

/// Where the guest of [`writing`] begins to write, in its memory.
const WRITTEN_FROM: u32 = 16 << 20;

/// How long a guest stands still that has written to a tenth of its pages since it was saved before: to those that lie together, or to
/// every tenth.
fn pause(runs: usize) {
    println!(
        "\npause of a guest of {WRITTEN_MIB} MiB that is saved, a tenth of it written since the time before"
    );
    let end = WRITTEN_MIB << 20;
    let tenth = WRITTEN_FROM + (end - WRITTEN_FROM) / 10;
    show("pages side by side", &pauses(runs, writing(4096, tenth)));
    show("every tenth page", &pauses(runs, writing(10 * 4096, end)));
}

/// As the supervisor has it: from the request to pause to the answer that it goes on. There is no disk.
fn pauses(runs: usize, kernel: Kernel) -> Vec<f64> {
    let mut setup = setup(kernel);
    setup.memory_mib = WRITTEN_MIB.into();
    let mut vm = setup.start();
    let mut pauses = vec![];
    for run in 0..=runs {
        // The round that is under way began before the guest went on.
        let rounds = vm.console().lines().count() + 2;
        while vm.console().lines().count() < rounds {
            std::thread::sleep(Duration::from_millis(10));
        }
        let folder = tempfile::tempdir().expect("temporary folder");
        let began = Instant::now();
        vm.request(&Request::Pause);
        vm.save(folder.path());
        vm.request(&Request::Resume);
        // Before the first time all of memory is written.
        if run > 0 {
            pauses.push(ms(began));
        }
        vm.wait_for(&EventKind::Saved);
    }
    pauses
}

/// Writes to all its pages from [`WRITTEN_FROM`] on, prints a line; then to some of them, prints a line, and so on.
fn writing(distance: u32, end: u32) -> Kernel {
    let write = |distance: u32, end: u32| {
        let parts: [&[u8]; 8] = [
            // mov edi, the first
            &[0xbf],
            &WRITTEN_FROM.to_le_bytes(),
            // write: mov byte [edi], 0; add edi, distance
            &[0xc6, 0x07, 0x00, 0x81, 0xc7],
            &distance.to_le_bytes(),
            // cmp edi, the end; jb write
            &[0x81, 0xff],
            &end.to_le_bytes(),
            &[0x72, 0xef],
            // mov dx, 0x3f8; mov al, '\n'; out dx, al
            &[0x66, 0xba, 0xf8, 0x03, 0xb0, b'\n', 0xee],
        ];
        parts.concat()
    };
    let again = write(distance, end);
    let back = -(i32::try_from(again.len()).expect("short") + 5);
    let all = write(4096, WRITTEN_MIB << 20);
    Kernel::Pvh([&all[..], &again, &[0xe9], &back.to_le_bytes()].concat())
}

fn floor_entry(mib: u64) -> f64 {
    let program = std::env::current_exe().expect("own path");
    let began = floor::monotonic_ns();
    let output = Command::new(program)
        .args([floor::ARGUMENT, &mib.to_string()])
        .output()
        .expect("start the floor");
    let text = String::from_utf8(output.stdout).expect("a number");
    let entered: u64 = text
        .trim()
        .parse()
        .expect("the floor prints when it entered the guest");
    (entered - began) as f64 / 1e6
}

/// `hlt; jmp` to itself: alive until stopped.
fn idle() -> Kernel {
    Kernel::Pvh(vec![0xf4, 0xeb, 0xfd])
}

fn setup(kernel: Kernel) -> Setup {
    let mut setup = Setup::new(env!("CARGO_BIN_EXE_lighter-vmm"), kernel);
    setup.memory_mib = MEMORY_MIB;
    setup
}

/// A guest, saved.
struct Saved {
    memory_mib: u64,
    folder: tempfile::TempDir,
}

impl Saved {
    fn new(memory_mib: u64) -> Self {
        Self::with(idle(), memory_mib)
    }

    fn with(kernel: Kernel, memory_mib: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut setup = setup(kernel);
        setup.memory_mib = memory_mib;
        let mut vm = setup.start();
        vm.wait_for(&EventKind::GuestEntered);
        vm.request(&Request::Pause);
        vm.save(folder.path());
        vm.wait_for(&EventKind::Saved);
        Self { memory_mib, folder }
    }

    /// A guest that goes on from it.
    fn setup(&self) -> Setup {
        let mut setup = setup(idle());
        setup.memory_mib = self.memory_mib;
        let open = |name| File::open(self.folder.path().join(name)).expect("open the snapshot");
        setup.snapshot = Some([open("state"), open("memory")]);
        setup
    }
}

fn monitor_entry(setup: Setup) -> f64 {
    let began = floor::monotonic_ns();
    let mut vm = setup.start();
    let entered = vm.wait_for(&EventKind::GuestEntered);
    (entered - began) as f64 / 1e6
}

/// Writes [`FIRST_BYTE`] to the first serial port, then an undefined instruction without an interrupt table:
/// `mov dx, 0x3f8; mov al, FIRST_BYTE; out dx, al; ud2`.
const CRASH: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, FIRST_BYTE, 0xee, 0x0f, 0x0b];

fn crashing() -> Kernel {
    Kernel::Pvh(CRASH.to_vec())
}

/// Where [`waiting`] looks, in guest memory.
const FLAG: u64 = 0x20_0000;

/// Waits for a byte that is not zero, and crashes then: `cmp byte [FLAG], 0; je` to itself.
fn waiting() -> Kernel {
    Kernel::Pvh([&[0x80, 0x3d, 0, 0, 0x20, 0, 0, 0x74, 0xf7], &CRASH[..]].concat())
}

/// The guest's entry is stamped by the monitor right before it.
fn monitor_life(setup: Setup) -> Took {
    let (began_ns, began) = (floor::monotonic_ns(), Instant::now());
    let mut vm = setup.start();
    let entered_ns = vm.wait_for(&EventKind::GuestEntered);
    vm.exit_code();
    Took {
        entered: (entered_ns - began_ns) as f64 / 1e6,
        ended: ms(began),
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn show(name: &str, values: &[f64]) {
    let sorted = sorted(values);
    let (min, median, max) = (sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
    println!("  {name:28} {min:8.2} / {median:8.2} / {max:8.2}");
}

/// Of neighbours.
fn differences(these: &[f64], those: &[f64]) -> Vec<f64> {
    these.iter().zip(those).map(|(this, that)| this - that).collect()
}

fn show_ratio(name: &str, these: &[f64], those: &[f64]) {
    let ratios: Vec<f64> = these.iter().zip(those).map(|(this, that)| this / that).collect();
    let sorted = sorted(&ratios);
    let at = |part: f64| sorted[((sorted.len() - 1) as f64 * part) as usize];
    println!(
        "  {name:28} {:8.2} (middle half {:.2} to {:.2})",
        at(0.5),
        at(0.25),
        at(0.75)
    );
}
