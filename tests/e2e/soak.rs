//! All kinds of work on one VM, most of it at once, over and over, as in weeks of use: builds, pulls, imports, traffic of ports, commands, files of
//! the host, and forks that are suspended, woken and removed. What its processes, its guest and its folder take does not grow by it.
//!
//! The short form has a few rounds; `LIGHTER_TEST_SOAK_MINUTES` has as many as fit in so long (`scripts/soak`).

use super::Test;
use super::cost::{Cost, disk};
use super::names::Registry;
use super::wake::{self, PORT};
use super::world::{Docker, Home, folder_in_home, until};
use super::{idle, ports, watch};
use rustix::process::Pid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

pub const TESTS: &[Test] = &[("whatever_a_vm_does_for_long_costs_no_more_than_at_first", soak)];

const VM: &str = "soak";

/// Ports of the container whose bytes are many: to it, and from it.
const BULK: [u16; 2] = [7109, 7119];

/// The rounds of the short form. The first one fills caches, and counts in no form.
const ROUNDS: usize = 3;

/// What is done in each round: clients at once, commands at once, and MiB that a build makes and that go each way through ports.
const CLIENTS: usize = 16;
const COMMANDS: usize = 6;
const MIB: u64 = 4;

/// What is looked at, by whose it is, and by how much it may be more in the last quarter of the rounds than in the first. KiB, or how many.
const FIGURES: [(&str, &str, u64); 17] = [
    // What the allocator may keep of the buffers of a crowd.
    ("supervisor", "own memory", 4 << 10),
    ("supervisor", "descriptors", 4),
    // Those that ask for names of the host end when nobody has asked for a while.
    ("supervisor", "threads", 4),
    ("monitor", "own memory", 1 << 10),
    // Each fork leaves a layer of the disk until they are merged, and each is a file.
    ("monitor", "descriptors", 8),
    ("monitor", "threads", 0),
    ("passt", "own memory", 1 << 10),
    ("passt", "descriptors", 8),
    ("passt", "threads", 0),
    // The layers, and what the guest has not given back yet.
    ("folder", "disk", 128 << 10),
    // All but caches.
    ("guest", "used memory", 32 << 10),
    ("guest", "disk", 32 << 10),
    ("guest", "programs", 4),
    ("guest", "zombies", 2),
    ("agent", "descriptors", 4),
    ("dockerd", "descriptors", 8),
    ("containerd", "descriptors", 8),
];

/// Prints, of the guest's figures, each in a line as they are in the table.
const LOOK: &str = "awk '/^MemTotal/ {t=$2} /^MemAvailable/ {a=$2} END {print t-a}' /proc/meminfo
df -k /var/lib | awk 'END {print $3}'
for p in /proc/[0-9]*; do readlink $p/exe; done | wc -l
grep -ls '^State:.Z' /proc/[0-9]*/status | wc -l
for p in 1 $(pidof dockerd) $(pidof containerd); do ls /proc/$p/fd | wc -l; done";

type Work<'a> = Box<dyn Fn() + Send + 'a>;

type Figures = [u64; FIGURES.len()];

struct Soak {
    /// Keeps its files in the home.
    registry: Registry,
    home: Home,
    docker: Docker,
    /// Those of the VM, which are the same all the while.
    processes: [Pid; 3],
}

fn soak() {
    let minutes = std::env::var("LIGHTER_TEST_SOAK_MINUTES").ok();
    let minutes = minutes.map_or(0, |text| text.parse().expect("a number of minutes"));
    let time = Duration::from_secs(minutes * 60);
    let folder = folder_in_home();
    let soak = Soak::begin(folder.path());
    let begun = Instant::now();
    let mut rounds: Vec<Figures> = vec![];
    while begun.elapsed() < time || rounds.len() < ROUNDS {
        soak.round(rounds.len(), folder.path());
        let figures = soak.figures();
        eprintln!(
            "round {} after {} s: {figures:?}",
            rounds.len(),
            begun.elapsed().as_secs()
        );
        rounds.push(figures);
    }
    assert_flat(&rounds[1..]);
    watch::read_kernel(&soak.home, VM);
}

