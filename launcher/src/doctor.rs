//! `lighter doctor`: whether this host can run VMs, and what to do if not.

use crate::cli::{Json, print, print_json};
use crate::config::Config;
use crate::default_socket::{self, State};
use crate::error::{Error, Result};
use crate::paths::Paths;
use crate::size::Size;
use crate::snapshots::base::Base;
use crate::supervisor::machine::artifact_paths;
use crate::supervisor::monitor;
use crate::templates::store;
use clap::Args;
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::Cage;
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Under this, the host's disk fills up with the first images, bytes.
const LITTLE_SPACE: u64 = 5 << 30;

/// Under this, a walk through a shared folder of some size fails, files.
const FEW_FILES: u64 = 100_000;

/// Arguments.
#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    output: Json,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Good,
    Warning,
    Bad,
}

/// One check.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    fix: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Good,
            found: found.into(),
            fix: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Warning,
            fix: Some(fix.into()),
            ..Self::good(name, found)
        }
    }

    fn bad(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Bad,
            ..Self::warning(name, found, fix)
        }
    }
}

impl Doctor {
    /// Checks everything. Returns 1 when something is bad.
    ///
    /// # Errors
    /// When the result cannot be written.
    pub fn run(self, paths: &Paths) -> Result<u8> {
        let mut checks = vec![kvm_device(Path::new("/dev/kvm"))];
        checks.push(match monitor::program() {
            Ok(program) => Check::good("monitor", program.display().to_string()),
            Err(error) => Check::bad("monitor", error.message, error.hint.unwrap_or_default()),
        });
        if checks.iter().all(|check| check.verdict == Verdict::Good) {
            checks.push(kvm_guests());
            checks.push(cage());
        }
        checks.push(config(paths));
        checks.extend(artifacts(paths));
        checks.push(runtime(paths));
        checks.push(space(paths));
        checks.push(templates(paths));
        checks.push(match find_program("docker") {
            Some(path) => Check::good("docker CLI", path.display().to_string()),
            None => Check::warning(
                "docker CLI",
                "not found in PATH",
                "install your distribution's docker CLI (Debian: docker-cli); the engine itself is in the VM",
            ),
        });
        checks.push(match find_program("passt") {
            Some(path) => Check::good("network", path.display().to_string()),
            None => Check::warning(
                "network",
                "passt is not in PATH, and VMs have no network without it",
                "install your distribution's package passt",
            ),
        });
        checks.extend(default_socket(paths));
        let most_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        checks.push(folders(most_files.unwrap_or(u64::MAX)));
        let healthy = checks.iter().all(|check| check.verdict != Verdict::Bad);
        if self.output.json {
            print_json(&serde_json::json!({ "healthy": healthy, "checks": checks }))?;
        } else {
            print(&text(&checks))?;
        }
        Ok(u8::from(!healthy))
    }
}

fn text(checks: &[Check]) -> String {
    let mut out = String::new();
    for check in checks {
        let mark = match check.verdict {
            Verdict::Good => "ok  ",
            Verdict::Warning => "warn",
            Verdict::Bad => "BAD ",
        };
        out += &format!("{mark}  {:<11} {}\n", check.name, check.found);
        if let Some(fix) = &check.fix {
            out += &format!("      {:<11} fix: {fix}\n", "");
        }
    }
    out
}

fn kvm_device(path: &Path) -> Check {
    let name = "KVM";
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::good(name, format!("{} opens", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::bad(
            name,
            format!("{} is not there", path.display()),
            "turn on virtualisation (VT-x, AMD-V) in the firmware, or nested virtualisation of this VM; then modprobe kvm_intel \
             or kvm_amd",
        ),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let owner = std::fs::metadata(path).map(|metadata| metadata.gid());
            let group = owner.map_or("kvm".into(), group_name);
            Check::bad(
                name,
                format!("{} may not be opened by this user", path.display()),
                format!("sudo usermod -aG {group} $USER, then log in anew"),
            )
        }
        Err(error) => Check::bad(
            name,
            format!("{} does not open: {error}", path.display()),
            "load kvm_intel or kvm_amd, and see the kernel's log (dmesg) for why it refuses",
        ),
    }
}

