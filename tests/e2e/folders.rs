//! Folders of the host in containers.

use super::Test;
use super::world::{Docker, Home, client_file, folder_in_home, is_long, shared, until, with_shared_home};
use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

pub const TESTS: &[Test] = &[
    ("the_home_folder_is_shared_by_default", home_is_shared),
    ("containers_that_mount_the_engines_socket_reach_it", sockets),
    ("folders_of_an_ordinary_user", folders_of_an_ordinary_user),
];

fn home_is_shared() {
    let docker = shared();
    let folder = folder_in_home();
    fs::write(folder.path().join("from-host"), "cargo").expect("write");
    let volume = format!("{}:/x", folder.path().display());
    let script = "cat /x/from-host; echo back > /x/from-container";
    assert_eq!(
        docker.ok(&["run", "--rm", "-v", &volume, "busybox", "sh", "-c", script]),
        "cargo"
    );
    let made = fs::read(folder.path().join("from-container")).expect("made by the container");
    assert_eq!(made, b"back\n");
}

/// As Testcontainers does. compose is a client of the engine that brings its own libraries.
fn sockets() {
    let docker = shared();
    let on_host = with_shared_home(|home| home.docker("shared")).socket();
    let programs = client_file("programs");
    for (number, path) in [on_host.as_str(), "/var/run/docker.sock"].into_iter().enumerate() {
        let name = format!("client{number}");
        let volume = format!("{path}:/var/run/docker.sock");
        let run = "DOCKER_HOST=unix:///var/run/docker.sock \
                   /programs/lib/ld-linux-x86-64.so.2 --library-path /programs/lib /programs/docker-compose ls -a";
        docker.ok(&[
            "create", "--name", &name, "-v", &volume, "busybox", "sh", "-c", run,
        ]);
        docker.ok(&["cp", &programs.to_string_lossy(), &format!("{name}:/programs")]);
        let listed = docker.ok(&["start", "-a", &name]);
        assert!(listed.starts_with("NAME"), "{listed}");
        docker.ok(&["rm", &name]);
    }
}

/// What a container does in a shared folder, as root. Any failure ends it.
const WORK: &str = r#"
set -e
cd /x
[ "$(cat from-host)" = cargo ]
[ "$(stat -c %u from-host)" = "$USER_ID" ]
echo hello > made
ln made hard
[ "$(stat -c %h hard)" = 2 ]
ln -s made soft
[ "$(cat soft)" = hello ]
ln -s /etc/hostname absolute
[ "$(cat absolute)" = "$(hostname)" ]
mkdir -p a/b
mv hard a/b/moved
mv a c
[ "$(cat c/b/moved)" = hello ]
truncate -s 5G sparse
echo end >> sparse
[ "$(stat -c %s sparse)" = 5368709124 ]
[ "$(tail -c 4 sparse)" = end ]
[ "$(du -k sparse | cut -f1)" -lt 100 ]
mkfifo pipe
echo through > pipe &
[ "$(cat pipe)" = through ]
mkdir many
for n in $(seq 300); do echo $n > many/$n; done
[ "$(ls many | wc -l)" = 300 ]
[ "$(cat many/* | sort -n | tail -n 1)" = 300 ]
rm -r many
mkdir data
touch data/read-only
chmod 400 data/read-only
chown -R 999:998 data
chmod 700 data
[ "$(stat -c %u:%g data data/read-only | sort -u)" = 999:998 ]
touch -d @86400 old
[ "$(stat -c %Y old)" = 86400 ]
echo all done
"#;

/// What the container's own account does in the folder that it was given, as a database does.
const OWN: &str = r#"
set -e
umask 077
cd /x/data
cat read-only
echo row > table
mkdir deep
echo more > deep/table
cat table deep/table
[ "$(stat -c %u:%g:%a table)" = 999:998:600 ]
[ "$(stat -c %u:%g:%a deep)" = 999:998:700 ]
echo all done
"#;

struct Case {
    home: Home,
    docker: Docker,
    work: PathBuf,
    fixed: PathBuf,
}

