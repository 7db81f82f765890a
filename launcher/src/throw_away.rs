//! VMs that live as long as the process that started them, and leave nothing.

use crate::boot;
use crate::client::{Client, wait_until_gone};
use crate::disk::DiskSource;
use crate::error::{Code, Error, Result};
use crate::lock::{self, Lock, is_held};
use crate::mounts::Mount;
use crate::name::Name;
use crate::paths::{Paths, create_private};
use crate::progress::Progress;
use crate::snapshots::store;
use crate::templates::fresh::{self, Templates};
use crate::vm::{self, Settings, Vm};
use lighter_protocol::supervisor::Status;
use std::path::PathBuf;
use std::time::Instant;

/// A running throw-away VM. Its supervisor ends and removes it when this is dropped, or when this process ends, however.
#[derive(Debug)]
pub struct ThrowAway {
    /// The VM.
    pub vm: Vm,
    /// Its status when the engine answered.
    pub status: Box<Status>,
    /// When the engine answered, CLOCK_MONOTONIC, nanoseconds.
    pub answered_ns: u64,
    client: Client,
}

impl ThrowAway {
    /// The name of the VM that this process starts with `prefix`.
    ///
    /// # Errors
    /// When `prefix` does not make a name.
    pub fn name(prefix: &str) -> Result<Name> {
        let name = format!("{prefix}-{}", std::process::id());
        name.parse().map_err(|error| Error::of(Code::Failure, &error))
    }

    /// As [`Self::start`], with a VM that boots and has nothing to do with templates.
    ///
    /// # Errors
    /// Why it does not run.
    pub fn boot(
        paths: &Paths,
        prefix: &str,
        settings: Settings,
        deadline: Instant,
        progress: &Progress,
    ) -> Result<Self> {
        Self::start(paths, prefix, settings, Templates::Avoided, deadline, progress)
    }

    /// As [`Self::boot`], with the folder that [`Self::shared`] tells, which is in the VM's own and goes with it, instead of
    /// those in `settings`.
    ///
    /// # Errors
    /// Why it does not run.
    pub fn boot_with_folder(
        paths: &Paths,
        prefix: &str,
        settings: Settings,
        deadline: Instant,
        progress: &Progress,
    ) -> Result<Self> {
        let folder = Self::shared(paths, prefix)?;
        let mount = folder.display().to_string().parse::<Mount>()?;
        let settings = Settings {
            mounts: Some(vec![mount]),
            ..settings
        };
        let prepare = || create_private(&folder).map_err(Error::from);
        Self::start_prepared(
            paths,
            prefix,
            settings,
            &prepare,
            Templates::Avoided,
            deadline,
            progress,
        )
    }

    /// The folder of [`Self::boot_with_folder`].
    ///
    /// # Errors
    /// When `prefix` does not make a name.
    pub fn shared(paths: &Paths, prefix: &str) -> Result<PathBuf> {
        Ok(paths.vm(&Self::name(prefix)?).data.join("shared"))
    }

    /// Starts a VM of `settings` with a name that begins with `prefix`, and waits for its engine.
    ///
    /// # Errors
    /// Why it does not run.
    pub fn start(
        paths: &Paths,
        prefix: &str,
        settings: Settings,
        templates: Templates,
        deadline: Instant,
        progress: &Progress,
    ) -> Result<Self> {
        Self::start_prepared(paths, prefix, settings, &|| Ok(()), templates, deadline, progress)
    }

    /// As [`Self::start`]; `prepare` is called when there is the VM's folder.
    fn start_prepared(
        paths: &Paths,
        prefix: &str,
        settings: Settings,
        prepare: &dyn Fn() -> Result<()>,
        templates: Templates,
        deadline: Instant,
        progress: &Progress,
    ) -> Result<Self> {
        paths.create_vms()?;
        sweep(paths)?;
        let settings = Settings {
            throw_away: true,
            ..settings
        };
        let name = Self::name(prefix)?;
        let files = paths.vm(&name);
        files.check_socket_paths()?;
        let edit = Lock::acquire(&files.edit_lock)?;
        let vm = Vm::create(paths, &name, settings, DiskSource::New)?;
        let started = prepare().and_then(|()| fresh::start(paths, &vm, edit, templates, deadline, progress));
        let (client, first) = started.inspect_err(|_| {
            // Nobody took the VM over. What cannot be removed now is by the next.
            let _ = sweep(paths);
            lock::sweep(&vm.paths.edit_lock);
        })?;
        Self::follow(vm, client, first, deadline, progress)
    }

    /// Waits for the engine of a throw-away VM that `client` started. Nothing is left of one that does not answer.
    ///
    /// # Errors
    /// Why it does not.
    pub fn follow(
        vm: Vm,
        mut client: Client,
        first: Box<Status>,
        deadline: Instant,
        progress: &Progress,
    ) -> Result<Self> {
        match boot::follow(&vm, &mut client, first, deadline, progress) {
            Ok((status, answered_ns)) => Ok(Self {
                vm,
                status,
                answered_ns,
                client,
            }),
            Err(error) => {
                end(&vm, &mut client);
                Err(error)
            }
        }
    }

    /// The monitor's process id.
    ///
    /// # Errors
    /// When the supervisor does not tell it.
    pub fn monitor_pid(&self) -> Result<u32> {
        self.status
            .monitor_pid
            .ok_or_else(|| Error::failure("the supervisor does not tell the monitor's process id"))
    }

    /// Ends several, all at once.
    pub fn end_all(engines: Vec<Self>) {
        for engine in &engines {
            engine.client.hang_up();
        }
        drop(engines);
    }
}

impl Drop for ThrowAway {
    fn drop(&mut self) {
        end(&self.vm, &mut self.client);
    }
}

fn end(vm: &Vm, client: &mut Client) {
    client.hang_up();
    let _ = client.wait_for_end(None);
    wait_until_gone(vm);
    lock::sweep(&vm.paths.edit_lock);
}

/// Removes what is left of throw-away VMs whose supervisor was killed, and of what was being made of them.
fn sweep(paths: &Paths) -> Result<()> {
    store::sweep(paths);
    for name in vm::list(paths)? {
        let Ok(vm) = Vm::load(paths, &name) else { continue };
        if !vm.settings.throw_away || is_held(&vm.paths.life_lock()) {
            continue;
        }
        // Whoever holds it is just starting the VM.
        if let Some(edit) = Lock::try_acquire(&vm.paths.edit_lock)?
            && !is_held(&vm.paths.life_lock())
            && vm.remove().is_ok()
        {
            edit.remove();
        }
    }
    Ok(())
}
