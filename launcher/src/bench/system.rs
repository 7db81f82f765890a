//! A whole system of somebody's own, on a raw disk, in Lighter's monitor: what one has who wants an engine in a VM and
//! builds an image for it. Its engine answers on the vsock port that the agent's answers on ([`GUEST_DOCKER`]).

use crate::boot::{PING, PONG};
use crate::clock::monotonic_ns;
use crate::error::{Code, Context, Error, Result};
use crate::logs::printable;
use crate::size::Size;
use crate::supervisor::docker::connect;
use crate::supervisor::lines::Lines;
use crate::supervisor::machine::{COMMON_COMMAND_LINE, Inherited, NO_PCI, listen, open_kvm};
use crate::supervisor::monitor::{self, MAX_LINE};
use lighter_protocol::monitor::{Console, Disk, Event, EventKind, Kernel, Machine, Start, Vsock};
use lighter_protocol::ports::{GUEST_CID, GUEST_DOCKER};
use serde::Serialize;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

/// Where the system tells, as text, where the time of its start went, if it does.
const TIMES_PORT: u32 = 1026;

/// The most that it may tell, bytes.
const MAX_TIMES: u64 = 64 << 10;

/// How long it may take for that.
const TIMES_LIMIT: Duration = Duration::from_secs(120);

/// Between two looks whether somebody listens in the guest.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// The console's log, bytes, and how much of its end an error shows.
const CONSOLE_BYTES: u64 = 1 << 20;
const CONSOLE_SHOWN: u64 = 2 << 10;

/// A system to be booted again and again, each time as it is on its disk now.
#[derive(Debug)]
pub struct System {
    /// The raw disk, which is not written to.
    pub disk: PathBuf,
    /// The kernel.
    pub kernel: PathBuf,
    /// vCPUs.
    pub cpus: u16,
    /// Memory.
    pub memory: Size,
    /// Where the copies of the disk are made.
    pub folder: PathBuf,
}

/// One boot: milliseconds from the start of the monitor's process.
#[derive(Clone, Debug, Serialize)]
pub struct SystemRun {
    /// The first guest instruction.
    pub guest_entered_ms: f64,
    /// `/_ping` was answered.
    pub engine_answers_ms: f64,
    /// What the guest says of its start.
    pub times: Vec<String>,
}

/// Everything of one boot that must not end before it.
struct Boot {
    machine: Machine,
    inherited: Inherited,
    muxer: PathBuf,
    console: File,
    events: pipe::Receiver,
    _folder: tempfile::TempDir,
}

impl System {
    /// Finds out whether the disk can be read, before anything else takes long.
    ///
    /// # Errors
    /// When it cannot.
    pub fn check(&self) -> Result<()> {
        let failed = || format!("cannot use the disk {}", self.disk.display());
        let metadata = File::open(&self.disk)
            .and_then(|disk| disk.metadata())
            .context(failed)?;
        match metadata.is_file() {
            true => Ok(()),
            false => Err(Error::failure(format!("{}: it is not a regular file", failed()))),
        }
    }

    /// What the kernel is told.
    pub fn command_line(&self) -> String {
        // Its root file system is on a disk of its own, and of whatever type.
        let root = COMMON_COMMAND_LINE.replace("rootfstype=erofs ro", "rw");
        format!("{root} {NO_PCI} panic=-1 reboot=t")
    }

