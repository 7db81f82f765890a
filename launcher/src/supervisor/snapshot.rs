//! Snapshots of the running VM, for clients of the control socket.
//!
//! The VM stands still while the monitor saves CPUs and devices, copies its process, which then writes guest memory, and while
//! the data disk is copied; so all of it is of one moment. It goes on whatever fails.

use super::monitor;
use super::state::State;
use crate::error::{Context, Error, Result};
use crate::mounts::Mount;
use crate::snapshots::booted::{is_there, replaced};
use crate::snapshots::copy;
use crate::vm::Vm;
use lighter_protocol::monitor::Request;
use lighter_protocol::supervisor::{
    DISK_FILE, MEMORY_FILE, Phase, STATE_FILE, SnapshotAnswer, Taken, UsedFile,
};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Mutex, broadcast};

/// Takes the snapshots of one VM, one after the other.
#[derive(Clone, Debug)]
pub struct Snapshots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    monitor: PathBuf,
    disk: PathBuf,
    machine: OnceLock<MachineFacts>,
    one: Mutex<()>,
    written: broadcast::Sender<std::result::Result<(), String>>,
}

/// What a machine has to have to go on from a snapshot.
#[derive(Clone, Debug)]
pub struct MachineFacts {
    /// Whether it has a network device.
    pub network: bool,
    /// Its shared folders.
    pub mounts: Vec<Mount>,
    /// Kernel and image.
    pub booted_from: [UsedFile; 2],
}

impl Snapshots {
    /// For a VM whose monitor is not started yet.
    pub fn new(vm: &Vm) -> Self {
        Self(Arc::new(Inner {
            monitor: vm.paths.monitor_socket(),
            disk: vm.paths.disk(),
            machine: OnceLock::new(),
            one: Mutex::new(()),
            written: broadcast::Sender::new(4),
        }))
    }

    /// The machine is built.
    pub fn machine(&self, facts: MachineFacts) {
        // There is one monitor in a supervisor's life.
        let _ = self.0.machine.set(facts);
    }

    /// The monitor has written guest memory, or has not.
    pub fn written(&self, end: std::result::Result<(), String>) {
        // Nobody waits when the snapshot was given up.
        let _ = self.0.written.send(end);
    }

    /// Saves the VM into `folder`.
    pub async fn take(&self, folder: PathBuf, state: &State) -> SnapshotAnswer {
        match self.try_take(folder, state).await {
            Ok(taken) => SnapshotAnswer::Taken(taken),
            Err(error) => SnapshotAnswer::Failed {
                reason: error.message,
                hint: error.hint,
            },
        }
    }

    async fn try_take(&self, folder: PathBuf, state: &State) -> Result<Taken> {
        let Ok(_one) = self.0.one.try_lock() else {
            return Err(
                Error::failure("a snapshot of the VM is being taken").hint("try again when it is done")
            );
        };
        let machine = match (state.phase(), self.0.machine.get()) {
            (Phase::Ready, Some(machine)) => machine,
            (Phase::Stopping | Phase::Ended, _) => return Err(Error::failure("the VM is being stopped")),
            _ => {
                return Err(
                    Error::failure("the VM's engine is not ready").hint("lighter status shows how far it is")
                );
            }
        };
        let [kernel, image] = &machine.booted_from;
        for (what, file) in [("kernel", kernel), ("image", image)] {
            if !is_there(file) {
                let hint = format!("restart the VM, so that it uses the {what} that is there now");
                return Err(Error::of(crate::error::Code::Failure, &replaced(what, file)).hint(hint));
            }
        }
        let mut written = self.0.written.subscribe();
        let inner = self.0.clone();
        let saved = tokio::task::spawn_blocking(move || inner.save(&folder))
            .await
            .context(|| "the task that saves the VM ended early".into())?;
        if saved.memory_is_written {
            let mut watch = state.watch();
            let end = tokio::select! {
                end = written.recv() => end.unwrap_or_else(|error| Err(error.to_string())),
                _ = watch.wait_for(|status| status.phase == Phase::Ended) => {
                    Err("the VM ended before all of its memory was written".into())
                }
            };
            // Another reason came first.
            if saved.result.is_ok() {
                end.map_err(|reason| {
                    Error::failure(reason).hint("check the free space of the snapshot's folder")
                })?;
            }
        }
        Ok(Taken {
            paused_ns: saved.result?,
            network: machine.network,
            mounts: machine.mounts.iter().map(ToString::to_string).collect(),
            kernel: kernel.clone(),
            image: image.clone(),
        })
    }
}

/// How the part of it went for which the VM stands still.
struct Saved {
    /// The monitor goes on to write memory, and tells the end of that.
    memory_is_written: bool,
    /// How long the VM stood still, nanoseconds.
    result: Result<u64>,
}

impl Inner {
    fn save(&self, folder: &Path) -> Saved {
        let mut memory_is_written = false;
        let mut began = None;
        let mut save = || {
            let create = |name| create(&folder.join(name));
            let (state, memory, copied) = (create(STATE_FILE)?, create(MEMORY_FILE)?, create(DISK_FILE)?);
            let disk = File::open(&self.disk).context(|| format!("cannot read {}", self.disk.display()))?;
            began = Some(crate::clock::monotonic_ns());
            monitor::ask(&self.monitor, &Request::Pause, &[])?;
            monitor::ask(&self.monitor, &Request::Save, &[state.as_fd(), memory.as_fd()])?;
            memory_is_written = true;
            copy::copy(&disk, &copied).context(|| {
                format!(
                    "cannot copy the data disk to {}",
                    folder.join(DISK_FILE).display()
                )
            })
        };
        let result = save();
        // Whatever has failed, and even if the VM may not have been paused.
        let result = match began {
            None => result.map(|()| 0),
            Some(began) => monitor::ask(&self.monitor, &Request::Resume, &[])
                .map_err(|error| {
                    let stands = format!("the VM stands still: {}", error.message);
                    Error::failure(stands).hint("lighter stop --force ends it")
                })
                .and(result)
                .map(|()| crate::clock::monotonic_ns() - began),
        };
        Saved {
            memory_is_written,
            result,
        }
    }
}

/// A new file that nobody else may read: guest memory has all of the guest's secrets.
fn create(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .context(|| format!("cannot make {}", path.display()))
}