/// What new VMs start from.
fn templates(paths: &Paths) -> Check {
    let name = "templates";
    let found = match store::list(paths) {
        Ok(found) => found,
        Err(error) => {
            let fix = "new VMs boot without: check the folder's permissions";
            return Check::warning(name, chain(&error), fix);
        }
    };
    let bases: Vec<Base> = found
        .iter()
        .filter_map(|name| Base::load(&store::folder(paths, name)).ok())
        .collect();
    let used = Size(bases.iter().map(Base::used).sum()).human();
    let outdated = bases.iter().filter(|base| !store::is_current(base)).count();
    match (found.len(), found.len() - bases.len() + outdated) {
        (0, _) => Check::good(
            name,
            "none yet; the first VM of a configuration leaves one behind",
        ),
        (all, 0) => Check::good(name, format!("{all}, {used}")),
        (all, useless) => Check::good(
            name,
            format!("{all}, {used}; {useless} of no use any more (lighter template ls, rm)"),
        ),
    }
}

/// The name of a group, or its number when it has none.
fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == gid.to_string()).then(|| name.to_owned())
    });
    found.unwrap_or_else(|| gid.to_string())
}

/// What keeps a hostile guest from this host: the monitor goes into its cage to find out.
fn cage() -> Check {
    let name = "cage";
    match ask_monitor::<Cage>("probe-cage") {
        Ok(cage) => judge(name, &cage),
        Err(error) => Check::bad(name, error.message, error.hint.unwrap_or_default()),
    }
}

fn judge(name: &'static str, cage: &Cage) -> Check {
    let missing = cage.holes();
    match missing.as_slice() {
        [] => Check::good(name, "namespaces, landlock, seccomp"),
        missing => Check::warning(
            name,
            format!(
                "a hostile guest would meet fewer layers here, without {}",
                missing.join(", ")
            ),
            "VMs run without them unless they are --strict; docs/security.md says what each is for and how a host gets it",
        ),
    }
}

/// What the monitor prints when it is started as `command`.
fn ask_monitor<T: serde::de::DeserializeOwned>(command: &str) -> Result<T> {
    let again = |text: String| Error::failure(text).hint(format!("run lighter-vmm {command} by hand"));
    let program = monitor::program()?;
    let output = std::process::Command::new(&program)
        .args([command, "--json"])
        .output()
        .map_err(|error| again(format!("cannot run {}: {error}", program.display())))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        again(format!("the probe failed ({}): {said}", output.status))
    })
}

/// What `lighter-vmm probe-kvm --json` says.
#[derive(Deserialize)]
pub struct Probe {
    /// Whether this KVM runs Linux.
    pub runs_linux: bool,
    instructions_per_second: u64,
    missing: Vec<String>,
}

impl Probe {
    /// Asks the monitor.
    ///
    /// # Errors
    /// When it cannot be run, or has no answer.
    pub fn run() -> Result<Self> {
        ask_monitor("probe-kvm")
    }

    /// What was found, in words.
    pub fn found(&self) -> String {
        let mut found = format!(
            "{} million ring-0 instructions a second",
            self.instructions_per_second / 1_000_000
        );
        if !self.missing.is_empty() {
            found += &format!(", without {}", self.missing.join(", "));
        }
        found
    }
}

fn kvm_guests() -> Check {
    let name = "KVM guests";
    let probe = match Probe::run() {
        Ok(probe) => probe,
        Err(error) => return Check::bad(name, error.message, error.hint.unwrap_or_default()),
    };
    let found = probe.found();
    if probe.runs_linux {
        Check::good(name, format!("run Linux: {found}"))
    } else {
        Check::bad(
            name,
            format!("do not run Linux: {found}"),
            "this host's KVM emulates instead of using the CPU's virtualisation: use a host with VT-x or AMD-V, or turn on \
             nested virtualisation",
        )
    }
}

/// Whether shared folders hold enough files.
fn folders(most_files: u64) -> Check {
    let name = "folders";
    if most_files < FEW_FILES {
        return Check::warning(
            name,
            format!(
                "a process may have {most_files} files open, and each file that a VM knows in a shared folder is one"
            ),
            "raise the limit (LimitNOFILE=, or nofile in /etc/security/limits.conf), or share smaller folders",
        );
    }
    Check::good(name, format!("{most_files} files can be open"))
}

fn config(paths: &Paths) -> Check {
    let name = "config";
    let path = paths.config_file.display();
    match Config::load(&paths.config_file) {
        Ok(_) if paths.config_file.exists() => Check::good(name, path.to_string()),
        Ok(_) => Check::good(name, format!("{path} is not there: defaults")),
        Err(error) => Check::bad(name, chain(&error), "correct that file, or remove it"),
    }
}

