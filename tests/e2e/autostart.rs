//! VMs that systemd starts: the real one of an ordinary user, `systemd --user`.

use super::Test;
use super::world::{Home, Ran, Running, SMALL, until};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

pub const TESTS: &[Test] = &[(
    "systemd_starts_vms_at_the_first_connection_and_with_the_session",
    autostart,
)];

/// No user of this system.
const USER: u32 = 64_125;

/// Where systemd of a distribution is.
const SYSTEMD: &str = "/usr/lib/systemd/systemd";

/// The session of an ordinary user: their systemd.
struct Session {
    home: Home,
    runtime: PathBuf,
    config: PathBuf,
    /// Its systemd, where that is not the real user's own.
    systemd: Option<Child>,
    /// How often they have logged in.
    logins: u32,
}

impl Session {
    fn begin() -> Self {
        let home = Home::of_ordinary_user(USER);
        let uid = home.uid();
        let mut session = Self {
            runtime: format!("/run/user/{uid}").into(),
            config: home.path().join("config"),
            systemd: None,
            logins: 0,
            home,
        };
        if uid == USER {
            for folder in [&session.runtime, &session.config] {
                std::fs::create_dir_all(folder).expect("make a folder");
                chown(folder, Some(uid), Some(uid)).expect("chown");
                std::fs::set_permissions(folder, PermissionsExt::from_mode(0o700)).expect("chmod");
            }
            session.log_in();
        }
        session
    }

    /// As a login does it: a cgroup of the user's own, and a systemd in it.
    fn log_in(&mut self) {
        // By this, systemd knows that a systemd is in charge of the host.
        std::fs::create_dir_all("/run/systemd/system").expect("make a folder");
        self.logins += 1;
        let cgroup = format!("/sys/fs/cgroup/user-{USER}-{}", self.logins);
        std::fs::create_dir_all(&cgroup).expect("make a cgroup");
        for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(Path::new(&cgroup).join(file), Some(USER), Some(USER)).expect("chown");
        }
        let kvm = std::fs::metadata("/dev/kvm").expect("/dev/kvm").gid();
        let enter = format!("echo 0 > {cgroup}/cgroup.procs && exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &enter, "sh", "setpriv"]);
        command.args([format!("--reuid={USER}"), format!("--regid={USER}")]);
        command.arg(format!("--groups={kvm}"));
        command.args([SYSTEMD, "--user", "--log-target=console", "--log-level=notice"]);
        self.environment(&mut command);
        let child = command
            .env("HOME", self.home.path())
            .stdin(Stdio::null())
            .process_group(0)
            .spawn();
        let mut systemd = child.expect("start systemd");
        until("answer of systemd", || {
            let ended = systemd.try_wait().expect("look after systemd");
            assert_eq!(ended, None, "systemd has ended");
            (self.systemctl(&["is-system-running"]).stdout.trim() == "running").then_some(())
        });
        self.systemd = Some(systemd);
    }

    fn log_out(&mut self) {
        if let Some(mut systemd) = self.systemd.take() {
            kill_process(Pid::from_child(&systemd), Signal::TERM).expect("signal systemd");
            systemd.wait().expect("wait for systemd");
        } else {
            self.systemctl(&["stop", SERVICE, SOCKET]);
        }
    }

    fn environment(&self, command: &mut Command) {
        command.env("XDG_RUNTIME_DIR", &self.runtime);
        command.env_remove("DBUS_SESSION_BUS_ADDRESS");
        if self.home.uid() == USER {
            command.env("XDG_CONFIG_HOME", &self.config);
        }
    }

    fn lighter(&self, arguments: &[&str]) -> Ran {
        let mut command = self.home.lighter(arguments);
        self.environment(&mut command);
        Running::start(&mut command, b"").wait()
    }

    fn systemctl(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new("setpriv");
        if self.home.uid() == USER {
            command.args([format!("--reuid={USER}"), format!("--regid={USER}")]);
            command.arg("--clear-groups");
        }
        command.args(["--", "systemctl", "--user"]).args(arguments);
        self.environment(&mut command);
        Running::start(&mut command, b"").wait()
    }

    /// What systemd says of a unit.
    fn property(&self, unit: &str, name: &str) -> String {
        let property = format!("--property={name}");
        self.systemctl(&["show", &property, "--value", unit]).ok()
    }