    /// Boots it until its engine answers, and ends it. Call it from the main thread.
    ///
    /// # Errors
    /// When it does not get there by `deadline`, with the last lines of its console.
    pub fn boot(&self, deadline: Instant) -> Result<SystemRun> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context(|| format!("cannot boot {}", self.disk.display()))?;
        runtime.block_on(self.boot_and_ask(deadline))
    }

    async fn boot_and_ask(&self, deadline: Instant) -> Result<SystemRun> {
        let boot = self.prepare()?;
        let started_ns = monotonic_ns();
        let inherited = boot.inherited.into_mappings();
        let (mut monitor, stderr) = monitor::start(&boot.machine, inherited).await?;
        let answered = tokio::select! {
            result = answer(&boot.muxer, BETWEEN_LOOKS) => result.map(|()| monotonic_ns()),
            status = monitor.wait() => {
                let mut said = String::new();
                if let Some(stderr) = stderr {
                    // What it has written is there.
                    let _ = stderr.take(CONSOLE_SHOWN).read_to_string(&mut said).await;
                }
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(Error::failure(format!("the monitor ended ({status}) {}", said.trim())))
            }
            () = tokio::time::sleep_until(deadline.into()) => {
                Err(Error::new(Code::Timeout, "its engine does not answer in time"))
            }
        };
        let answered_ns = answered.map_err(|error| Error {
            message: format!(
                "cannot boot {}: {}",
                self.disk.display(),
                printable(&error.message)
            ),
            lines: last_lines(&boot.console),
            ..error
        })?;
        let ms = |ns: u64| ns.saturating_sub(started_ns) as f64 / 1e6;
        let run = SystemRun {
            guest_entered_ms: ms(guest_entered_ns(boot.events).await?),
            engine_answers_ms: ms(answered_ns),
            times: times(&boot.muxer).await,
        };
        monitor.kill();
        monitor
            .wait()
            .await
            .context(|| format!("cannot end the boot of {}", self.disk.display()))?;
        Ok(run)
    }

    fn prepare(&self) -> Result<Boot> {
        let open = |path: &Path| File::open(path).context(|| format!("cannot open {}", path.display()));
        let copied = || {
            let (disk, folder) = (self.disk.display(), self.folder.display());
            format!("cannot copy {disk} to a file in {folder}")
        };
        let mut disk = tempfile::tempfile_in(&self.folder).context(copied)?;
        copy_sparsely(&mut open(&self.disk)?, &mut disk).context(copied)?;
        let failed = || "cannot make what the monitor needs".to_owned();
        let folder = tempfile::tempdir().context(failed)?;
        let muxer = folder.path().join("vsock");
        let console = tempfile::tempfile().context(failed)?;
        let (events_of_monitor, events) = pipe::pipe().context(failed)?;
        let mut inherited = Inherited::default();
        let machine = Machine {
            name: "system".into(),
            cpus: self.cpus,
            memory_mib: self.memory.mib(),
            kvm: inherited.add(open_kvm()?),
            start: Start::Kernel(Kernel {
                image: inherited.add(open(&self.kernel)?),
                command_line: self.command_line(),
            }),
            disks: vec![Disk {
                layers: vec![],
                id: "system".into(),
                file: inherited.add(disk),
                read_only: false,
            }],
            net: None,
            shares: vec![],
            vsock: Vsock {
                guest_cid: GUEST_CID,
                muxer: inherited.add(listen(&muxer)?),
                host_ports: vec![],
            },
            console: Some(Console {
                log: inherited.add(console.try_clone().context(failed)?),
                max_bytes: CONSOLE_BYTES,
            }),
            control: inherited.add(listen(&folder.path().join("control"))?),
            events: inherited.add(events_of_monitor.into_blocking_fd().context(failed)?),
            strict: false,
        };
        Ok(Boot {
            machine,
            inherited,
            muxer,
            console,
            events,
            _folder: folder,
        })
    }
}

/// Copies all but blocks of zeros, which need no room.
fn copy_sparsely(from: &mut File, to: &mut File) -> io::Result<()> {
    use std::io::Read;
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut block = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let size = block
            .len()
            .min(usize::try_from(length - at).unwrap_or(usize::MAX));
        from.read_exact(&mut block[..size])?;
        if block[..size].iter().any(|&byte| byte != 0) {
            to.seek(SeekFrom::Start(at))?;
            to.write_all(&block[..size])?;
        }
        at += size as u64;
    }
    Ok(())
}

/// Waits until the engine behind `muxer` answers, with `pause` between two looks whether somebody listens.
///
/// # Errors
/// When what answers is no engine.
pub async fn answer(muxer: &Path, pause: Duration) -> Result<()> {
    loop {
        match ping(muxer).await {
            Ok(line) if line.starts_with(PONG) => return Ok(()),
            Ok(line) if !line.is_empty() => {
                return Err(Error::failure(format!("its engine answers with {line:?}")));
            }
            // Nobody listens yet, or whoever does has nobody to pass it on to.
            _ => tokio::time::sleep(pause).await,
        }
    }
}

async fn ping(muxer: &Path) -> io::Result<String> {
    let (mut guest, early) = connect(muxer, GUEST_DOCKER).await?;
    guest.write_all(PING).await?;
    let line = Lines::new(early.as_slice().chain(guest), MAX_LINE).next().await?;
    Ok(line.unwrap_or_default())
}

async fn guest_entered_ns(events: pipe::Receiver) -> Result<u64> {
    let mut lines = Lines::new(events, MAX_LINE);
    let failed = || "cannot read the monitor's events".to_owned();
    while let Some(line) = lines.next().await.context(failed)? {
        let event: Event = serde_json::from_str(&line).context(failed)?;
        if event.kind == EventKind::GuestEntered {
            return Ok(event.monotonic_ns);
        }
    }
    Err(Error::failure(
        "the monitor did not tell when it entered the guest",
    ))
}

/// What the guest says of its start, fit for a terminal; nothing if it does not.
async fn times(muxer: &Path) -> Vec<String> {
    let read = async {
        let (guest, early) = connect(muxer, TIMES_PORT).await?;
        let mut bytes = vec![];
        early
            .as_slice()
            .chain(guest)
            .take(MAX_TIMES)
            .read_to_end(&mut bytes)
            .await?;
        Ok::<_, io::Error>(bytes)
    };
    match tokio::time::timeout(TIMES_LIMIT, read).await {
        Ok(Ok(bytes)) => String::from_utf8_lossy(&bytes).lines().map(printable).collect(),
        _ => vec![],
    }
}

/// Of a console's log.
fn last_lines(console: &File) -> Vec<String> {
    let mut bytes = vec![0; CONSOLE_SHOWN as usize];
    let length = console.metadata().map_or(0, |metadata| metadata.len());
    let count = console.read_at(&mut bytes, length.saturating_sub(CONSOLE_SHOWN));
    bytes.truncate(count.unwrap_or(0));
    String::from_utf8_lossy(&bytes).lines().map(printable).collect()
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
