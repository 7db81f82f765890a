//! A VM by the command line, the docker CLI pointed to it, and programs with deadlines.

use super::watch;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// A program that has not ended by then hangs. The emulated machine is up to sixty times slower than hardware.
pub const PATIENCE: Duration = Duration::from_secs(1800);

/// Options of a VM as small as an engine runs in.
pub const SMALL: [&str; 7] = ["-c", "1", "-m", "512m", "-d", "2g", "--no-mounts"];

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }

    /// Its standard output without white space around it; the program must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(
            self.status.success(),
            "{}\n{}\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self.stdout.trim().to_owned()
    }

    /// Its standard error; the program must have failed with `code`.
    #[track_caller]
    pub fn fails_with(self, code: i32) -> String {
        assert_eq!(self.code(), code, "{self:?}");
        self.stderr
    }
}

/// A started program, ended when dropped.
pub struct Running {
    child: Child,
    output: Vec<JoinHandle<String>>,
}

impl Running {
    /// Starts `command` with `input` as its standard input, then the end of it.
    pub fn start(command: &mut Command, input: &[u8]) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        if let Some(mut stdin) = child.stdin.take() {
            let input = input.to_vec();
            // A program that does not read all of its input is free not to.
            std::thread::spawn(move || stdin.write_all(&input));
        }
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|stream| Box::new(stream) as _),
            child.stderr.take().map(|stream| Box::new(stream) as _),
        ];
        let read = |mut stream: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut bytes = vec![];
                // An error is the end, too: the program is gone.
                let _ = stream.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        Self {
            child,
            output: streams.into_iter().flatten().map(read).collect(),
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal the program");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Ran {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for the program") {
                break status;
            }
            assert!(
                Instant::now() < deadline,
                "still running after {PATIENCE:?}: {:?}",
                self.child
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut output = std::mem::take(&mut self.output)
            .into_iter()
            .map(|text| text.join().expect("read output"));
        let (stdout, stderr) = (output.next().expect("stdout"), output.next().expect("stderr"));
        Ran {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already gone unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `look` finds something.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what} after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name)
        .unwrap_or_else(|| panic!("{name} is not set; run this by scripts/test e2e"))
        .into()
}

/// The folder of programs under test.
pub fn programs() -> PathBuf {
    variable("LIGHTER_PROGRAMS")
}

/// Makes a program of `content`, such as a script.
pub fn write_program(path: &Path, content: impl AsRef<[u8]>) {
    std::fs::write(path, content).expect("write");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("make executable");
}

/// A file that scripts/lib/test-clients has made.
pub fn client_file(name: &str) -> PathBuf {
    variable("LIGHTER_TEST_CLIENTS").join(name)
}

/// A file that scripts/lib/test-apps has made.
pub fn app_file(name: &str) -> PathBuf {
    variable("LIGHTER_TEST_APPS").join(name)
}

/// Whether tests are to take their long forms (`LIGHTER_TEST_LONG`): hours in the emulated machine.
pub fn is_long() -> bool {
    std::env::var_os("LIGHTER_TEST_LONG").is_some()
}

/// A home of VMs of its own.
pub struct Home {
    folder: TempDir,
    /// Runs Lighter in place of the tests' user, who is root.
    user: Option<u32>,
}

impl Home {
    /// Whose VMs boot: most tests need no more than one of a kind.
    pub fn new() -> Self {
        let home = Self::with_templates();
        std::fs::write(home.path().join("config.toml"), "template = false\n").expect("write");
        home
    }