fn folders_of_an_ordinary_user() {
    let home = Home::of_ordinary_user(4711);
    let folder = |name: &str| {
        let folder = home.path().join(name);
        fs::create_dir(&folder).expect("make a folder");
        chown(&folder, Some(home.uid()), Some(home.uid())).expect("chown");
        folder
    };
    let (work, fixed) = (folder("work"), folder("fixed"));
    fs::write(work.join("from-host"), "cargo").expect("write");
    chown(work.join("from-host"), Some(home.uid()), None).expect("chown");
    fs::write(fixed.join("file"), "as it was").expect("write");
    let mounts = [work.display().to_string(), format!("{}:ro", fixed.display())];
    let size = ["start", "-c", "1", "-m", "1g", "-d", "4g", "folders"];
    let mounts = ["--mount", &mounts[0], "--mount", &mounts[1]];
    home.run(&[&size[..], &mounts].concat()).ok();
    let docker = home.docker("folders");
    docker.import("busybox");
    let case = Case {
        home,
        docker,
        work,
        fixed,
    };
    case.files();
    case.a_database();
    case.many_files();
    super::posix::check(&case.docker, &case.work);
    case.edits_are_seen();
    case.what_is_not_shared();
    case.read_only();
    case.home.run(&["stop", "folders"]).ok();
    case.home.run(&["rm", "--force", "folders"]).ok();
}

impl Case {
    fn files(&self) {
        let volume = format!("{}:/x", self.work.display());
        let user = format!("USER_ID={}", self.home.uid());
        let run = [
            "run", "--rm", "-e", &user, "-v", &volume, "busybox", "sh", "-c", WORK,
        ];
        assert_eq!(self.docker.ok(&run), "all done");
        let run = [
            "run", "--rm", "-u", "999:998", "-v", &volume, "busybox", "sh", "-c", OWN,
        ];
        assert_eq!(self.docker.ok(&run), "row\nmore\nall done");
        assert_eq!(fs::read(self.work.join("c/b/moved")).expect("moved"), b"hello\n");
        assert_eq!(
            fs::metadata(self.work.join("sparse")).expect("sparse").len(),
            (5 << 30) + 4
        );
        assert_eq!(
            fs::read(self.work.join("data/deep/table")).expect("table"),
            b"more\n"
        );
        assert_all_are_the_users(&self.work, self.home.uid());
    }

    /// SQLite's write-ahead log: shared memory by mmap, POSIX locks, fsync; and flock.
    fn a_database(&self) {
        self.docker.import("sqlite");
        let volume = format!("{}:/x", self.work.display());
        let write = "pragma journal_mode=wal; create table t(n); insert into t values(1),(2),(39); select sum(n) from t;";
        let run = |statement| {
            let run = [
                "run",
                "--rm",
                "-v",
                &volume,
                "sqlite",
                "/bin/sqlite3",
                "/x/db",
                statement,
            ];
            self.docker.ok(&run)
        };
        assert_eq!(run(write), "wal\n42");
        assert_eq!(run("select count(*) from t;"), "3");
        // The image has the libraries that the host's program needs.
        fs::copy("/usr/bin/flock", self.work.join("flock")).expect("copy");
        let script = "/x/flock /x/db sh -c 'if /x/flock -n /x/db true; then echo a second lock; fi'; \
                      /x/flock -n /x/db echo free";
        let locked = ["run", "--rm", "-v", &volume, "sqlite", "sh", "-c", script];
        assert_eq!(self.docker.ok(&locked), "free");
    }

    /// Many more than the monitor may have open at once.
    fn many_files(&self) {
        let many = self.work.join("many");
        let folders = if is_long() { 100 } else { 10 };
        for folder in 0..folders {
            let folder = many.join(folder.to_string());
            fs::create_dir_all(&folder).expect("make a folder");
            for file in 0..1000 {
                fs::write(folder.join(file.to_string()), "x").expect("write");
            }
        }
        let volume = format!("{}:/x", many.display());
        let script = "find /x -type f -size 1c | wc -l; find /x/1 /x/2 -type f -exec cat {} + | wc -c";
        let counted = self
            .docker
            .ok(&["run", "--rm", "-v", &volume, "busybox", "sh", "-c", script]);
        assert_eq!(counted, format!("{folders}000\n2000"));
    }

