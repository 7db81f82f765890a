//! Other monitors that boot the same guest as Lighter, each with the settings that its own manual recommends.
//!
//! A peer leaves nothing: its data disk and its configuration are files without a name that it inherits, its sockets are in a folder of
//! its own, and it is killed with this process.

use super::environment::Environment;
use super::milestones::{Milestones, Reader};
use super::peer_settings::{cloud_hypervisor, firecracker, firecracker_config, inherited, qemu};
use crate::clock::monotonic_ns;
use crate::die_with_parent::die_with_parent;
use crate::doctor::find_program;
use crate::error::{Code, Context, Error, Result};
use crate::size::Size;
use crate::vm::Settings;
use command_fds::{CommandFdExt, FdMapping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Instant;
use tempfile::TempDir;

/// The data disk, among the descriptors that a peer inherits.
pub const DATA_FD: i32 = 3;

/// The configuration file.
pub const CONFIG_FD: i32 = 4;

/// Which monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Firecracker,
    CloudHypervisor,
    Qemu,
}

/// A monitor that was asked for: `NAME[=PATH]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    kind: Kind,
    /// In `PATH` if not given.
    program: Option<PathBuf>,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Firecracker, Self::CloudHypervisor, Self::Qemu];

    /// Its name here, and the file name of its program.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Firecracker => ("firecracker", "firecracker"),
            Self::CloudHypervisor => ("cloud-hypervisor", "cloud-hypervisor"),
            Self::Qemu => ("qemu", "qemu-system-x86_64"),
        }
    }
}

/// Why a text names no peer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// None of those that are known.
    #[error(
        "{0:?} is not a monitor that Lighter knows: firecracker, cloud-hypervisor or qemu, or one of them with =PATH"
    )]
    Unknown(String),
    /// `NAME=`.
    #[error("the path after = is missing")]
    NoPath,
}

impl FromStr for Peer {
    type Err = PeerError;

    fn from_str(text: &str) -> std::result::Result<Self, PeerError> {
        let (name, program) = match text.split_once('=') {
            Some((_, "")) => return Err(PeerError::NoPath),
            Some((name, path)) => (name, Some(path.into())),
            None => (text, None),
        };
        let kind = Kind::ALL.into_iter().find(|kind| kind.names().0 == name);
        let kind = kind.ok_or_else(|| PeerError::Unknown(name.into()))?;
        Ok(Self { kind, program })
    }
}

/// What every contender boots.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The root file system.
    pub image: PathBuf,
    /// vCPUs.
    pub cpus: u16,
    /// Memory.
    pub memory: Size,
    /// The data disk's length.
    pub disk: Size,
    /// More words of the kernel's command line, each with a space behind it.
    pub words: String,
    /// More options for QEMU.
    pub qemu_options: Vec<OsString>,
}

impl Guest {
    /// One like the VMs of `settings` that `environment` describes.
    pub fn of(settings: &Settings, environment: &Environment) -> Self {
        Self {
            kernel: environment.kernel.clone(),
            image: environment.image.clone(),
            cpus: settings.cpus,
            memory: settings.memory,
            disk: settings.disk,
            words: String::new(),
            qemu_options: vec![],
        }
    }
}

/// A peer ready to boot, again and again.
#[derive(Debug)]
pub struct Contender {
    /// `firecracker`, `cloud-hypervisor` or `qemu`.
    pub name: &'static str,
    /// What the program says of its version.
    pub version: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    config: Option<Value>,
    disk: Size,
    /// Where data disks are made.
    folder: PathBuf,
}

impl Peer {
    /// Those whose programs are in `PATH`.
    pub fn found() -> Vec<Self> {
        let found = |kind: Kind| {
            find_program(kind.names().1).map(|program| Self {
                kind,
                program: Some(program),
            })
        };
        Kind::ALL.into_iter().filter_map(found).collect()
    }

    /// Its name here.
    pub fn name(&self) -> &'static str {
        self.kind.names().0
    }

    /// Whether it has what measurements of files and the network need.
    ///
    /// # Errors
    /// When it has not.
    pub fn check_devices(&self) -> Result<()> {
        match self.kind {
            Kind::Qemu => Ok(()),
            Kind::Firecracker | Kind::CloudHypervisor => Err(Error::new(
                Code::Usage,
                format!(
                    "{} has no network of a user's own to compare with, and its shared folders are not measured",
                    self.name()
                ),
            )
            .hint("compare with QEMU: --peer qemu, or --peer qemu=PATH")),
        }
    }

    /// Finds the program, and writes its settings for `guest`. Its data disks will be made in `folder`.
    ///
    /// # Errors
    /// When the program is missing or cannot even tell its version, or the peer cannot be told of the image's path.
    pub fn prepare(&self, guest: &Guest, folder: &Path) -> Result<Contender> {
        let program = self.find()?;
        let (arguments, config) = match self.kind {
            Kind::Firecracker => (
                firecracker(),
                Some(firecracker_config(guest, &inherited(DATA_FD))),
            ),
            Kind::CloudHypervisor => (cloud_hypervisor(guest)?, None),
            Kind::Qemu => (qemu(guest), None),
        };
        Ok(Contender {
            name: self.name(),
            version: version(&program)?,
            program,
            arguments,
            config,
            disk: guest.disk,
            folder: folder.into(),
        })
    }

    /// Whether it can be measured by [`super::saved_peer`].
    pub fn can_be_saved(&self) -> bool {
        self.kind == Kind::Firecracker
    }

    /// Finds the program.
    ///
    /// # Errors
    /// When it is missing.
    pub fn find(&self) -> Result<PathBuf> {
        let (name, file_name) = self.kind.names();
        match &self.program {
            Some(path) => std::path::absolute(path).context(|| format!("cannot use {}", path.display())),
            None => find_program(file_name).ok_or_else(|| {
                Error::failure(format!("cannot find {file_name} in PATH"))
                    .hint(format!("install it, or name its path: --peer {name}=PATH"))
            }),
        }
    }
}

