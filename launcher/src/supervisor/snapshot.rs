//! Snapshots of the running VM, for clients of the control socket.
//!
//! The VM stands still while the monitor saves CPUs and devices, copies its process, which then writes guest memory, and while
//! the data disk is copied; so all of it is of one moment. It goes on whatever fails.

use super::monitor;
use super::state::State;
use super::suspension;
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
use std::sync::{Arc, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError};
use tokio::sync::{Mutex, MutexGuard, broadcast};

/// Takes the snapshots of one VM, one after the other.
#[derive(Clone, Debug)]
pub struct Snapshots(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    vm: Vm,
    machine: StdMutex<Option<MachineFacts>>,
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
            vm: vm.clone(),
            machine: StdMutex::default(),
            one: Mutex::new(()),
            written: broadcast::Sender::new(4),
        }))
    }

    /// The machine is built.
    pub fn machine(&self, facts: MachineFacts) {
        *self.machine_now() = Some(facts);
    }

    fn machine_now(&self) -> StdMutexGuard<'_, Option<MachineFacts>> {
        self.0.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The monitor has written guest memory, or has not.
    pub fn written(&self, end: std::result::Result<(), String>) {
        // Nobody waits when the snapshot was given up.
        let _ = self.0.written.send(end);
    }

    /// Saves the VM into `folder`.
    pub async fn take(&self, folder: PathBuf, state: &State) -> SnapshotAnswer {
        let saved = match self.claim() {
            Ok(_one) => self.save(folder, Disk::Copied, state).await,
            Err(error) => Err(error),
        };
        answer(saved)
    }

    /// Saves the VM into its own folder. When that is done, it stands still and is to be ended; otherwise it goes on.
    pub async fn suspend(&self, state: &State) -> SnapshotAnswer {
        let _one = match self.claim() {
            Ok(one) => one,
            Err(error) => return answer(Err(error)),
        };
        let saved = match suspension::begin(&self.0.vm.paths) {
            Ok(folder) => self.save(folder, Disk::Kept, state).await,
            Err(error) => Err(error),
        };
        let inner = self.0.clone();
        let finish = move || {
            let finished = saved.and_then(|taken| match suspension::finish(&inner.vm, &taken) {
                Ok(()) => Ok(taken),
                Err(error) => inner.resume().and(Err(error)),
            });
            if finished.is_err() {
                suspension::give_up(&inner.vm.paths);
            }
            finished
        };
        let finished = tokio::task::spawn_blocking(finish).await;
        answer(finished.unwrap_or_else(|error| Err(Error::failure(error.to_string()))))
    }

    fn claim(&self) -> Result<MutexGuard<'_, ()>> {
        let busy = || Error::failure("a snapshot of the VM is being taken").hint("try again when it is done");
        let one = self.0.one.try_lock().map_err(|_| busy())?;
        // It stands still, and nothing may let it go on.
        match suspension::is_suspended(&self.0.vm.paths) {
            true => Err(Error::failure("the VM is suspended")
                .hint(format!("lighter resume {} has it go on", self.0.vm.name))),
            false => Ok(one),
        }
    }

    async fn save(&self, folder: PathBuf, disk: Disk, state: &State) -> Result<Taken> {
        let machine = self.machine_now().clone();
        let machine = match (state.phase(), machine) {
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
        let saved = tokio::task::spawn_blocking(move || inner.save(&folder, disk))
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
            // Otherwise another reason came first, and the VM goes on already.
            if let (Err(reason), true) = (end, saved.result.is_ok()) {
                if disk == Disk::Kept {
                    let inner = self.0.clone();
                    let resumed = tokio::task::spawn_blocking(move || inner.resume()).await;
                    resumed.context(|| "the task that resumes the VM ended early".into())??;
                }
                return Err(Error::failure(reason).hint("check the free space of the snapshot's folder"));
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

fn answer(result: Result<Taken>) -> SnapshotAnswer {
    match result {
        Ok(taken) => SnapshotAnswer::Taken(taken),
        Err(error) => SnapshotAnswer::Failed {
            reason: error.message,
            hint: error.hint,
        },
    }
}

/// What becomes of the data disk, and of the VM when it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    /// It is copied, and the VM goes on.
    Copied,
    /// It has another name in the folder, and the VM stands still: that is to go on from it.
    Kept,
}

/// How the part of it went for which the VM stands still.
struct Saved {
    /// The monitor goes on to write memory, and tells the end of that.
    memory_is_written: bool,
    /// How long the VM stood still, nanoseconds.
    result: Result<u64>,
}

impl Inner {
    fn save(&self, folder: &Path, disk: Disk) -> Saved {
        let mut memory_is_written = false;
        let mut began = None;
        let mut save = || {
            let create = |name| create(&folder.join(name));
            let (state, memory) = (create(STATE_FILE)?, create(MEMORY_FILE)?);
            let (path, copied) = (self.vm.paths.disk(), folder.join(DISK_FILE));
            let failed = || format!("cannot copy the data disk to {}", copied.display());
            let files = match disk {
                Disk::Kept => std::fs::hard_link(&path, &copied)
                    .map(|()| None)
                    .context(failed)?,
                Disk::Copied => {
                    let from = File::open(&path).context(|| format!("cannot read {}", path.display()))?;
                    Some((from, create(DISK_FILE)?))
                }
            };
            began = Some(crate::clock::monotonic_ns());
            let monitor = self.vm.paths.monitor_socket();
            monitor::ask(&monitor, &Request::Pause, &[])?;
            monitor::ask(&monitor, &Request::Save, &[state.as_fd(), memory.as_fd()])?;
            memory_is_written = true;
            files.map_or(Ok(()), |(from, to)| copy::copy(&from, &to).context(failed))
        };
        let result = save();
        // Whatever has failed, and even if the VM may not have been paused.
        let result = match began {
            Some(began) => match (disk, result) {
                (Disk::Kept, Ok(())) => Ok(()),
                (_, result) => self.resume().and(result),
            }
            .map(|()| crate::clock::monotonic_ns() - began),
            None => result.map(|()| 0),
        };
        Saved {
            memory_is_written,
            result,
        }
    }

    fn resume(&self) -> Result<()> {
        let resumed = monitor::ask(&self.vm.paths.monitor_socket(), &Request::Resume, &[]);
        resumed.map(drop).map_err(|error| {
            let stands = format!("the VM stands still: {}", error.message);
            Error::failure(stands).hint("lighter stop --force ends it")
        })
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
