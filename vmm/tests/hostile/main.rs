//! A guest that plays a hostile driver, against the monitor as it is: it may end such a VM with a reason, but not crash, hang, grow
//! without bound, or touch what it was not given; and a device that is set up anew afterwards works.
//!
//! The guest is a few instructions (`guest`), so these tests need /dev/kvm, but none that runs Linux. What it does is made up here
//! from a seed, which a failure names: `LIGHTER_TEST_SEED` has it done again. `LIGHTER_TEST_LONG` has a million chains of
//! descriptors posted to each device.

mod devices;
mod driver;
mod guest;

use devices::DEVICES;
use driver::{Driver, MEMORY_END};
use guest::Script;
use lighter_protocol::monitor::{EventKind, Request, Response, Statistics, StopReason};
use lighter_tests::random::Random;
use lighter_tests::tiny_guest::{Setup, Vm};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Chains that one guest has room for among its commands.
const IN_ONE_GUEST: u64 = 10_000;
/// Memory of the monitor besides the guest's, KiB: several times what an idle one has.
const OWN_MEMORY: u64 = 48 << 10;
/// Only a hang takes as long.
const DEADLINE: Duration = Duration::from_secs(900);

/// A device's queues, its own features and its driver's words, over and over.
#[test]
fn block() {
    attack(&[0]);
}

#[test]
fn net() {
    attack(&[1]);
}

#[test]
fn fs() {
    attack(&[2]);
}

#[test]
fn vsock() {
    attack(&[3]);
}

#[test]
fn rng() {
    attack(&[4]);
}

#[test]
fn balloon() {
    attack(&[5]);
}

#[test]
fn all_at_once() {
    attack(&[0, 1, 2, 3, 4, 5]);
}

fn attack(devices: &[usize]) {
    let chains = match std::env::var_os("LIGHTER_TEST_LONG") {
        Some(_) => 1_000_000,
        None => 50_000,
    };
    let given = std::env::var("LIGHTER_TEST_SEED").ok();
    let mut posted = 0;
    let mut seed = given.as_ref().map_or(1, |seed| seed.parse().expect("a number"));
    while posted < chains {
        let _told = Told(seed);
        posted += one_guest(devices, seed, IN_ONE_GUEST.min(chains - posted));
        if given.is_some() {
            return;
        }
        seed += 1;
    }
}

/// Says which seed it was, if the test fails.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = writeln!(std::io::stderr(), "again: LIGHTER_TEST_SEED={}", self.0);
        }
    }
}

/// One guest; returns how many chains it posted.
fn one_guest(devices: &[usize], seed: u64, wanted: u64) -> u64 {
    let mut random = Random::new(seed);
    let mut script = Script::default();
    let mut drivers: Vec<Driver> = devices
        .iter()
        .map(|&number| Driver::new(DEVICES[number], number as u32))
        .collect();
    for driver in &mut drivers {
        driver.start(&mut script, 0);
    }
    let posted = |drivers: &[Driver]| drivers.iter().map(|driver| driver.chains).sum::<u64>();
    while posted(&drivers) < wanted {
        let number = random.below(drivers.len() as u32) as usize;
        drivers[number].round(&mut script, &mut random);
    }
    // Whatever it went through, each device works for a driver that keeps the rules.
    for (number, device) in (0_u32..).zip(DEVICES) {
        Driver::new(device, number).honest(&mut script, b'a' + number as u8);
    }
    script.say(b'.');
    script.say(b'\n');

    let world = World::new();
    let (net, net_of_monitor) = UnixStream::pair().unwrap();
    let mut setup = Setup::new(env!("CARGO_BIN_EXE_lighter-vmm"), script.kernel());
    setup.memory_mib = u64::from(MEMORY_END >> 20);
    setup.net = Some(net_of_monitor);
    setup.share = Some(world.folder.path().join("shared"));
    let disk = setup.disk_path();
    let length = setup.disk_length;
    let mut vm = setup.start();
    let events = vm.collect_events();
    let ends = other_ends(&mut vm, net);
    let statistics = watch(&mut vm);
    let works: String = vm.console().split_whitespace().collect();
    assert_eq!(works, "abcdef.", "a device did not work again");
    for &number in devices {
        let name = DEVICES[number].name;
        let queues = &statistics
            .devices
            .iter()
            .find(|(device, _)| device.starts_with(name));
        let taken: u64 = queues.expect(name).1.iter().map(|queue| queue.chains).sum();
        // Otherwise this test would be one of a device that is never started.
        assert!(
            taken >= wanted / devices.len() as u64 / 8,
            "{name} took {taken} chains of {wanted}"
        );
    }
    assert_eq!(std::fs::metadata(disk).unwrap().len(), length);
    assert_eq!(vm.request(&Request::Stop), Response::Done);
    let events = events.join().unwrap();
    let stopped = EventKind::Stopped {
        reason: StopReason::Requested,
    };
    assert_eq!(events.last(), Some(&stopped));
    assert_eq!(vm.exit_code(), 0);
    drop(vm);
    for end in ends {
        end.join().unwrap();
    }
    world.assert_untouched();
    posted(&drivers)
}

