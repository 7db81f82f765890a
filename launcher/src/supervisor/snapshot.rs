//! Snapshots of the running VM, for clients of the control socket.
//!
//! The VM stands still while the monitor saves CPUs and devices, copies its process, which then writes guest memory, and while
//! its data disk gets a new layer to write to; so all of it is of one moment. It goes on whatever fails. The files that
//! the disk was until then do not change any more, and the snapshot has them under names of its own.

use super::machine::DATA_DISK;
use super::monitor;
use super::state::State;
use super::suspension;
use crate::disk::files::{self as disk_files, Added, DiskFiles};
use crate::error::{Context, Error, Result};
use crate::mounts::Mount;
use crate::snapshots::booted::{is_there, replaced};
use crate::snapshots::manifest::disk_file;
use crate::vm::Vm;
use lighter_protocol::monitor::Request;
use lighter_protocol::supervisor::{MEMORY_FILE, Phase, STATE_FILE, SnapshotAnswer, Taken, UsedFile};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// There is a layer of which the monitor may not know: what it writes to may not be the last in the list, and nothing may be
    /// merged until the VM is started anew.
    uncertain: AtomicBool,
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
            uncertain: AtomicBool::new(false),
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
        let saved = match self.claim_ready(state).await {
            Ok(_one) => self.save(folder, Disk::Frozen, state, || ()).await,
            Err(error) => Err(error),
        };
        answer(saved)
    }

    /// Saves a VM that serves nobody yet into `folder`, and calls `goes_on` when it may: while its memory is written.
    ///
    /// # Errors
    /// Why it is not saved; it goes on.
    pub async fn take_first(&self, folder: PathBuf, state: &State, goes_on: impl FnOnce()) -> Result<Taken> {
        let _one = self.claim()?;
        self.save(folder, Disk::Frozen, state, goes_on).await
    }

    /// Saves the VM into its own folder. When that is done, it stands still and is to be ended; otherwise it goes on.
    pub async fn suspend(&self, state: &State) -> SnapshotAnswer {
        let _one = match self.claim_ready(state).await {
            Ok(one) => one,
            Err(error) => return answer(Err(error)),
        };
        let saved = match suspension::begin(&self.0.vm.paths) {
            Ok(folder) => self.save(folder, Disk::Kept, state, || ()).await,
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

    /// Of a VM whose engine is ready. A template that is being written is waited for: nobody has asked for it.
    async fn claim_ready(&self, state: &State) -> Result<MutexGuard<'_, ()>> {
        state.template_written().await;
        let one = self.claim()?;
        match state.phase() {
            Phase::Ready => Ok(one),
            Phase::Stopping | Phase::Ended => Err(being_stopped()),
            _ => {
                Err(Error::failure("the VM's engine is not ready").hint("lighter status shows how far it is"))
            }
        }
    }

    /// Calls `goes_on` when the VM stands still no longer.
    async fn save(
        &self,
        folder: PathBuf,
        disk: Disk,
        state: &State,
        goes_on: impl FnOnce(),
    ) -> Result<Taken> {
        let machine = self.machine_now().clone().ok_or_else(being_stopped)?;
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
        goes_on();
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

fn being_stopped() -> Error {
    Error::failure("the VM is being stopped")
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
    /// It gets a layer, with which the VM goes on, and what it was until then is in the folder, too.
    Frozen,
    /// It stays as it is, and the VM stands still: that is to go on from it.
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
        let mut layer = None;
        let mut save = || {
            let create = |name| create(&folder.join(name));
            let (state, memory) = (create(STATE_FILE)?, create(MEMORY_FILE)?);
            if disk == Disk::Frozen {
                layer = Some(self.new_layer()?);
            }
            began = Some(crate::clock::monotonic_ns());
            let monitor = self.vm.paths.monitor_socket();
            monitor::ask(&monitor, &Request::Pause, &[])?;
            monitor::ask(&monitor, &Request::Save, &[state.as_fd(), memory.as_fd()])?;
            memory_is_written = true;
            layer.as_mut().map_or(Ok(()), |layer| layer.give_to(&monitor))
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
        // The VM goes on meanwhile.
        let result = result.and_then(|paused_ns| {
            layer.take().map_or(Ok(()), |layer| layer.share_frozen(folder))?;
            Ok(paused_ns)
        });
        if let Some(layer) = layer {
            self.uncertain.fetch_or(!layer.give_up(), Ordering::Relaxed);
        }
        Saved {
            memory_is_written,
            result,
        }
    }

    /// A layer for the data disk, and what was written until now on the disk, so that little is left to be when the VM stands still.
    fn new_layer(&self) -> Result<NewLayer> {
        let before = self.vm.disk()?;
        before.sync()?;
        let may_merge = !self.uncertain.load(Ordering::Relaxed);
        let added = before.add_layer(before.size()?, may_merge);
        // It may be in the list.
        let added = added.inspect_err(|_| self.uncertain.store(true, Ordering::Relaxed))?;
        Ok(NewLayer {
            before,
            added,
            asked: false,
        })
    }

    fn resume(&self) -> Result<()> {
        let resumed = monitor::ask(&self.vm.paths.monitor_socket(), &Request::Resume, &[]);
        resumed.map(drop).map_err(|error| {
            let stands = format!("the VM stands still: {}", error.message);
            Error::failure(stands).hint("lighter stop --force ends it")
        })
    }
}

/// A layer that is in the list of the disk's files. While it is empty nothing is different with it, whether the monitor writes to
/// it or not.
struct NewLayer {
    before: DiskFiles,
    added: Added,
    /// The monitor may know of it.
    asked: bool,
}

impl NewLayer {
    /// Has the monitor write to it.
    fn give_to(&mut self, monitor: &Path) -> Result<()> {
        let Added { merged, top, .. } = &self.added;
        let request = Request::AddLayer {
            disk: DATA_DISK.into(),
            merged: merged.is_some(),
        };
        let descriptors: Vec<_> = merged.iter().chain([top]).map(AsFd::as_fd).collect();
        self.asked = true;
        monitor::ask(monitor, &request, &descriptors).map(drop)
    }

    /// Has the files of the disk that are written no more in `folder`, too.
    fn share_frozen(self, folder: &Path) -> Result<()> {
        let files = self.added.files;
        let frozen = files.frozen();
        disk_files::protect(&frozen);
        // What was merged is needed no more.
        files.sweep();
        for (number, path) in frozen.iter().enumerate() {
            disk_files::share(path, &folder.join(disk_file(number)))?;
        }
        Ok(())
    }

    /// Takes it back, if the monitor is sure not to know of it; says whether that was done.
    fn give_up(self) -> bool {
        !self.asked && self.before.take_back().is_ok()
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
