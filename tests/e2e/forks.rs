//! Forks of an application that is at work: a web server, a cache, and a database that is written to all the time.
//!
//! The long form takes eight at once, and then forks of forks, which are also stopped and booted. That takes more memory than the
//! emulated machine has otherwise: `scripts/with-kvm --memory 16384`.

use super::applications::{answer, connect, get};
use super::world::{Docker, Home, is_long, until};
use lighter_disk::Chain;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;

/// The files that a disk has at the most.
const MOST_FILES: usize = 8;

/// Writes a row a second, each by a transaction of its own.
const WRITE: &str =
    "while :; do echo 'insert into log default values;'; sleep 1; done | su postgres -c 'psql -q'";

/// What is different in every VM, by commands.
const OWN: &[&str] = &[
    "hostname",
    "cat /etc/machine-id",
    "cat /sys/class/net/eth0/address",
    "cat /var/lib/docker/engine-id",
    "cat /proc/sys/kernel/random/uuid",
];

fn sql(docker: &Docker, statement: &str) -> String {
    let psql = format!("psql -Atc \"{statement}\"");
    docker.ok(&["exec", "project-db-1", "su", "postgres", "-c", &psql])
}

/// How many rows the writer has written. None is missing among them.
fn rows(docker: &Docker) -> u64 {
    let told = sql(docker, "select count(*), coalesce(max(id), 0) from log");
    let (count, last) = told.split_once('|').expect("two numbers");
    assert_eq!(count, last, "rows are missing");
    count.parse().expect("a number")
}

/// One VM with the application.
struct Copy<'a> {
    home: &'a Home,
    name: String,
    docker: Docker,
}

impl<'a> Copy<'a> {
    fn new(home: &'a Home, name: &str) -> Self {
        Self {
            home,
            name: name.to_owned(),
            docker: home.docker(name),
        }
    }

    /// Where the web server is published.
    fn port(&self) -> u16 {
        until("published port", || {
            let listed = self.home.run(&["ports", "--json", &self.name]).ok();
            let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
            let host = listed[0]["host"].as_str()?.to_owned();
            host.rsplit_once(':')?.1.parse().ok()
        })
    }

    /// Visits the web server; returns how many visits there were.
    fn visit(&self) -> u64 {
        let answer = get(self.port());
        assert_eq!(answer["counted"], answer["written"], "{}: {answer}", self.name);
        assert_eq!(answer["greeting"], "changed", "{}: {answer}", self.name);
        answer["written"].as_u64().expect("a number")
    }

    /// Has the database hold this VM's name, and no other's.
    fn mark(&self, with: &[&str]) {
        sql(
            &self.docker,
            &format!("insert into marks values ('{}')", self.name),
        );
        let marks = sql(&self.docker, "select name from marks order by name");
        assert_eq!(marks.lines().collect::<Vec<_>>(), with);
    }

    /// Of what the database has complained.
    fn complaints(&self) -> Vec<String> {
        let log = self.docker.run(&["logs", "project-db-1"]).stderr;
        let is_bad = |line: &&str| ["ERROR", "FATAL", "PANIC"].iter().any(|word| line.contains(word));
        log.lines().filter(is_bad).map(str::to_owned).collect()
    }

    /// Has `e2fsck` look at the disk of the stopped VM, all of whose files are made one for that.
    fn disk_is_sound(&self) {
        let disk = self.home.vm_file(&self.name, "data.img");
        let list =
            std::fs::read_to_string(self.home.vm_file(&self.name, "disk.json")).expect("a disk of layers");
        let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
        let layers = list["layers"].as_array().expect("numbers").iter();
        let layers: Vec<_> = layers
            .map(|number| File::open(disk.with_extension(format!("img.{number}"))).map(Arc::new))
            .collect::<Result<_, _>>()
            .expect("the layers");
        let count = layers.len() + 1;
        assert!(count <= MOST_FILES, "the disk of {} has {count} files", self.name);
        let base = Arc::new(File::open(&disk).expect("the base"));
        let chain = Chain::open(base, layers).expect("a chain");
        let flat = self.home.path().join("flat");
        let file = File::create(&flat).expect("make a file");
        file.set_len(chain.size()).expect("set its length");
        for extent in chain.extents().expect("what is not zeros") {
            let mut bytes = vec![0; (extent.end - extent.start) as usize];
            chain.read_at(&mut bytes, extent.start).expect("read");
            file.write_all_at(&bytes, extent.start).expect("write");
        }
        let mut check = Command::new("e2fsck");
        check.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        let checked = check.arg("-fn").arg(&flat).output().expect("e2fsck");
        assert!(checked.status.success(), "{}: {checked:?}", self.name);
        std::fs::remove_file(&flat).expect("remove");
        eprintln!("the disk of {} is sound, and of {count} files", self.name);
    }