/// Looks at the monitor until the guest is done; it answers all the while.
fn watch(vm: &mut Vm) -> Statistics {
    let began = Instant::now();
    loop {
        let done = vm.console().ends_with(".\n");
        let statistics = match vm.try_request(&Request::Statistics) {
            Ok(Response::Statistics(statistics)) => statistics,
            other => panic!("the monitor is gone: {other:?}, {}", vm.console()),
        };
        let process = format!("/proc/{}", vm.pid());
        let status = std::fs::read_to_string(format!("{process}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident: u64 = resident.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
        let most = u64::from(MEMORY_END >> 10) + OWN_MEMORY;
        assert!(resident < most, "the monitor has {resident} KiB");
        let open = std::fs::read_dir(format!("{process}/fd")).unwrap().count();
        assert!(open < 2500, "{open} descriptors are open");
        if done {
            return statistics;
        }
        assert!(began.elapsed() < DEADLINE, "it hangs after {:?}", vm.console());
        thread::sleep(Duration::from_millis(20));
    }
}

/// What is at the other ends of the network, of the guest's connections to the host, and of the host's to the guest.
fn other_ends(vm: &mut Vm, mut net: UnixStream) -> Vec<thread::JoinHandle<()>> {
    let connections = vm.connections();
    let mut client = vm.connect_guest();
    let frames = thread::spawn(move || {
        let mut seen = vec![0; 64 << 10];
        // Half of what comes goes back, as frames of its own.
        let frame = [&60_u32.to_be_bytes()[..], &[7; 60]].concat();
        while net.read(&mut seen).is_ok_and(|count| count > 0) {
            if net.write_all(&frame).is_err() {
                return;
            }
        }
    });
    let accepted = thread::spawn(move || {
        let mut open = std::collections::VecDeque::new();
        while let Ok((1, Some(file))) = connections.recv_with_fd(&mut [0_u8]) {
            let stream = UnixStream::from(std::os::fd::OwnedFd::from(file));
            // One that says something and reads nothing, and is closed when some more have come.
            let _ = stream.set_nonblocking(true);
            let _ = (&stream).write(&[5; 100_000]);
            open.push_back(stream);
            if open.len() > 4 {
                open.pop_front();
            }
        }
    });
    let asked = thread::spawn(move || {
        // Whether the guest says that it listens, or what, is its own thing.
        let _ = client.write_all(b"CONNECT 1001\n");
        let _ = client.read_to_end(&mut vec![]);
    });
    vec![frames, accepted, asked]
}

/// What is around the shared folder.
struct World {
    folder: TempDir,
}

impl World {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        std::fs::create_dir(folder.path().join("shared")).unwrap();
        std::fs::write(folder.path().join("shared/a"), "a file").unwrap();
        std::fs::write(folder.path().join("outside"), "as it was").unwrap();
        Self { folder }
    }

    fn assert_untouched(&self) {
        let list = |path: &Path| {
            let mut names: Vec<_> = std::fs::read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names
        };
        assert_eq!(list(self.folder.path()), ["outside", "shared"]);
        let outside = std::fs::read(self.folder.path().join("outside")).unwrap();
        assert_eq!(outside, b"as it was");
    }
}
