//! PID 1: starts the agent, reaps what is orphaned, and powers off when the agent is gone.
//!
//! The agent is a child of its own so that reaping "any child" here cannot steal the exit status of a process that
//! the agent waits for: the agent's children are not ours, orphans are.

use std::{
    fs::OpenOptions,
    io::Write,
    process::ExitCode,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        reboot::{RebootMode, reboot, set_cad_enabled},
        signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

use crate::agent;

/// How long processes get between SIGTERM and SIGKILL when the agent has died.
const LAST_GRACE: Duration = Duration::from_secs(30);

/// Runs PID 1. Returns only when the guest could not be powered off, which the kernel answers with a panic.
pub fn main() -> ExitCode {
    let signals = watched_signals();
    // Blocked before the fork, so that no signal is lost; the agent unblocks them for itself.
    if let Err(errno) = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None) {
        complain(&format!("cannot block signals: {errno}"));
    }
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            if let Err(errno) = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&signals), None) {
                complain(&format!("cannot unblock the agent's signals: {errno}"));
            }
            agent::main()
        }
        Ok(ForkResult::Parent { child }) => {
            let ended = watch(child, &signals);
            complain(&format!("the agent ended ({ended}); powering off"));
            end_everything();
            power_off()
        }
        Err(errno) => {
            complain(&format!("cannot start the agent: {errno}"));
            power_off()
        }
    }
}

fn watched_signals() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR] {
        set.add(signal);
    }
    set
}

/// Reaps until the agent ends; passes requests to power off (SIGTERM, ctrl-alt-del, SIGPWR) on to it.
fn watch(agent: Pid, signals: &SigSet) -> String {
    // Ctrl-alt-del is a request like the others, not an instant reset.
    if let Err(errno) = set_cad_enabled(false) {
        complain(&format!("cannot turn off ctrl-alt-del: {errno}"));
    }
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(ended) = reap(agent) {
                    return ended;
                }
            }
            // Fails only when the agent is gone, and then SIGCHLD follows.
            Ok(_) => {
                let _ = kill(agent, Signal::SIGTERM);
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return format!("PID 1 cannot wait for signals: {errno}"),
        }
    }
}

/// Reaps every child that has ended; how the agent ended if it was among them.
fn reap(agent: Pid) -> Option<String> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == agent => return Some(format!("exit status {code}")),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == agent => return Some(format!("{signal}")),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return None,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Some(format!("PID 1 cannot wait for children: {errno}")),
        }
    }
}

/// Ends all other processes, which are orphans by now: their files are then closed and can be synced.
fn end_everything() {
    let everyone = Pid::from_raw(-1);
    // Both fail only when there is no other process.
    let _ = kill(everyone, Signal::SIGTERM);
    let deadline = Instant::now() + LAST_GRACE;
    while waitpid(None, Some(WaitPidFlag::WNOHANG)) != Err(Errno::ECHILD) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let _ = kill(everyone, Signal::SIGKILL);
}

/// Syncs and powers off. The last resort when that fails is to end, on which the kernel panics.
fn power_off() -> ExitCode {
    nix::unistd::sync();
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF);
    complain(&format!("cannot power off: {errno}"));
    ExitCode::FAILURE
}

/// Writes to the kernel's log, which goes to the console; to stderr where there is no /dev yet.
fn complain(text: &str) {
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        Ok(mut kmsg) => drop(writeln!(kmsg, "<3>lighter-init: {text}")),
        Err(_) => drop(writeln!(std::io::stderr(), "lighter-init: {text}")),
    }
}
