//! The host's disk under a VM breaks.

use super::Test;
use super::ledger::{self, Ledger};
use super::platter::{Loop, run};
use super::world::{Home, processes_of, until};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::File;
use std::path::{Path, PathBuf};

pub const TESTS: &[Test] = &[(
    "a_disk_of_the_host_s_that_breaks_is_told_of_and_what_was_acknowledged_is_there_when_it_works_again",
    broken,
)];

/// A file system whose disk takes no writes when it is told so (`dm-flakey`).
struct Fragile {
    name: String,
    sectors: u64,
    device: Loop,
    at: PathBuf,
}

impl Fragile {
    /// Makes one of `mib` MiB in a file of `folder`, and mounts it at `at`.
    fn start(folder: &Path, mib: u64, at: &Path) -> Self {
        for module in ["loop", "dm-flakey"] {
            run("modprobe", &[module]);
        }
        let path = folder.join("disk");
        let file = File::create(&path).expect("create");
        file.set_len(mib << 20).expect("set its length");
        run("mkfs.ext4", &["-q", "-F", path.to_str().expect("text")]);
        let fragile = Self {
            name: format!("lighter-{}", std::process::id()),
            sectors: mib << 11,
            device: Loop::over(&path),
            at: at.into(),
        };
        let table = fragile.table(false);
        run(
            "dmsetup",
            &["create", "--noudevsync", &fragile.name, "--table", &table],
        );
        std::fs::create_dir_all(at).expect("make a folder");
        fragile.mount();
        // Nobody's VM.
        std::fs::remove_dir(at.join("lost+found")).expect("remove");
        fragile
    }

    fn table(&self, broken: bool) -> String {
        let (sectors, device) = (self.sectors, &self.device.0);
        match broken {
            true => format!("0 {sectors} flakey {device} 0 0 3600 1 error_writes"),
            false => format!("0 {sectors} linear {device} 0"),
        }
    }

    fn is_broken(&self, broken: bool) {
        run("dmsetup", &["load", &self.name, "--table", &self.table(broken)]);
        run("dmsetup", &["suspend", &self.name]);
        run("dmsetup", &["resume", "--noudevsync", &self.name]);
    }

    fn mount(&self) {
        let device = format!("/dev/mapper/{}", self.name);
        mount(&*device, &self.at, "ext4", MountFlags::empty(), None).expect("mount");
    }

    fn unmount(&self) {
        until("end of the use of the disk", || {
            unmount(&self.at, UnmountFlags::empty()).ok()
        });
    }

    fn end(self) {
        self.unmount();
        run("dmsetup", &["remove", "--noudevsync", &self.name]);
    }
}

fn broken() {
    let home = Home::new();
    let folder = tempfile::tempdir_in("/tmp").expect("a folder");
    let disk = Fragile::start(folder.path(), 1024, &home.path().join("vms"));
    home.boot_small("worn", "512m", &["--no-mounts"]);
    let docker = home.docker("worn");
    docker.import("sqlite");
    let ledger = Ledger::open(&docker);
    let mut acknowledged = 0;
    for _ in 0..10 {
        acknowledged = ledger.next();
    }

    disk.is_broken(true);
    // The logs lie on that disk as well: what goes wrong has to be seen without them.
    let trouble = until("word of the disk", || {
        let reason = home.status("worn")["running"]["trouble"]["reason"]
            .as_str()?
            .to_owned();
        reason.contains("the host cannot").then_some(reason)
    });
    eprintln!("{trouble}");
    let data = home.vm_file("worn", "data.img");
    assert!(trouble.contains(data.to_str().expect("text")), "{trouble}");
    // The VM is there, for whoever wants to save something.
    assert_eq!(home.run(&["exec", "worn", "--", "echo", "ahoy"]).ok(), "ahoy");
    home.run(&["stop", "--force", "worn"]).ok();
    acknowledged = ledger.end().unwrap_or(acknowledged);
    let left = processes_of(home.path().to_str().expect("text"));
    assert_eq!(left, []);

    // As long as it is broken, a start says which file is concerned, and nothing is lost by it.
    let message = home.run(&["start", "worn"]).fails_with(1);
    eprintln!("{message}");
    assert!(
        message.contains(home.path().join("vms").to_str().expect("text")),
        "{message}"
    );
    // A VM whose engine is all that did not start still runs.
    home.run(&["stop", "--force", "worn"]).ok();

    disk.unmount();
    disk.is_broken(false);
    disk.mount();
    home.run(&["start", "worn"]).ok();
    let read = ["run", "--rm", "--network", "none", "-v", "ledger:/v", "sqlite"];
    let rows = docker.ok(&[&read[..], &["sqlite3", "/v/db", ledger::QUERY]].concat());
    ledger::check(&rows, acknowledged, "after the disk was broken");
    home.run(&["rm", "--force", "worn"]).ok();
    disk.end();
}