/// Where programs look for an engine, if ours is or should be there.
fn default_socket(paths: &Paths) -> Option<Check> {
    let name = "docker.sock";
    let config = Config::load(&paths.config_file).unwrap_or_default();
    match default_socket::state(paths, &config) {
        State::Unused => None,
        State::Linked(socket) => Some(Check::good(
            name,
            format!("{} leads to {}", default_socket::LINK, socket.display()),
        )),
        State::Wrong(todo) => Some(Check::warning(name, todo.why, todo.command)),
    }
}

fn artifacts(paths: &Paths) -> Vec<Check> {
    let config = Config::load(&paths.config_file).unwrap_or_default();
    let files = artifact_paths(paths, &None, &None, &config);
    let check = |(name, path): (&'static str, PathBuf)| match std::fs::File::open(&path) {
        Ok(_) => Check::good(name, path.display().to_string()),
        Err(error) => Check::bad(
            name,
            format!("{}: {error}", path.display()),
            "run scripts/quickstart in Lighter's source, which builds and installs it",
        ),
    };
    ["kernel", "image"].into_iter().zip(files).map(check).collect()
}

fn runtime(paths: &Paths) -> Check {
    let name = "sockets";
    // A name as long as the default's: the length of the paths counts.
    let Ok(probe) = "default".parse() else {
        return Check::bad(name, "the default name is none", "");
    };
    let vm = paths.vm(&probe);
    let result = vm.check_socket_paths().and_then(|()| paths.check_runtime());
    match result {
        Ok(()) => Check::good(name, paths.runtime.display().to_string()),
        Err(error) => {
            let error = crate::error::Error::from(error);
            Check::bad(name, error.message, error.hint.unwrap_or_default())
        }
    }
}

fn space(paths: &Paths) -> Check {
    let name = "disk space";
    // The folder may not be there yet: the nearest one above it tells.
    let existing = paths
        .vms
        .ancestors()
        .find(|folder| folder.exists())
        .unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Ok(stat) => {
            let free = Size(stat.f_bavail.saturating_mul(stat.f_frsize));
            let found = format!("{} free in {}", free.human(), existing.display());
            if free.0 < LITTLE_SPACE {
                Check::warning(
                    name,
                    found,
                    "make room, or set LIGHTER_HOME or XDG_DATA_HOME to a larger file system",
                )
            } else {
                Check::good(name, found)
            }
        }
        Err(error) => Check::bad(
            name,
            format!("{}: {error}", existing.display()),
            "set LIGHTER_HOME to a folder that can be read",
        ),
    }
}

/// Finds a program in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let executable = |path: &PathBuf| {
        std::fs::metadata(path)
            .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_need_open_files() {
        assert_eq!(folders(1 << 20).verdict, Verdict::Good);
        assert_eq!(folders(4096).verdict, Verdict::Warning);
    }

    #[test]
    fn layers_that_are_missing_are_named() {
        let cage = |text| judge("cage", &serde_json::from_str(text).unwrap());
        let all = cage(r#"{"namespaces":"on","landlock":"on","seccomp":"on"}"#);
        assert_eq!(all.verdict, Verdict::Good);
        let some = cage(r#"{"namespaces":{"missing":{"why":"forbidden"}},"landlock":"on","seccomp":"on"}"#);
        assert_eq!(some.verdict, Verdict::Warning);
        assert!(some.found.contains("namespaces (forbidden)"), "{}", some.found);
    }

    #[test]
    fn a_missing_kvm_is_bad_and_says_what_to_do() {
        let check = kvm_device(Path::new("/nonexistent/kvm"));
        assert_eq!(check.verdict, Verdict::Bad);
        assert!(check.fix.unwrap().contains("firmware"));
    }

    #[test]
    fn the_probe_of_the_monitor_is_understood() {
        let probe: Probe = serde_json::from_str(
            r#"{"instructions_per_second":5000000,"missing":["xsave"],"runs_linux":false}"#,
        )
        .unwrap();
        assert!(!probe.runs_linux);
        assert_eq!(probe.missing, ["xsave"]);
    }

    #[test]
    fn a_group_without_a_name_is_its_number() {
        assert_eq!(group_name(0), "root");
        assert_eq!(group_name(3_999_999), "3999999");
    }
}