    /// Whose VMs start from templates, and leave them behind.
    pub fn with_templates() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("lt")
            .tempdir_in("/tmp")
            .expect("make a folder");
        watch::home_begins(folder.path());
        Self { folder, user: None }
    }

    /// The home of an ordinary user: of `uid` when the tests run as root, else of the tests' user.
    pub fn of_ordinary_user(uid: u32) -> Self {
        let mut home = Self::new();
        if rustix::process::geteuid().is_root() {
            // Where that user can read it.
            let programs = ["lighter", "lighter-vmm"].map(|name| (name, programs().join(name)));
            let boots = [("vmlinux", "LIGHTER_KERNEL"), ("rootfs.erofs", "LIGHTER_IMAGE")];
            let boots = boots.map(|(name, variable_name)| (name, variable(variable_name)));
            for (name, file) in programs.into_iter().chain(boots) {
                std::fs::copy(file, home.path().join(name)).expect("copy");
            }
            std::os::unix::fs::chown(home.path(), Some(uid), Some(uid)).expect("chown");
            home.user = Some(uid);
        }
        home
    }

    /// Who runs Lighter.
    pub fn uid(&self) -> u32 {
        self.user.unwrap_or(rustix::process::geteuid().as_raw())
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn vm_file(&self, vm: &str, name: &str) -> PathBuf {
        self.path().join("vms").join(vm).join(name)
    }

    /// `lighter` with this home.
    pub fn lighter(&self, arguments: &[&str]) -> Command {
        let mut command = match self.user {
            None => Command::new(programs().join("lighter")),
            Some(uid) => {
                let kvm = std::fs::metadata("/dev/kvm").expect("/dev/kvm");
                let groups = format!("--groups={}", std::os::unix::fs::MetadataExt::gid(&kvm));
                let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
                // Such limits are still about.
                let mut command = Command::new("prlimit");
                command.args(["--nofile=4096:4096", "setpriv"]);
                command.args([uid, gid, groups]).arg(self.path().join("lighter"));
                command.env("HOME", self.path());
                command.env("LIGHTER_KERNEL", self.path().join("vmlinux"));
                command.env("LIGHTER_IMAGE", self.path().join("rootfs.erofs"));
                command
            }
        };
        self.is_home_of(command.args(arguments));
        command
    }

    /// Has `command` find its VMs here.
    pub fn is_home_of(&self, command: &mut Command) {
        command
            .env("LIGHTER_HOME", self.path())
            .env("DOCKER_CONFIG", self.path().join("docker"));
    }

    /// `outer`, with [`Self::lighter`] as its last words.
    pub fn lighter_by(&self, mut outer: Command, arguments: &[&str]) -> Command {
        let inner = self.lighter(arguments);
        outer.arg(inner.get_program()).args(inner.get_args());
        outer.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        outer
    }

    pub fn start(&self, arguments: &[&str], input: &[u8]) -> Running {
        if arguments.first() == Some(&"rm") {
            watch::look();
        }
        Running::start(&mut self.lighter(arguments), input)
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.start(arguments, b"").wait()
    }

    /// Starts VM `name` of a small size.
    pub fn boot(&self, name: &str) {
        self.run(&["start", "-c", "1", "-m", "1g", "-d", "4g", name]).ok();
    }

    /// Starts VM `name` as small as an engine runs in, with `memory` and `mounts`.
    pub fn boot_small(&self, name: &str, memory: &str, mounts: &[&str]) {
        let small = ["start", "-c", "1", "-m", memory, "-d", "2g", name];
        self.run(&[&small, mounts].concat()).ok();
    }

    /// The docker CLI pointed to the engine of VM `name`.
    pub fn docker(&self, name: &str) -> Docker {
        let exports = self.run(&["env", name]).ok();
        let host = exports
            .lines()
            .find_map(|line| line.strip_prefix("export DOCKER_HOST="));
        let host = host
            .unwrap_or_else(|| panic!("no DOCKER_HOST in {exports}"))
            .trim_matches('\'');
        Docker {
            host: host.to_owned(),
        }
    }

    /// Runs the docker CLI as the user of this home would: its context says which engine.
    pub fn docker_by_context(&self, arguments: &[&str]) -> Ran {
        let mut command = Command::new(variable("LIGHTER_TEST_DOCKER"));
        command
            .args(arguments)
            .env_remove("DOCKER_HOST")
            .env("DOCKER_CONFIG", self.path().join("docker"));
        Running::start(&mut command, b"").wait()
    }

    /// Status as JSON.
    pub fn status(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.run(&["status", "--json", name]).ok()).expect("JSON")
    }

    /// A process of VM `name`: `supervisor_pid`, `monitor_pid` or `network_pid`.
    pub fn pid(&self, name: &str, role: &str) -> Pid {
        let status = self.status(name);
        let pid = status["running"][role]
            .as_i64()
            .unwrap_or_else(|| panic!("no {role} in {status}"));
        Pid::from_raw(pid as i32).expect("a process")
    }
}

impl Home {
    /// Shows how each VM is and the ends of its logs, for whoever reads of a failed test.
    pub fn show_logs(&self) {
        for vm in std::fs::read_dir(self.path().join("vms"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = vm.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') {
                continue;
            }
            eprintln!("--- VM {name}\n{}", self.run(&["status", &name]).stdout);
            for source in ["console", "agent", "engine", "monitor"] {
                let log = self.run(&["logs", "--source", source, "-n", "25", &name]);
                eprintln!("--- its {source} log\n{}{}", log.stdout, log.stderr);
            }
        }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
        let vms = std::fs::read_dir(self.path().join("vms"));
        for vm in vms.into_iter().flatten().flatten() {
            let name = vm.file_name();
            let name = name.to_string_lossy();
            if !name.starts_with('.') {
                let ran = self.run(&["rm", "--force", &name]);
                if !ran.status.success() {
                    watch::complain(format!("VM {name} could not be removed: {ran:?}"));
                }
            }
        }
        watch::home_ends(self.path());
    }
}