/// What a program says of its version.
///
/// # Errors
/// When it says nothing.
pub fn version(program: &Path) -> Result<String> {
    let what = || format!("cannot run {} --version", program.display());
    let mut command = Command::new(program);
    die_with_parent(&mut command);
    let output = command
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .context(what)?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(crate::logs::printable(line)),
        _ => Err(Error::failure(format!(
            "{}: it ended with {}",
            what(),
            output.status
        ))),
    }
}

/// Killed, and waited for, when dropped; then its folder is removed.
#[derive(Debug)]
pub struct Running(
    pub Child,
    #[expect(dead_code, reason = "it is removed when it is dropped")] Option<TempDir>,
);

impl Running {
    /// Starts `command`, whose process does not outlive this one; `folder` goes with it. Call it from the main thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, folder: Option<TempDir>) -> io::Result<Self> {
        die_with_parent(command);
        Ok(Self(command.spawn()?, folder))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Contender {
    /// The command line and the configuration, for the report.
    pub fn settings(&self) -> String {
        let words = std::iter::once(self.program.as_os_str())
            .chain(self.arguments.iter().map(OsString::as_os_str))
            .map(|word| {
                let word = word.to_string_lossy();
                match word.contains([' ', '\'']) {
                    true => format!("'{}'", word.replace('\'', r"'\''")),
                    false => word.into_owned(),
                }
            });
        let command = words.collect::<Vec<_>>().join(" ");
        match &self.config {
            Some(config) => format!("{command}\n{config}"),
            None => command,
        }
    }

    /// Boots the guest with a new data disk until its engine is ready, and kills it. Returns when its process was
    /// started, and its milestones.
    ///
    /// # Errors
    /// When it does not get there by `deadline`, with the last lines it wrote.
    pub fn boot(&self, deadline: Instant) -> Result<(u64, Milestones)> {
        let (started_ns, mut child, mut output) = self.start(Stdio::null(), vec![])?;
        let milestones = until_ready(self.name, &mut output, &mut child, deadline)?;
        Ok((started_ns, milestones))
    }

    /// Starts the program with more descriptors than those of its own. Returns when that was, the process, and what reads all
    /// that it writes. Call it from the main thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, input: Stdio, more: Vec<FdMapping>) -> Result<(u64, Running, PipeReader)> {
        let failed = || format!("cannot start {}", self.program.display());
        let (output, writer) = io::pipe().context(failed)?;
        let folder = tempfile::tempdir().context(failed)?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .current_dir(folder.path())
            .stdin(input)
            .stdout(writer.try_clone().context(failed)?)
            .stderr(writer);
        let mut inherited = self.inherited()?;
        inherited.extend(more);
        command.fd_mappings(inherited).context(failed)?;
        let started_ns = monotonic_ns();
        let child = Running::start(&mut command, Some(folder)).context(failed)?;
        // The command goes, which holds the pipe's other end, too.
        Ok((started_ns, child, output))
    }

    fn inherited(&self) -> Result<Vec<FdMapping>> {
        let make = |fill: &dyn Fn(&mut File) -> io::Result<()>| {
            let mut file = tempfile::tempfile_in(&self.folder)?;
            fill(&mut file)?;
            Ok::<_, io::Error>(OwnedFd::from(file))
        };
        let failed = || format!("cannot make a file in {}", self.folder.display());
        let data = make(&|file| file.set_len(self.disk.0)).context(failed)?;
        let mut mappings = vec![FdMapping {
            parent_fd: data,
            child_fd: DATA_FD,
        }];
        if let Some(config) = &self.config {
            let text = config.to_string();
            mappings.push(FdMapping {
                parent_fd: make(&|file| file.write_all(text.as_bytes())).context(failed)?,
                child_fd: CONFIG_FD,
            });
        }
        Ok(mappings)
    }
}

/// Reads what peer `name` writes until its guest's engine is ready.
///
/// # Errors
/// When it does not get there by `deadline`, with the last lines it wrote.
pub fn until_ready(
    name: &str,
    output: &mut PipeReader,
    child: &mut Running,
    deadline: Instant,
) -> Result<Milestones> {
    let failed = || format!("cannot read what {name} writes");
    let mut reader = Reader::default();
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).ok();
        let ready = match poll(&mut [PollFd::new(output, PollFlags::IN)], timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result.context(failed)?,
        };
        if ready == 0 {
            let late = format!("{name} did not bring the guest's engine up in time");
            return Err(Error::new(Code::Timeout, late).lines(reader.into_last_lines()));
        }
        let count = output.read(&mut bytes).context(failed)?;
        if count == 0 {
            let _ = child.0.kill();
            let status = child.0.wait().context(failed)?;
            let text = format!("{name} ended before the guest's engine was ready ({status})");
            return Err(Error::failure(text).lines(reader.into_last_lines()));
        }
        if let Some(milestones) = reader.feed(&bytes[..count], monotonic_ns()) {
            return Ok(milestones);
        }
    }
}

#[cfg(test)]
#[path = "peer_tests.rs"]
pub mod tests;