impl Soak {
    fn begin(folder: &Path) -> Self {
        let home = Home::new();
        let registry = Registry::start(&home.path().join("registry"), None);
        let name = format!("host.docker.internal:{}", registry.port);
        let size = ["start", "-c", "1", "-m", "1g", "-d", "8g", VM];
        let more = [
            "--insecure-registry",
            &name,
            "--mount",
            folder.to_str().expect("text"),
        ];
        home.run(&[&size[..], &more].concat()).ok();
        let docker = home.docker(VM);
        for image in ["busybox", "ports"] {
            docker.import(image);
        }
        let published = [
            format!("{PORT}:7"),
            format!("{PORT}:7/udp"),
            format!("{}:9", BULK[0]),
            format!("{}:19", BULK[1]),
        ];
        ports::serve(&docker, "quay", &published.each_ref().map(String::as_str), &[]).ok();
        docker.wait_for_log("quay", "listening");
        let pulled = format!("{name}/box");
        docker.ok(&["tag", "busybox", &pulled]);
        docker.ok(&["push", "-q", &pulled]);
        docker.ok(&["rmi", &pulled]);
        let mut soak = Self {
            processes: [Pid::INIT; 3],
            home,
            docker,
            registry,
        };
        soak.processes = soak.running();
        soak
    }

    /// Supervisor, monitor and passt.
    fn running(&self) -> [Pid; 3] {
        ["supervisor_pid", "monitor_pid", "network_pid"].map(|role| self.home.pid(VM, role))
    }