/// The docker CLI for one engine.
#[derive(Clone)]
pub struct Docker {
    host: String,
}

impl Docker {
    /// The path of the engine's socket.
    pub fn socket(&self) -> String {
        self.host.trim_start_matches("unix://").to_owned()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(variable("LIGHTER_TEST_DOCKER"));
        command
            .args(arguments)
            .env("DOCKER_HOST", &self.host)
            .env("DOCKER_CONFIG", client_file("config"));
        command
    }

    pub fn start(&self, arguments: &[&str], input: &[u8]) -> Running {
        if arguments.first() == Some(&"rm") {
            watch::look();
        }
        Running::start(&mut self.command(arguments), input)
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.start(arguments, b"").wait()
    }

    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        self.run(arguments).ok()
    }

    /// Imports the root file system `name` as an image of that name.
    pub fn import(&self, name: &str) {
        let tar = client_file(&format!("{name}.tar"));
        self.ok(&["import", &tar.to_string_lossy(), name]);
    }

    /// Waits until the log of `container` contains `text`, and returns the log.
    #[track_caller]
    pub fn wait_for_log(&self, container: &str, text: &str) -> String {
        until(&format!("{text:?} in the log of {container}"), || {
            let ran = self.run(&["logs", container]);
            ran.stdout.contains(text).then_some(ran.stdout)
        })
    }
}

struct Shared {
    home: Home,
    docker: Docker,
}

fn shared_slot() -> MutexGuard<'static, Option<Shared>> {
    static SHARED: OnceLock<Mutex<Option<Shared>>> = OnceLock::new();
    SHARED
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// A folder of the host's that VMs share by default: below the home folder.
pub fn folder_in_home() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("lighter-e2e")
        .tempdir_in(std::env::var("HOME").expect("HOME"))
        .expect("make a folder")
}

/// The docker CLI for the VM that tests share, with the image `busybox`; started by the first who asks.
pub fn shared() -> Docker {
    let mut slot = shared_slot();
    let shared = slot.get_or_insert_with(|| {
        let home = Home::new();
        home.run(&["start", "-c", "1", "-m", "2g", "-d", "10g", "shared"])
            .ok();
        let docker = home.docker("shared");
        docker.import("busybox");
        Shared { home, docker }
    });
    shared.docker.clone()
}

/// Runs `act` with the home of the shared VM.
pub fn with_shared_home<T>(act: impl FnOnce(&Home) -> T) -> T {
    shared();
    act(&shared_slot().as_ref().expect("started").home)
}

/// Shows the logs of the shared VM, if it runs.
pub fn show_shared_logs() {
    if let Some(shared) = shared_slot().as_ref() {
        shared.home.show_logs();
    }
}

/// Stops and removes the shared VM.
pub fn shut_down_shared() {
    if let Some(shared) = shared_slot().take() {
        watch::read_kernel(&shared.home, "shared");
        shared.home.run(&["stop", "shared"]).ok();
        shared.home.run(&["rm", "--force", "shared"]).ok();
    }
}

/// A process that runs.
#[derive(Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: Pid,
    pub name: String,
}

/// The processes whose `LIGHTER_HOME` begins with `home`.
pub fn processes_of(home: &str) -> Vec<Process> {
    let variable = format!("LIGHTER_HOME={home}");
    let mut found = vec![];
    for process in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
        if environment
            .split(|&byte| byte == 0)
            .any(|text| text.starts_with(variable.as_bytes()))
        {
            let pid = process.file_name().to_str().and_then(|pid| pid.parse().ok());
            let pid = pid.and_then(Pid::from_raw).expect("only processes have one");
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(Process { pid, name });
        }
    }
    found
}

/// No process and no socket of the tests' VMs is left. The user may have VMs of their own.
pub fn assert_nothing_left() {
    let left = processes_of("/tmp/lt");
    assert_eq!(left, []);
    let sockets = std::fs::read_to_string("/proc/net/unix").expect("/proc/net/unix");
    let left: Vec<&str> = sockets.lines().filter(|line| line.contains("/tmp/lt")).collect();
    assert!(left.is_empty(), "{left:#?}");
}
