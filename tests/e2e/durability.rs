//! What was acknowledged is there: after kills, and after a power cut at any moment.

use super::Test;
use super::ledger::{self, FILES, Ledger};
use super::platter::{Entry, Mounted, Recording, Replay, check_ext4, run};
use super::world::{Docker, Home, Running, client_file, is_long, processes_of, until};
use lighter_disk::Chain;
use lighter_tests::random::Random;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub const TESTS: &[Test] = &[
    ("no_acknowledged_row_is_lost_when_a_vm_is_killed", kills),
    (
        "no_acknowledged_row_is_lost_by_a_power_cut_at_any_flush",
        power_cuts,
    ),
];

/// An image as large as a pulled one, on its way into the engine when it is killed.
fn import_meanwhile(docker: &Docker, tag: &str) -> Running {
    let tar = client_file("posix.tar");
    docker.start(&["import", tar.to_str().expect("text"), tag], b"")
}

fn kills() {
    let home = Home::new();
    home.boot("ledger");
    let docker = home.docker("ledger");
    docker.import("sqlite");
    let rounds = if is_long() { 50 } else { 3 };
    let mut acknowledged = 0;
    for round in 0..rounds {
        let ledger = Ledger::open(&docker);
        let import = import_meanwhile(&docker, &format!("pulled:{round}"));
        for _ in 0..20 {
            acknowledged = ledger.next();
        }
        let (supervisor, monitor) = (
            home.pid("ledger", "supervisor_pid"),
            home.pid("ledger", "monitor_pid"),
        );
        let killed: Vec<Pid> = match round % 3 {
            0 => vec![monitor],
            1 => vec![supervisor],
            _ => {
                let all = processes_of(home.path().to_str().expect("text"));
                all.into_iter().map(|process| process.pid).collect()
            }
        };
        for pid in &killed {
            // The first one's death may be another's.
            let _ = kill_process(*pid, Signal::KILL);
        }
        acknowledged = ledger.end().unwrap_or(acknowledged);
        import.wait();
        until("end of all processes", || {
            processes_of(home.path().to_str().expect("text"))
                .is_empty()
                .then_some(())
        });
        home.run(&["exec", "ledger", "--", "true"]).fails_with(3);
        home.run(&["start", "ledger"]).ok();
        let read = ["run", "--rm", "--network", "none", "-v", "ledger:/v", "sqlite"];
        let rows = docker.ok(&[&read[..], &["sqlite3", "/v/db", ledger::QUERY]].concat());
        ledger::check(&rows, acknowledged, &format!("round {round}, {killed:?} killed"));
        // What was cut off is no obstacle to the same.
        import_meanwhile(&docker, &format!("pulled:{round}")).wait().ok();
    }
    home.run(&["rm", "--force", "ledger"]).ok();
}

/// Has `ledger` commit some rows; each is marked on the disk when it is acknowledged.
fn commit(ledger: &Ledger, disk: &Recording, count: u32) {
    for _ in 0..count {
        disk.mark(&ledger.next().to_string());
    }
}

