//! Changes that the host makes in shared folders, as programs in containers hear of them by inotify.

use super::Test;
use super::world::{Docker, folder_in_home, shared, until};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub const TESTS: &[Test] = &[
    ("what_the_host_changes_wakes_watchers", changes),
    ("what_a_container_changes_is_told_once", once),
    ("a_watched_file_that_is_replaced_is_told", replaced),
];

/// A container that tells what happens in a folder of the host's.
struct Watcher {
    docker: Docker,
    name: &'static str,
    folder: TempDir,
    probes: u32,
}

impl Watcher {
    /// Watches `what` of the folder (`-r`: and what is below), which `prepare` has filled, by inotifywait.
    fn start(name: &'static str, what: &str, prepare: impl FnOnce(&Path)) -> Self {
        let docker = shared();
        docker.import("watch");
        let folder = folder_in_home();
        prepare(folder.path());
        let volume = format!("{}:/x", folder.path().display());
        let script = format!(
            "inotifywait -m --format '%w %e %f' -e modify,attrib,close_write,create,delete,move,delete_self {what} 2>&1"
        );
        docker.ok(&[
            "run", "-d", "--name", name, "-v", &volume, "watch", "sh", "-c", &script,
        ]);
        docker.wait_for_log(name, "Watches established.");
        Self {
            docker,
            name,
            folder,
            probes: 0,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        self.docker.run(&["logs", self.name]).stdout
    }

    /// Changes something in `folder` until it is told: the host hears of a watch a moment after the guest has it. Everything
    /// before was told then.
    fn wait_in(&mut self, folder: &str) {
        until("an event of the host's", || {
            self.probes += 1;
            let name = format!("probe-{}", self.probes);
            fs::create_dir(self.path(folder).join(&name)).expect("make a folder");
            fs::remove_dir(self.path(folder).join(&name)).expect("remove it");
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while std::time::Instant::now() < deadline {
                if self.log().contains(&format!("DELETE,ISDIR {name}\n")) {
                    return Some(());
                }
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            None
        });
    }

    /// What was told since the last call, without what was done to wait.
    fn told(&mut self, folder: &str, seen: &mut usize) -> Vec<String> {
        self.wait_in(folder);
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let new = lines[*seen..].iter().filter(|line| !line.contains("probe-"));
        let new = new.map(|line| line.trim().to_owned()).collect();
        *seen = lines.len();
        new
    }

    fn end(self) {
        self.docker.ok(&["rm", "-f", self.name]);
    }
}

fn changes() {
    let mut watcher = Watcher::start("changes", "-r /x", |folder| {
        fs::create_dir(folder.join("deep")).expect("make a folder");
    });
    let seen = &mut 0;
    watcher.told("deep", seen);
    watcher.told(".", seen);

    fs::write(watcher.path("a file"), "x").expect("write");
    let written = [
        "/x/ CREATE a file",
        "/x/ MODIFY a file",
        "/x/ CLOSE_WRITE,CLOSE a file",
    ];
    assert_eq!(watcher.told(".", seen), written);

    fs::set_permissions(watcher.path("a file"), Permissions::from_mode(0o600)).expect("chmod");
    fs::rename(watcher.path("a file"), watcher.path("deep/moved")).expect("rename");
    let moved = [
        "/x/ ATTRIB a file",
        "/x/ MOVED_FROM a file",
        "/x/deep/ MOVED_TO moved",
    ];
    assert_eq!(watcher.told(".", seen), moved);

    fs::remove_file(watcher.path("deep/moved")).expect("remove");
    assert_eq!(watcher.told(".", seen), ["/x/deep/ DELETE moved"]);

    // The container watches a new folder when it hears of it.
    fs::create_dir(watcher.path("new")).expect("make a folder");
    assert_eq!(watcher.told("new", seen), ["/x/ CREATE,ISDIR new"]);
    fs::write(watcher.path("new/file"), "").expect("write");
    let written = ["/x/new/ CREATE file", "/x/new/ CLOSE_WRITE,CLOSE file"];
    assert_eq!(watcher.told("new", seen), written);

    fs::remove_dir_all(watcher.path("new")).expect("remove");
    let mut removed = watcher.told(".", seen);
    removed.sort();
    let all = [
        "/x/ DELETE,ISDIR new",
        "/x/new/ DELETE file",
        "/x/new/ DELETE_SELF",
    ];
    assert_eq!(removed, all);
    watcher.end();
}

/// The host sees what containers do, too, and must not tell them again.
fn once() {
    let mut watcher = Watcher::start("once", "/x", |_| {});
    let seen = &mut 0;
    watcher.told(".", seen);
    let script = "cd /x; echo x > a; echo y >> a; mkdir folder; mv a b; chmod 600 b; rm b; rmdir folder";
    for user in ["root", "999"] {
        watcher
            .docker
            .ok(&["exec", "-u", "root", "once", "chmod", "777", "/x"]);
        watcher.told(".", seen);
        watcher
            .docker
            .ok(&["exec", "-u", user, "once", "sh", "-c", script]);
        let told = [
            "/x/ CREATE a",
            "/x/ MODIFY a",
            "/x/ CLOSE_WRITE,CLOSE a",
            "/x/ MODIFY a",
            "/x/ CLOSE_WRITE,CLOSE a",
            "/x/ CREATE,ISDIR folder",
            "/x/ MOVED_FROM a",
            "/x/ MOVED_TO b",
            "/x/ ATTRIB b",
            "/x/ DELETE b",
            "/x/ DELETE,ISDIR folder",
        ];
        assert_eq!(watcher.told(".", seen), told, "{user}");
    }
    // What the host does to the same file is told.
    fs::write(watcher.path("a"), "x").expect("write");
    let written = ["/x/ CREATE a", "/x/ MODIFY a", "/x/ CLOSE_WRITE,CLOSE a"];
    assert_eq!(watcher.told(".", seen), written);
    watcher.end();
}

fn replaced() {
    let mut watcher = Watcher::start("replaced", "/x/file /x/beside", |folder| {
        fs::write(folder.join("file"), "x").expect("write");
        fs::create_dir(folder.join("beside")).expect("make a folder");
    });
    let seen = &mut 0;
    watcher.told("beside", seen);
    fs::write(watcher.path("file"), "y").expect("write");
    let mut written = watcher.told("beside", seen);
    // It is cut off, then written.
    written.dedup();
    assert_eq!(written, ["/x/file MODIFY", "/x/file CLOSE_WRITE,CLOSE"]);
    fs::write(watcher.path("new"), "z").expect("write");
    fs::rename(watcher.path("new"), watcher.path("file")).expect("rename");
    assert_eq!(
        watcher.told("beside", seen),
        ["/x/file ATTRIB", "/x/file DELETE_SELF"]
    );
    watcher.end();
}