    /// Forks it; returns the forks. Each has what was written by then, goes on, and is somebody else.
    fn fork(&self, count: usize, prefix: &str) -> Vec<Copy<'a>> {
        let (visits, rows_before) = (self.visit(), rows(&self.docker));
        let number = count.to_string();
        let fork = ["fork", &self.name, "-n", &number, "--as", prefix, "--no-context"];
        let names = self.home.run(&fork).ok();
        let forks: Vec<Copy<'a>> = names.lines().map(|name| Copy::new(self.home, name)).collect();
        assert_eq!(forks.len(), count);
        eprintln!("{} has forks: {names:?}", self.name);
        for fork in &forks {
            assert_eq!(fork.visit(), visits + 1, "{}", fork.name);
            let rows_there = rows(&fork.docker);
            assert!(rows_there >= rows_before, "{rows_there} of {rows_before}");
            until("another row", || (rows(&fork.docker) > rows_there).then_some(()));
            fork.clock_is_right();
            eprintln!("{} goes on behind row {rows_there}", fork.name);
        }
        forks
    }

    fn own(&self) -> Vec<String> {
        // Not each of them ends its line.
        let script = OWN.join("; echo; ");
        let told = self
            .home
            .run(&["exec", &self.name, "--", "sh", "-c", &script])
            .ok();
        let lines = told.lines().filter(|line| !line.is_empty());
        lines.map(str::to_owned).collect()
    }

    fn clock_is_right(&self) {
        until("clock within 100 ms", || {
            let offset = self.home.status(&self.name)["running"]["clock_offset_ns"].as_i64()?;
            (offset.abs() < 100_000_000).then_some(())
        });
    }
}

/// Forks VM `name`, in which the application runs, and removes it.
pub fn fork(home: &Home, name: &str) {
    let source = Copy::new(home, name);
    sql(&source.docker, "create table log (id serial)");
    sql(&source.docker, "create table marks (name text)");
    source
        .docker
        .ok(&["exec", "-d", "project-db-1", "sh", "-c", WRITE]);
    until("first row", || (rows(&source.docker) > 0).then_some(()));
    eprintln!("rows are written");
    let complaints = source.complaints();
    // A visitor who has come and not asked yet.
    let visitor = connect(source.port());
    let forks = source.fork(if is_long() { 8 } else { 2 }, "f");
    for fork in &forks {
        fork.mark(&[&fork.name]);
        assert_eq!(fork.complaints(), complaints, "{}", fork.name);
    }
    // The source has seen nothing of it.
    assert_eq!(answer(visitor)["greeting"], "changed");
    source.mark(&[name]);
    assert_eq!(source.complaints(), complaints);
    let rows_there = rows(&source.docker);
    until("another row", || {
        (rows(&source.docker) > rows_there).then_some(())
    });
    let restarts = "{{.Name}} {{.RestartCount}} {{.State.Health.Status}}";
    let state = source.docker.ok(&[
        "inspect",
        "-f",
        restarts,
        "project-db-1",
        "project-cache-1",
        "project-web-1",
    ]);
    assert!(state.lines().all(|line| line.ends_with(" 0 healthy")), "{state}");
    are_different(forks.iter().chain([&source]));
    home.run(&["rm", "--force", name]).ok();

    for fork in &forks {
        fork.visit();
    }
    if is_long() {
        return fork_forks(home, forks);
    }
    home.run(&["stop", &forks[0].name]).ok();
    forks[0].disk_is_sound();
}

/// Each is somebody else.
fn are_different<'a>(copies: impl Iterator<Item = &'a Copy<'a>>) {
    let owns: Vec<Vec<String>> = copies.map(Copy::own).collect();
    for (index, what) in OWN.iter().enumerate() {
        let different: BTreeSet<&String> = owns.iter().map(|own| &own[index]).collect();
        assert_eq!(different.len(), owns.len(), "{what}: {different:?}");
    }
}

/// A fork of a fork of a fork.
fn fork_forks(home: &Home, forks: Vec<Copy<'_>>) {
    let mut forks = forks.into_iter();
    let first = forks.next().expect("a fork");
    for rest in forks {
        home.run(&["rm", "--force", &rest.name]).ok();
    }
    let second = first.fork(1, "g").remove(0);
    second.mark(&["f-1", "g-1"]);
    are_different([&first, &second].into_iter());
    home.run(&["rm", "--force", "f-1"]).ok();
    let third = second.fork(1, "h").remove(0);
    third.mark(&["f-1", "g-1", "h-1"]);
    are_different([&second, &third].into_iter());
    second.visit();
    home.run(&["stop", "g-1"]).ok();
    second.disk_is_sound();
    home.run(&["rm", "--force", "g-1"]).ok();
    // Its disk is as good as it was: it boots from it, and the data is there.
    let written = third.visit();
    let rows_there = rows(&third.docker);
    home.run(&["stop", "h-1"]).ok();
    third.disk_is_sound();
    home.run(&["start", "h-1", "--no-context"]).ok();
    third.docker.ok(&["start", "project-db-1"]);
    until("database", || {
        let ready = ["exec", "project-db-1", "/usr/lib/postgresql/17/bin/pg_isready"];
        third.docker.run(&ready).status.success().then_some(())
    });
    assert!(rows(&third.docker) >= rows_there);
    assert_eq!(
        sql(&third.docker, "select count(*) from visits"),
        written.to_string()
    );
    home.run(&["rm", "--force", "h-1"]).ok();
}