    fn is(&self, unit: &str, state: &str) -> bool {
        self.property(unit, "ActiveState") == state
    }

    fn supervisor(&self) -> String {
        let status: serde_json::Value =
            serde_json::from_str(&self.lighter(&["status", "--json", VM]).stdout).expect("JSON");
        status["running"]["supervisor_pid"].to_string()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.log_out();
    }
}

const VM: &str = "web.e2e";
const SERVICE: &str = "lighter-web.e2e.service";
const SOCKET: &str = "lighter-web.e2e.socket";

fn autostart() {
    let mut session = Session::begin();
    session.lighter(&[&["create", VM], &SMALL[..]].concat()).ok();
    session
        .lighter(&["autostart", "enable", "--on-demand", "--no-context", VM])
        .ok();
    let socket = session.home.path().join("run").join(VM).join("docker.sock");
    let mode = std::fs::metadata(&socket).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(session.is(SOCKET, "active") && session.is(SERVICE, "inactive"));
    assert!(session.lighter(&["ls"]).ok().contains("stopped, wakes"));
    let rows = session.lighter(&["autostart", "ls"]).ok();
    assert!(
        rows.contains("at the first connection") && rows.contains("active"),
        "{rows}"
    );

    // Who comes first waits, and so does who comes next.
    let docker = session.home.docker(VM);
    let clients = [0, 1].map(|_| docker.start(&["version"], b""));
    for client in clients {
        assert!(client.wait().ok().contains("26.1"));
    }
    assert!(session.is(SERVICE, "active"));
    assert_eq!(session.property(SERVICE, "MainPID"), session.supervisor());
    assert_eq!(session.property(SERVICE, "StatusText"), "the engine answers");

    // One that crashes is started again, on the same socket.
    let pid: i32 = session.property(SERVICE, "MainPID").parse().expect("a number");
    kill_process(Pid::from_raw(pid).expect("a process"), Signal::KILL).expect("kill");
    assert!(docker.ok(&["version"]).contains("26.1"));
    assert_ne!(session.supervisor(), pid.to_string());

    // One that is stopped is started by whoever comes, and by `start`, in either case by systemd.
    let stopped = session.lighter(&["stop", VM]);
    assert!(
        stopped.stderr.contains("when its docker.sock is used"),
        "{stopped:?}"
    );
    assert!(socket.exists() && session.is(SOCKET, "active") && session.is(SERVICE, "inactive"));
    session.lighter(&["start", "--no-context", VM]).ok();
    assert_eq!(session.property(SERVICE, "MainPID"), session.supervisor());
    assert!(docker.ok(&["version"]).contains("26.1"));

    // The end of the session shuts it down.
    session.log_out();
    let ended = session.lighter(&["status", "--json", VM]).stdout;
    let ended: serde_json::Value = serde_json::from_str(&ended).expect("JSON");
    assert_eq!(ended["last_end"]["reason"]["reason"], "power-off", "{ended}");
    assert_eq!(ended["last_end"]["requested"], true, "{ended}");

    // Without systemd there is no start, nor a fight about the socket.
    if session.home.uid() == USER {
        let refused = session.lighter(&["start", VM]).fails_with(1);
        assert!(
            refused.contains("does not answer") && refused.contains("autostart disable"),
            "{refused}"
        );
        session.log_in();
        assert!(socket.exists() && session.is(SOCKET, "active"));
    }

    // With the session: its socket is its own again, and it is there without anybody's connection.
    session.lighter(&["autostart", "disable", VM]).ok();
    assert!(!socket.exists());
    assert_eq!(session.property(SOCKET, "LoadState"), "not-found");
    session.lighter(&["autostart", "enable", "--no-context", VM]).ok();
    if session.home.uid() == USER {
        session.log_out();
        session.log_in();
    } else {
        session.systemctl(&["start", SERVICE]).ok();
    }
    assert!(session.is(SERVICE, "active"));
    assert!(docker.ok(&["version"]).contains("26.1"));

    // Nothing is left of it.
    session.lighter(&["rm", "--force", VM]).ok();
    assert!(!socket.exists());
    assert_eq!(session.property(SERVICE, "LoadState"), "not-found");
    assert_eq!(session.lighter(&["autostart", "ls", "--json"]).ok(), "[]");
}