    fn edits_are_seen(&self) {
        let volume = format!("{}:/x", self.work.display());
        self.docker.ok(&[
            "run", "-d", "--name", "reader", "-v", &volume, "busybox", "sleep", "1000000",
        ]);
        let read = || self.docker.run(&["exec", "reader", "cat", "/x/from-host"]).stdout;
        assert_eq!(read(), "cargo");
        // Longer, and in a new file of that name, as editors write.
        fs::write(self.work.join("new"), "cargo and more").expect("write");
        fs::rename(self.work.join("new"), self.work.join("from-host")).expect("rename");
        until("the host's edit", || (read() == "cargo and more").then_some(()));
        fs::write(self.work.join("from-host"), "less").expect("write");
        until("the host's second edit", || (read() == "less").then_some(()));
        fs::remove_file(self.work.join("from-host")).expect("remove");
        until("the removal", || read().is_empty().then_some(()));
        self.docker.ok(&["rm", "-f", "reader"]);
    }

    fn what_is_not_shared(&self) {
        let beside = self.home.path().join("not-shared");
        fs::create_dir(&beside).expect("make a folder");
        for path in [
            &beside.display().to_string(),
            "/srv/nothing",
            "/tmp/nothing",
            "/etc/localtime",
        ] {
            let volume = format!("{path}:/x");
            let refused = self
                .docker
                .run(&["run", "--rm", "-v", &volume, "busybox", "ls", "/x"])
                .fails_with(125);
            assert!(
                refused.contains(path) && refused.contains("read-only file system"),
                "{refused}"
            );
        }
        let mount = [
            "run",
            "--rm",
            "--mount",
            "type=bind,source=/srv/nothing,target=/x",
            "busybox",
            "true",
        ];
        let refused = self.docker.run(&mount).fails_with(125);
        assert!(
            refused.contains("bind source path does not exist: /srv/nothing"),
            "{refused}"
        );
        // In a shared folder it is made, as by any engine.
        let volume = format!("{}/made-by-docker:/x", self.work.display());
        self.docker
            .ok(&["run", "--rm", "-v", &volume, "busybox", "touch", "/x/file"]);
        assert!(self.work.join("made-by-docker/file").exists());
    }

    /// The guest's root can change its own mounts, and not the host's mind.
    fn read_only(&self) {
        let fixed = self.fixed.display().to_string();
        let volume = format!("{fixed}:/x");
        let script = "cat /x/file; touch /x/new || rm /x/file || echo x > /x/file";
        let ran = self
            .docker
            .run(&["run", "--rm", "-v", &volume, "busybox", "sh", "-c", script]);
        assert_eq!(ran.stdout, "as it was");
        ran.fails_with(1);
        let script = format!(
            "mount -o remount,rw '{fixed}' && echo remounted && cd '{fixed}' && {{ touch new; rm file; \
                              echo x > file; chmod 777 file; mkdir folder; mv file other; }}"
        );
        let ran = self.home.run(&["exec", "folders", "--", "sh", "-c", &script]);
        assert_eq!((ran.code(), ran.stdout.trim()), (1, "remounted"), "{ran:?}");
        assert_eq!(fs::read(self.fixed.join("file")).expect("file"), b"as it was");
        assert_eq!(fs::read_dir(&self.fixed).expect("fixed").count(), 1);
    }
}

fn assert_all_are_the_users(folder: &Path, uid: u32) {
    for entry in fs::read_dir(folder).expect("list") {
        let path = entry.expect("list").path();
        let metadata = fs::symlink_metadata(&path).expect("stat");
        assert_eq!(metadata.uid(), uid, "{}", path.display());
        if metadata.is_dir() {
            assert_all_are_the_users(&path, uid);
        }
    }
}
