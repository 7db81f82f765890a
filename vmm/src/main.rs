//! `lighter-vmm`: the monitor's command line. Meant to be started by `lighter`, which opens everything for it.

use clap::{Parser, Subcommand};
use lighter_protocol::causes::chain;
use lighter_protocol::monitor::{EventKind, Machine, StopReason};
use lighter_vmm::cage::filters::Duty;
use lighter_vmm::cage::processes::{self, Parent, Split, Standing};
use lighter_vmm::cage::{Cage, CageError};
use lighter_vmm::descriptors::Inherited;
use lighter_vmm::events::{Events, monotonic_ns};
use lighter_vmm::machine::{self, OnStop};
use lighter_vmm::{control, probe};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a process needs that only prints, bytes.
const PROBE_MEMORY: u64 = 256 << 20;

#[derive(Parser)]
#[command(version, about = "Lighter's monitor: one process, one microVM")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the VM that standard input describes as JSON, with the file descriptors it names inherited, in a process whose number is
    /// printed: a child of this one's parent, or this one itself
    Run,
    /// Go into the cage that a VM's monitor lives in, and say which of its layers this host has
    ProbeCage {
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Find out whether this host's KVM runs Linux guests, by trying (exit status 0: it does)
    ProbeKvm {
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let started_ns = monotonic_ns();
    // SAFETY: nothing in this process has opened a descriptor yet.
    let inherited = unsafe { Inherited::new() };
    match Arguments::parse().command {
        Command::Run => match run(started_ns, inherited) {
            Ok(code) => code,
            Err(reason) => {
                complain(&reason);
                ExitCode::FAILURE
            }
        },
        Command::ProbeKvm { json } => probe_kvm(json),
        Command::ProbeCage { json } => probe_cage(json),
    }
}

/// Runs a VM to its end. An error is one that cannot be sent as an event.
fn run(started_ns: u64, mut inherited: Inherited) -> Result<ExitCode, String> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| format!("cannot read the description: {error}"))?;
    let description: Machine =
        serde_json::from_str(&text).map_err(|error| format!("the description is not understood: {error}"))?;
    let standing = match processes::split(Parent::Its) {
        Split::Before(_) => return Ok(ExitCode::SUCCESS),
        Split::GoesOn(standing) => standing,
    };
    print_number()?;
    let take = |inherited: &mut Inherited, fd, what| inherited.take(fd, what).map_err(|error| chain(&error));
    let events = take(&mut inherited, description.events, "events")?;
    let events = Events::new(events).map_err(|error| format!("cannot send events: {error}"))?;
    events.send_at(started_ns, EventKind::ProcessStarted);
    let control = UnixListener::from(take(&mut inherited, description.control, "control socket")?);
    machine::report_devices(events.clone());
    prepare_process().map_err(|error| format!("cannot prepare the process: {error}"))?;
    let reason = run_machine(description, standing, &mut inherited, &events, &control);
    let failed = matches!(
        reason,
        StopReason::Failed { .. } | StopReason::GuestCrashed { .. }
    );
    events.send(EventKind::Stopped { reason });
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Prints the number that this process has outside of its namespace. Who started it waits for that; if nobody does any more, the one
/// whose end would have been this process's is gone.
fn print_number() -> Result<(), String> {
    let number =
        std::fs::read_link("/proc/self").map_err(|error| format!("cannot read /proc/self: {error}"))?;
    writeln!(std::io::stdout(), "{}", number.display())
        .map_err(|error| format!("cannot say which process this is: {error}"))
}

/// Lets the process have as many connections as it may, and makes a file size limit an error instead of its death.
fn prepare_process() -> std::io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is valid for reading and writing; SIG_IGN is a valid disposition. One heap for all threads: they allocate
    // little, and each heap of glibc's costs more than what is in it.
    let done = unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN) != libc::SIG_ERR
            && libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0
    };
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above.
    if !done || unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

fn run_machine(
    description: Machine,
    standing: Standing,
    inherited: &mut Inherited,
    events: &Events,
    control: &UnixListener,
) -> StopReason {
    let stopped = match EventFd::new(EFD_NONBLOCK) {
        Ok(stopped) => Arc::new(stopped),
        Err(error) => {
            return StopReason::Failed {
                detail: format!("cannot make an event: {error}"),
            };
        }
    };
    let (sender, reasons) = mpsc::channel();
    let signal = stopped.clone();
    let on_stop: OnStop = Arc::new(move |reason| {
        // The receiver lives as long as the machine; an eventfd counter never gets full from this.
        let _ = sender.send(reason);
        let _ = signal.write(1);
    });
    let machine = match machine::start(description, standing, inherited, events, on_stop) {
        Ok(machine) => machine,
        Err(error) => {
            return StopReason::Failed {
                detail: chain(&error),
            };
        }
    };
    match control::serve(machine, control, events, &stopped, &reasons) {
        Ok(reason) => reason,
        Err(error) => StopReason::Failed {
            detail: format!("cannot serve the control socket: {error}"),
        },
    }
}

/// Says why this process fails, if anybody still listens.
fn complain(reason: &str) {
    let _ = writeln!(std::io::stderr(), "lighter-vmm: {reason}");
}

fn probe_cage(json: bool) -> ExitCode {
    let standing = match processes::split(Parent::This) {
        Split::GoesOn(standing) => standing,
        Split::Before(probing) => return end_of(probing),
    };
    let enter = || {
        let entering = Cage::enter(PROBE_MEMORY, standing)?;
        let cage = entering.cage();
        let report = entering.wait(false)?;
        let confined = cage.confine(Duty::Main);
        confined.map_err(|error| CageError::Step("confine a thread", error))?;
        Ok::<_, CageError>(report)
    };
    let report = match enter() {
        Ok(report) => report,
        Err(error) => {
            complain(&chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let text = match json {
        true => serde_json::json!(report).to_string(),
        false => {
            let missing = Vec::from_iter(
                report
                    .missing()
                    .map(|(layer, why)| format!("without {layer}: {why}")),
            );
            if missing.is_empty() {
                "all layers".into()
            } else {
                missing.join("\n")
            }
        }
    };
    let _ = writeln!(std::io::stdout(), "{text}");
    match report.missing().next() {
        None => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
    }
}

/// Waits for the end of a child, and ends like it.
fn end_of(process: libc::pid_t) -> ExitCode {
    let mut status = 0;
    // SAFETY: `status` is valid for writing.
    let waited = unsafe { libc::waitpid(process, &raw mut status, 0) };
    match waited == process && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn probe_kvm(json: bool) -> ExitCode {
    let report = match kvm_ioctls::Kvm::new() {
        Ok(kvm) => probe::probe(&kvm).map_err(|error| chain(&error)),
        Err(error) => Err(format!("cannot open /dev/kvm: {error}")),
    };
    match report {
        Ok(report) => {
            let text = match json {
                true => serde_json::json!(report).to_string(),
                false => report.to_string(),
            };
            // The exit status says it as well to a reader that has gone away.
            let _ = writeln!(std::io::stdout(), "{text}");
            if report.runs_linux() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(reason) => {
            complain(&reason);
            ExitCode::FAILURE
        }
    }
}
