//! What the host must have, and what the user is told when it has not.

use super::Test;
use super::world::{Home, Ran, Running, programs, with_shared_home};
use rustix::fs::chown;
use rustix::process::{Gid, Uid};
use std::path::PathBuf;
use std::process::Command;

pub const TESTS: &[Test] = &[
    ("doctor_tells_whether_linux_runs_here", doctor),
    ("a_host_without_kvm_is_told_what_to_turn_on", no_kvm),
    (
        "a_user_who_may_not_use_kvm_is_told_which_group_to_join",
        no_permission,
    ),
    ("a_user_in_the_kvm_group_needs_nothing_else", kvm_group),
];

/// On a good host it says so, and a VM runs; on one whose KVM only interprets, so do it and `start`.
fn doctor() {
    let home = Home::new();
    let report = home.run(&["doctor", "--json"]);
    let checks: serde_json::Value = serde_json::from_str(&report.stdout).expect("JSON");
    let guests = checks["checks"]
        .as_array()
        .and_then(|checks| checks.iter().find(|check| check["name"] == "KVM guests"))
        .unwrap_or_else(|| panic!("no verdict on guests in {checks}"));
    if guests["verdict"] == "good" {
        assert_eq!(checks["healthy"], true, "{checks}");
        report.ok();
        with_shared_home(|home| assert_eq!(home.status("shared")["state"], "running"));
        return;
    }
    assert_eq!(report.code(), 1);
    let fix = guests["fix"].as_str().expect("a fix");
    assert!(fix.contains("VT-x or AMD-V"), "{fix}");
    let message = home.run(&["start", "-m", "512m", "here"]).fails_with(1);
    assert!(message.contains("KVM does not run the guest's code"), "{message}");
    home.run(&["rm", "--force", "here"]).ok();
}

/// No user of this system, and the group that owns their /dev/kvm.
const USER: u32 = 64_123;
const KVM_GROUP: u32 = 64_124;

/// A user with a home of their own, and a /dev of their own.
struct Guest {
    home: Home,
    /// Shell command that makes /dev/kvm.
    device: String,
    groups: String,
}

impl Guest {
    fn new(device: &str, groups: &str) -> Self {
        let home = Home::new();
        // The programs may lie where only their owner may look.
        let bin = home.path().join("bin");
        std::fs::create_dir(&bin).expect("make a folder");
        for name in ["lighter", "lighter-vmm"] {
            std::fs::copy(programs().join(name), bin.join(name)).expect("copy a program");
        }
        chown(home.path(), Some(Uid::from_raw(USER)), Some(Gid::from_raw(USER))).expect("give the home away");
        Self {
            home,
            device: device.into(),
            groups: groups.into(),
        }
    }

    /// Kernel and image where they are looked for without being told.
    fn install_artifacts(&self) {
        let folder = self.home.path().join("artifacts");
        std::fs::create_dir(&folder).expect("make a folder");
        for (variable, name) in [("LIGHTER_KERNEL", "vmlinux"), ("LIGHTER_IMAGE", "rootfs.erofs")] {
            let file = PathBuf::from(std::env::var_os(variable).expect("set by scripts/test"));
            std::fs::copy(file, folder.join(name)).expect("copy a file");
        }
    }

    fn lighter(&self, arguments: &[&str]) -> Ran {
        let script = format!(
            "mount -t tmpfs dev /dev
            mknod -m 666 /dev/null c 1 3
            mknod -m 666 /dev/urandom c 1 9
            {}
            groups=$1
            shift
            exec setpriv --reuid {USER} --regid {USER} $groups --no-new-privs -- \"$@\"",
            self.device
        );
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--", "sh", "-ec", &script, "sh", &self.groups])
            .arg(self.home.path().join("bin/lighter"))
            .args(arguments)
            .current_dir("/")
            .env("HOME", self.home.path())
            .env("LIGHTER_HOME", self.home.path())
            .env_remove("LIGHTER_KERNEL")
            .env_remove("LIGHTER_IMAGE")
            .env_remove("XDG_RUNTIME_DIR");
        Running::start(&mut command, b"").wait()
    }

    /// What `start` and `doctor` say about a KVM that cannot be used; nothing is left running.
    fn refused(&self) -> [String; 2] {
        let start = self.lighter(&["start"]).fails_with(1);
        assert_eq!(self.lighter(&["status"]).code(), 3);
        let sockets = std::fs::read_dir(self.home.path().join("run")).expect("run");
        assert_eq!(sockets.count(), 0);
        self.lighter(&["rm", "--force"]).ok();
        let doctor = self.lighter(&["doctor"]);
        assert_eq!(doctor.code(), 1);
        [start, doctor.stdout]
    }
}

fn no_kvm() {
    let [start, doctor] = Guest::new("", "--clear-groups").refused();
    assert!(
        start.contains("cannot open /dev/kvm") && start.contains("firmware"),
        "{start}"
    );
    assert!(
        doctor.contains("/dev/kvm is not there") && doctor.contains("firmware"),
        "{doctor}"
    );
}

/// /dev/kvm as udev makes it.
fn device_of_group() -> String {
    format!("mknod -m 660 /dev/kvm c 10 232; chgrp {KVM_GROUP} /dev/kvm")
}

fn no_permission() {
    let [start, doctor] = Guest::new(&device_of_group(), "--clear-groups").refused();
    assert!(
        start.contains("cannot open /dev/kvm") && start.contains("usermod -aG"),
        "{start}"
    );
    // A group without a name goes by its number.
    assert!(doctor.contains(&format!("usermod -aG {KVM_GROUP}")), "{doctor}");
}

fn kvm_group() {
    let user = Guest::new(&device_of_group(), &format!("--groups={KVM_GROUP}"));
    user.install_artifacts();
    user.lighter(&["start", "-c", "1", "-m", "1g", "mine"]).ok();
    let exports = user.lighter(&["env", "mine"]).ok();
    assert!(
        exports.contains(&*user.home.path().to_string_lossy()),
        "{exports}"
    );
    assert!(user.home.docker("mine").ok(&["version"]).contains("26.1"));
    assert_eq!(user.lighter(&["exec", "mine", "--", "id", "-u"]).ok(), "0");
    user.lighter(&["stop", "mine"]).ok();
    user.lighter(&["rm", "--force", "mine"]).ok();
}
