//! `lighter stop` and `lighter restart`.

use super::Target;
use super::options::MachineOptions;
use super::start::{self, Following};
use crate::autostart::{self, Autostart};
use crate::client::{Client, Ended, wait_until_gone};
use crate::docker_context;
use crate::error::{Code, Error, Result};
use crate::lock::{Lock, is_held};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::supervisor::STOP_TIMEOUT;
use crate::supervisor::suspension::is_suspended;
use crate::templates::fresh::TemplateOptions;
use crate::vm::Vm;
use clap::Args;
use lighter_protocol::monitor::StopReason;
use lighter_protocol::supervisor::Request;
use std::time::{Duration, Instant};

/// What the supervisor may take on top of the guest's time: telling the monitor, killing it, cleaning up.
const SLACK: Duration = Duration::from_secs(300);

/// Arguments.
#[derive(Debug, Args)]
pub struct Stop {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    how: How,
}

/// How to stop.
#[derive(Clone, Copy, Debug, Args)]
pub struct How {
    /// Pull the plug at once: containers are not stopped
    #[arg(short, long)]
    force: bool,
    /// Pull the plug when the guest has not shut down after this many seconds
    #[arg(short, long, value_name = "SECONDS", default_value_t = STOP_TIMEOUT.as_secs(), value_parser = clap::value_parser!(u64).range(0..=31_536_000))]
    timeout: u64,
}

/// Arguments.
#[derive(Debug, Args)]
pub struct Restart {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    options: MachineOptions,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    following: Following,
}

impl Stop {
    /// Stops the VM. One that is not running is left alone.
    ///
    /// # Errors
    /// When there is no such VM, or it does not end.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        let progress = Progress::new(true);
        progress.say(&format!("{}: shutting down", vm.name));
        let ran = stop(&vm, self.how, &progress)?;
        if Autostart::of(&vm.paths).is_some() {
            // One that has crashed is about to be started again. Where systemd is not there, nothing is.
            let _ = autostart::systemd::run(&["stop", &autostart::service(&vm)]);
        }
        let on_demand = Autostart::on_demand(&vm.paths);
        let state = match (ran, is_suspended(&vm.paths)) {
            (true, true) if !on_demand => {
                Some("suspended and stays so, and does not go on when it is used any more")
            }
            (_, true) => Some("suspended, and stays so"),
            (false, false) => Some("not running"),
            (true, false) => None,
        };
        if let Some(state) = state {
            progress.note(&format!("VM {} is {state}", vm.name));
        }
        if on_demand {
            progress.note(&autostart::still_listens(&vm));
            return Ok(());
        }
        if let Err(why) = docker_context::change(paths, |contexts, lock| contexts.deselect(&vm, lock)) {
            progress.note(&why);
        }
        Ok(())
    }
}

impl Restart {
    /// Stops the VM if it runs, and starts it.
    ///
    /// # Errors
    /// When there is no such VM, it does not end, or it does not start.
    pub fn run(self, paths: &Paths) -> Result<()> {
        let vm = Vm::load(paths, &self.target.name)?;
        stop(&vm, self.how, &Progress::new(true))?;
        let how = start::How {
            options: &self.options,
            boot: false,
            template: TemplateOptions::default(),
            following: &self.following,
        };
        start::start(paths, &vm.name, &how)
    }
}

impl How {
    /// Pull the plug.
    pub const FORCE: Self = Self {
        force: true,
        timeout: 0,
    };
}

/// Stops a VM and waits until nothing of it runs. Returns whether it ran.
///
/// # Errors
/// When it does not end.
pub fn stop(vm: &Vm, how: How, progress: &Progress) -> Result<bool> {
    let ran = match connect(vm)? {
        Some(client) => {
            ask_and_wait(vm, client, how, progress)?;
            true
        }
        None => false,
    };
    // A supervisor that was killed leaves its sockets. On a disk that has failed there is no lock, but the VM is stopped all the same.
    if let Ok(Some(_edit)) = Lock::try_acquire(&vm.paths.edit_lock)
        && !is_held(&vm.paths.life_lock())
    {
        vm.remove_runtime();
    }
    Ok(ran)
}

/// Connects to the supervisor of `vm`, or returns `None` when there is none.
fn connect(vm: &Vm) -> Result<Option<Client>> {
    if let Some(client) = Client::connect(vm) {
        return Ok(Some(client));
    }
    if !is_held(&vm.paths.life_lock()) {
        return Ok(None);
    }
    // It is just beginning, which is over when the edit lock is free, or just ending.
    drop(Lock::acquire(&vm.paths.edit_lock)?);
    let client = Client::connect(vm);
    if client.is_none() {
        wait_until_gone(vm);
    }
    Ok(client)
}

fn ask_and_wait(vm: &Vm, mut client: Client, how: How, progress: &Progress) -> Result<()> {
    let asked = client.send(&Request::Stop {
        force: how.force,
        timeout_s: how.timeout,
    });
    if asked.is_err() {
        wait_until_gone(vm);
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(how.timeout) + SLACK;
    let last = match client.wait_for_end(Some(deadline))? {
        Ended::Gone(last) => last,
        Ended::TimedOut(last) => {
            let pid = last.map_or(String::new(), |status| {
                format!(" (process {})", status.supervisor_pid)
            });
            let message = format!("VM {} does not end: its supervisor{pid} does not react", vm.name);
            return Err(Error::new(Code::Timeout, message)
                .hint("kill that process: the monitor dies with it, and the next start repairs the rest"));
        }
    };
    wait_until_gone(vm);
    if let Some(status) = last
        && let Some(end) = status.end
    {
        if end.reason == StopReason::Requested && !how.force && status.agent_version.is_some() {
            progress.note(&format!(
                "the guest of VM {} did not shut down within {} s; the plug was pulled",
                vm.name, how.timeout
            ));
        } else if !end.is_clean() {
            progress.note(&format!("VM {}: {}", vm.name, end.sentence()));
        }
    }
    Ok(())
}
