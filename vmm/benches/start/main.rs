//! How long from the start of the monitor's process to the first guest instruction, beside two others in the same run:
//! a floor (a program that makes only the KVM calls no monitor can do without) and, when named, Firecracker. The guest is
//! booted, or goes on from a snapshot; both with several sizes of guest memory, too.
//!
//! ```text
//! cargo bench -p lighter-vmm --bench start -- [--runs N] [--firecracker PATH]
//! ```
//!
//! The guest is a few instructions, so any /dev/kvm will do. Runs alternate; ratios are of neighbours.

#![allow(clippy::print_stdout, reason = "a benchmark shows its figures")]

mod floor;

use lighter_protocol::monitor::{EventKind, Request};
use lighter_tests::tiny_guest::{Kernel, Setup};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Guest memory of each contender, MiB.
const MEMORY_MIB: u64 = 128;

/// Guest memory of the runs that compare sizes, MiB.
const SIZES_MIB: [u64; 4] = [256, 1024, 4096, 16384];

struct Arguments {
    runs: usize,
    firecracker: Option<PathBuf>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == floor::ARGUMENT) {
        floor::run(MEMORY_MIB << 20);
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
}

fn parse(arguments: &[String]) -> Arguments {
    let mut parsed = Arguments {
        runs: 100,
        firecracker: None,
    };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--runs" => parsed.runs = rest.next().and_then(|runs| runs.parse().ok()).expect("--runs N"),
            "--firecracker" => parsed.firecracker = Some(rest.next().expect("--firecracker PATH").into()),
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
        floors.push(floor_entry());
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
    let mut figures = SIZES_MIB.map(|_| (vec![], vec![]));
    for _ in 0..runs {
        for (saved, (booted, restored)) in saved.iter().zip(&mut figures) {
            let mut setup = setup(idle());
            setup.memory_mib = saved.memory_mib;
            booted.push(monitor_entry(setup));
            restored.push(monitor_entry(saved.setup()));
        }
    }
    println!("\nthe same by guest memory");
    for (mib, (booted, restored)) in SIZES_MIB.into_iter().zip(figures) {
        show(&format!("{mib} MiB, booted"), &booted);
        show(&format!("{mib} MiB, from a snapshot"), &restored);
    }
}

/// Start of the process to its end, with a guest that crashes at once.
fn lifetime(arguments: &Arguments) {
    let (mut monitors, mut peers) = (vec![], vec![]);
    for _ in 0..arguments.runs {
        monitors.push(monitor_lifetime());
        if let Some(firecracker) = &arguments.firecracker {
            peers.push(firecracker_lifetime(firecracker));
        }
    }
    println!("\nprocess start to its end, with a guest that triple-faults at once");
    show("lighter-vmm", &monitors);
    if !peers.is_empty() {
        show("firecracker", &peers);
        show_ratio("lighter-vmm / firecracker", &monitors, &peers);
    }
}

fn floor_entry() -> f64 {
    let program = std::env::current_exe().expect("own path");
    let began = floor::monotonic_ns();
    let output = Command::new(program)
        .arg(floor::ARGUMENT)
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

/// The idle guest, saved.
struct Saved {
    memory_mib: u64,
    folder: tempfile::TempDir,
}

impl Saved {
    fn new(memory_mib: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut setup = setup(idle());
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

/// An undefined instruction without an interrupt table.
fn crashing() -> Kernel {
    Kernel::Pvh(vec![0x0f, 0x0b])
}

fn monitor_lifetime() -> f64 {
    let setup = setup(crashing());
    let began = Instant::now();
    let mut vm = setup.start();
    vm.exit_code();
    began.elapsed().as_secs_f64() * 1e3
}

fn firecracker_lifetime(program: &Path) -> f64 {
    let folder = tempfile::tempdir().expect("temporary folder");
    let kernel = folder.path().join("kernel");
    std::fs::write(&kernel, crashing().to_bytes()).expect("write the kernel");
    let config = folder.path().join("config.json");
    let text = serde_json::json!({
        "boot-source": { "kernel_image_path": kernel, "boot_args": "quiet" },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
    });
    std::fs::write(&config, text.to_string()).expect("write the configuration");
    let began = Instant::now();
    Command::new(program)
        .args(["--no-api", "--config-file"])
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("run firecracker");
    began.elapsed().as_secs_f64() * 1e3
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