fn power_cuts() {
    let home = Home::new();
    let vms = home.path().join("vms");
    let folder = tempfile::tempdir_in("/tmp").expect("a folder");
    let disk = Recording::start(folder.path(), 1024, &vms);
    home.run(&["start", "-c", "1", "-m", "1g", "-d", "2g", "cut"])
        .ok();
    let docker = home.docker("cut");
    docker.import("sqlite");
    let ledger = Ledger::open(&docker);
    commit(&ledger, &disk, 10);
    let import = import_meanwhile(&docker, "pulled");
    commit(&ledger, &disk, 10);
    import.wait().ok();
    home.run(&["stop", "cut"]).ok();
    ledger.end();

    // As it is in VMs that were made of this one.
    add_layer(&home);
    home.run(&["start", "cut"]).ok();
    let ledger = Ledger::open(&docker);
    commit(&ledger, &disk, 10);
    docker.ok(&["rmi", "pulled"]);
    home.run(&["exec", "cut", "--", "sync"]).ok();
    commit(&ledger, &disk, 10);
    home.run(&["stop", "--force", "cut"]).ok();
    ledger.end();
    let mut replay = disk.end();

    let entries = replay.entries();
    let acknowledged = |end: usize| -> Option<u32> {
        let marks = entries[..end]
            .iter()
            .rev()
            .filter_map(|entry| entry.text.as_ref());
        // The kernel has one of its own at the end.
        marks.flat_map(|text| text.parse()).next()
    };
    let flushes = (1..=entries.len()).filter(|&end| entries[end - 1].is_flush());
    let flushes: Vec<usize> = flushes.filter(|&end| acknowledged(end).is_some()).collect();
    let wanted = if is_long() { flushes.len() } else { 12 };
    assert!(wanted <= flushes.len(), "{} flushes", flushes.len());
    let seed = std::env::var("LIGHTER_TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    let mut random = Random::new(seed);
    eprintln!(
        "{} writes and flushes, {} moments, seed {seed}",
        entries.len(),
        flushes.len()
    );
    for number in 0..wanted {
        let [from, to] = [number, number + 1].map(|number| number * flushes.len() / wanted);
        let end = flushes[from + random.below((to - from) as u32) as usize];
        replay.advance(&entries, end);
        let row = acknowledged(end).expect("a row");
        let check = |image: &Path, what: &str| {
            let when = format!("seed {seed}, {what} entry {end} of {}, row {row}", entries.len());
            check_cut(folder.path(), image, row, &when);
        };
        check(&replay.cut(), "at");
        check(&replay.cut_amid(&entries, &mut random), "amid what follows");
    }

    let left = Mounted::new(&last(&mut replay, &entries), &vms);
    home.run(&["start", "cut"]).ok();
    let read = ["run", "--rm", "--network", "none", "-v", "ledger:/v", "sqlite"];
    let rows = docker.ok(&[&read[..], &["sqlite3", "/v/db", ledger::QUERY]].concat());
    ledger::check(&rows, acknowledged(entries.len()).expect("a row"), "at the end");
    home.run(&["rm", "--force", "cut"]).ok();
    drop(left);
}

fn last(replay: &mut Replay, entries: &[Entry]) -> PathBuf {
    replay.advance(entries, entries.len());
    replay.cut()
}

/// Freezes the disk of VM `cut`, and gives it a layer to write to.
fn add_layer(home: &Home) {
    let base = home.vm_file("cut", "data.img");
    let size = std::fs::metadata(&base).expect("its length").len();
    std::fs::set_permissions(&base, Permissions::from_mode(0o400)).expect("freeze");
    let path = home.vm_file("cut", "data.img.1");
    let layer = File::create_new(&path).expect("create");
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("set its mode");
    lighter_disk::create(&layer, size).expect("make it a layer");
    layer.sync_all().expect("sync");
    let list = home.vm_file("cut", "disk.json");
    std::fs::write(&list, "{\"layers\":[1]}").expect("write");
    File::open(list).and_then(|list| list.sync_all()).expect("sync");
}

/// Takes the way back that a host takes after a power cut: its own file system, the disk's files, the guest's file system, the database.
fn check_cut(folder: &Path, image: &Path, row: u32, when: &str) {
    let host = Mounted::new(image, &folder.join("host"));
    let files = host.at.join("cut");
    let base = files.join("data.img");
    let guest = match files.join("disk.json").exists() {
        false => base,
        true => {
            let flat = folder.join("guest");
            flatten(&base, &files.join("data.img.1"), &flat, when);
            flat
        }
    };
    let mounted = Mounted::new(&guest, &folder.join("mounted"));
    let database = mounted.at.join(FILES).join("db");
    let answer = run("sqlite3", &[database.to_str().expect("text"), ledger::QUERY]);
    drop(mounted);
    check_ext4(&guest, when);
    ledger::check(&answer, row, when);
}

/// Makes `flat` the disk that `base` and `layer` are.
fn flatten(base: &Path, layer: &Path, flat: &Path, when: &str) {
    let layer = File::options().read(true).write(true).open(layer).expect("open");
    let base = File::open(base).expect("open");
    let chain = Chain::open(Arc::new(base), vec![Arc::new(layer)]);
    let mut chain = chain.unwrap_or_else(|(_, error)| panic!("{when}: {error}"));
    chain.make_writable().expect("make it writable");
    let flat = File::create(flat).expect("create");
    flat.set_len(chain.size()).expect("set its length");
    let mut buffer = vec![0; 1 << 20];
    for extent in chain.extents().expect("find its data") {
        for at in extent.clone().step_by(buffer.len()) {
            let part = (extent.end - at).min(buffer.len() as u64) as usize;
            chain.read_at(&mut buffer[..part], at).expect("read");
            flat.write_all_at(&buffer[..part], at).expect("write");
        }
    }
}
