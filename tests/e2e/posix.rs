//! What POSIX says of files, in a shared folder: pjdfstest, run there and on the VM's own disk.

use super::world::Docker;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A test of pjdfstest names two users whom it becomes.
const PREPARE: &str = "\
    echo nobody:x:65534:65534::/:/bin/sh >> /etc/passwd; echo nobody:x:65534: >> /etc/group; \
    echo tests:x:1001:1001::/:/bin/sh >> /etc/passwd; echo tests:x:1001: >> /etc/group; ";

const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nobody"], ["tests", "tests"]]
"#;

/// What a shared folder is to do otherwise: what root makes shows as the user's own.
const OTHERWISE: [&str; 4] = [
    "mkdir::uid_gid_eq_euid_egid",
    "mkfifo::uid_gid_eq_euid_egid",
    "mknod::uid_gid_eq_euid_egid",
    "open::uid_gid_eq_euid_egid",
];

/// Runs it in `folder`, which is shared and belongs to the user whose VM it is.
pub fn check(docker: &Docker, folder: &Path) {
    docker.import("posix");
    fs::write(folder.join("pjdfstest.toml"), CONFIGURATION).expect("write");
    let volume = format!("{}:/shared", folder.display());
    let run = |place: &str| {
        let script = format!(
            "{PREPARE} mkdir -p {place}; chmod 755 {place}; \
             pjdfstest -c /shared/pjdfstest.toml -p {place} -s /other; rm /shared/pjdfstest.toml"
        );
        let volumes = ["-v", &volume, "-v", "/own", "-v", "/other"];
        let run = [&["run", "--rm"][..], &volumes, &["posix", "sh", "-c", &script]];
        Outcome::of(&docker.run(&run.concat()).stdout)
    };
    let own = run("/own/posix");
    assert_eq!(own.failed, BTreeSet::new(), "on the VM's own disk");
    fs::write(folder.join("pjdfstest.toml"), CONFIGURATION).expect("write");
    let shared = run("/shared/posix");
    assert_eq!(shared.run, own.run);
    // Device files cannot be made there.
    let others: BTreeSet<&str> = shared
        .failed
        .iter()
        .map(String::as_str)
        .filter(|name| !name.ends_with("::block") && !name.ends_with("::char"))
        .collect();
    assert_eq!(others, BTreeSet::from(OTHERWISE), "in a shared folder");
}

struct Outcome {
    /// How many tests there were.
    run: usize,
    failed: BTreeSet<String>,
}

impl Outcome {
    /// Of what pjdfstest printed: a line `NAME ok`, `NAME FAILED` or `NAME skipped` for each test, and what it was that failed.
    fn of(output: &str) -> Self {
        let mut run = 0;
        let mut failed = BTreeSet::new();
        for line in output.lines() {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                [_, "ok" | "skipped"] => run += 1,
                [name, "FAILED"] => {
                    run += 1;
                    failed.insert(name.to_owned());
                }
                _ => {}
            }
        }
        assert!(run > 300, "pjdfstest did not run:\n{output}");
        Self { run, failed }
    }
}