    fn round(&self, number: usize, folder: &Path) {
        // The client of a build gives up when a slow machine has too much else to do.
        self.build();
        std::thread::scope(|scope| {
            let works: [(&str, Work<'_>); 4] = [
                ("images", Box::new(|| self.images())),
                (
                    "clients",
                    Box::new(|| wake::all_answered(wake::crowd(&self.docker, CLIENTS))),
                ),
                ("ports", Box::new(|| self.bulk())),
                ("commands", Box::new(move || self.commands(number, folder))),
            ];
            let works = works.map(|(name, work)| (name, scope.spawn(work)));
            self.fork(number);
            for (name, work) in works {
                assert!(work.join().is_ok(), "{name} in round {number}");
            }
        });
    }

    fn build(&self) {
        idle::build(&self.docker, MIB);
        idle::forget_build(&self.docker);
    }

    /// A pull from a registry, and an image from a file.
    fn images(&self) {
        let pulled = format!("host.docker.internal:{}/box", self.registry.port);
        self.docker.ok(&["pull", "-q", &pulled]);
        self.docker.ok(&["rmi", &pulled]);
        let file = self.home.path().join("saved");
        let path = file.to_str().expect("text");
        self.docker.ok(&["tag", "busybox", "again"]);
        self.docker.ok(&["save", "-o", path, "again"]);
        self.docker.ok(&["rmi", "again"]);
        self.docker.ok(&["load", "-q", "-i", path]);
        self.docker.ok(&["rmi", "again"]);
        std::fs::remove_file(file).expect("remove");
    }

    fn bulk(&self) {
        let bytes = (MIB as usize) << 20;
        ports::send(BULK[0], bytes);
        ports::receive(BULK[1], bytes);
    }

    /// Commands in the guest, all at once, and a container that works with files of the host.
    fn commands(&self, number: usize, folder: &Path) {
        let commands: Vec<_> = (0..COMMANDS)
            .map(|command| {
                let text = format!("{number} {command}");
                let started = self.home.start(&["exec", "-i", VM, "--", "cat"], text.as_bytes());
                (text, started)
            })
            .collect();
        let volume = format!("{}:/x", folder.display());
        let files = "for i in $(seq 50); do echo $i > /x/$i; mv /x/$i /x/new$i; done; cat /x/new* | wc -l; rm /x/new*";
        let run = ["run", "--rm", "-v", &volume, "busybox", "sh", "-c", files];
        assert_eq!(self.docker.ok(&run), "50");
        for (text, command) in commands {
            assert_eq!(command.wait().ok(), text);
        }
    }

    /// A fork that answers, sleeps, answers again, and is gone.
    fn fork(&self, number: usize) {
        let fork = ["fork", VM, "--as", "f", "--no-context"];
        let name = self.home.run(&fork).ok();
        let docker = self.home.docker(&name);
        let answers = |text: &str| {
            let cat = ["exec", "-i", "quay", "port-server", "cat"];
            assert_eq!(docker.start(&cat, text.as_bytes()).wait().ok(), text);
            assert_eq!(wake::echo(self.port_of(&name), text), text);
        };
        answers(&format!("fork of round {number}"));
        self.home.run(&["suspend", &name]).ok();
        self.home.run(&["resume", "--no-context", &name]).ok();
        answers("once more");
        self.home.run(&["rm", "--force", &name]).ok();
    }

    /// Where the fork's container is reached.
    fn port_of(&self, fork: &str) -> u16 {
        until("port of the fork", || {
            let listed = self.home.run(&["ports", "--json", fork]).ok();
            let listed: Value = serde_json::from_str(&listed).expect("JSON");
            let mut listed = listed.as_array().expect("a list").iter();
            let echo = listed.find(|port| {
                let container = port["container"].as_str().unwrap_or_default();
                port["transport"] == "tcp" && container.ends_with(":7")
            });
            echo?["host"].as_str()?.rsplit_once(':')?.1.parse().ok()
        })
    }

    /// What everything takes: of several looks the least, for what has just ended goes as soon as it can.
    fn figures(&self) -> Figures {
        assert_eq!(self.running(), self.processes, "another process");
        let mut figures = [u64::MAX; FIGURES.len()];
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(500));
            let costs = self.processes.map(Cost::of);
            let costs = costs.map(|cost| [cost.own_kib, cost.descriptors as u64, cost.threads as u64]);
            let now = costs.into_iter().flatten().chain([disk(&self.home).1]);
            for (least, now) in figures.iter_mut().zip(now) {
                *least = now.min(*least);
            }
        }
        let said = self.home.run(&["exec", VM, "--", "sh", "-c", LOOK]).ok();
        let numbers = said.lines().map(|line| line.trim().parse().expect("a number"));
        let guest: Vec<u64> = numbers.collect();
        let missing = figures.iter().filter(|&&figure| figure == u64::MAX).count();
        assert_eq!(guest.len(), missing, "{said}");
        figures[FIGURES.len() - missing..].copy_from_slice(&guest);
        figures
    }
}

/// Prints a table of all figures, and fails when one has grown.
fn assert_flat(rounds: &[Figures]) {
    let quarter = rounds.len().div_ceil(4);
    let (first, last) = (&rounds[..quarter], &rounds[rounds.len() - quarter..]);
    let middle = |rounds: &[Figures], index: usize| {
        let mut values: Vec<u64> = rounds.iter().map(|figures| figures[index]).collect();
        values.sort_unstable();
        values[values.len() / 2]
    };
    let mut grown = BTreeMap::new();
    eprintln!("| of | what | first quarter | last quarter | at most | may grow by |");
    eprintln!("|---|---|---:|---:|---:|---:|");
    for (index, (of, what, growth)) in FIGURES.into_iter().enumerate() {
        let (first, last) = (middle(first, index), middle(last, index));
        let most = rounds
            .iter()
            .map(|figures| figures[index])
            .max()
            .unwrap_or_default();
        eprintln!("| {of} | {what} | {first} | {last} | {most} | {growth} |");
        if last > first + growth {
            grown.insert((of, what), (first, last));
        }
    }
    assert!(
        grown.is_empty(),
        "more in the last quarter than in the first: {grown:?}"
    );
}
