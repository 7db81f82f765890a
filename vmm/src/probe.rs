//! Whether a KVM runs Linux guests, found out by running a throw-away guest.
//!
//! Not every `/dev/kvm` does. On some hosts it opens and passes every capability check although the processor has no
//! virtualization extension: guest kernel code is then interpreted by the instruction emulator of the host's KVM, a
//! hundred times slower than hardware, and dies at the first instruction that the emulator lacks. CPU flags do not
//! tell, nor does the kernel's log without rights; so this measures. [`instructions`] tries what Linux uses,
//! and a loop is timed, each in a [`guest`] of 64 KiB.

mod guest;
mod instructions;

use guest::{Guest, Outcome};
use kvm_ioctls::Kvm;
use std::fmt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Below this a KVM interprets. Measured: the emulator runs two to ten million ring-0 instructions a second, nested
/// virtualization on a processor that is itself emulated, on a busy machine, 200 to 400 million, hardware over a
/// thousand million.
const SLOWEST_VIRTUALIZATION: u64 = 30_000_000;

/// The loop is timed several times, of which the best counts: others may be using the processor.
const TIMED_RUNS: u32 = 4;

/// A timed run of the loop takes at least this.
const LONG_ENOUGH: Duration = Duration::from_millis(20);

/// A guest that has not come back by then never will; all of them together take under a second.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why the probe came to no verdict.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// An ioctl failed.
    #[error("cannot {what} for the probe's guest")]
    Kvm {
        /// What was wanted from KVM.
        what: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// mmap.
    #[error("cannot map 64 KiB for the probe's guest")]
    Memory(#[source] vm_memory::mmap::FromRangesError),
    /// The code does not fit.
    #[error("cannot write the code of the probe's guest")]
    Fill(#[source] vm_memory::GuestMemoryError),
    /// The thread of the vCPU.
    #[error("cannot start a thread for the probe's guest")]
    Thread(#[source] std::io::Error),
    /// The timed loop ended in another way than its last instruction.
    #[error("KVM cannot run a loop of two instructions: {0}")]
    Loop(String),
    /// No answer before the deadline.
    #[error("the probe's guest did not come back within {0:?}; KVM on this host is broken")]
    Stuck(Duration),
}

/// What the throw-away guests found.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Ring-0 instructions that one vCPU executes in a second.
    pub instructions_per_second: u64,
    /// Instructions that Linux uses and that did not work.
    pub missing: Vec<&'static str>,
    /// The verdict: whether Linux guests run, at a speed to be used.
    pub runs_linux: bool,
}

impl Report {
    /// The verdict over what was measured.
    fn new(instructions_per_second: u64, missing: Vec<&'static str>) -> Self {
        let runs_linux = missing.is_empty() && instructions_per_second >= SLOWEST_VIRTUALIZATION;
        Self {
            instructions_per_second,
            missing,
            runs_linux,
        }
    }

    /// Whether Linux guests run, at a speed to be used.
    pub fn runs_linux(&self) -> bool {
        self.runs_linux
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interprets = self.instructions_per_second < SLOWEST_VIRTUALIZATION;
        let millions = self.instructions_per_second as f64 / 1e6;
        write!(
            f,
            "KVM here {} guest code: {millions:.*} million ring-0 instructions a second",
            if interprets { "interprets" } else { "executes" },
            usize::from(millions < 100.0),
        )?;
        if !self.missing.is_empty() {
            write!(f, ", and lacks {}", self.missing.join(", "))?;
        }
        if self.runs_linux {
            return write!(f, ": Linux guests run");
        }
        let fate = if self.missing.is_empty() {
            "would take hours to boot"
        } else {
            "will not boot"
        };
        write!(
            f,
            ": Linux guests {fate}. Use a host whose processor offers VMX or SVM (in a virtual machine: switch on \
             nested virtualization)"
        )
    }
}

/// Runs the throw-away guests on `kvm`; takes under a second, and returns in any case.
///
/// # Errors
/// When KVM refuses to make a guest, or a guest does not come back; a KVM that runs guests badly is no error but a
/// [`Report`].
pub fn probe(kvm: &Kvm) -> Result<Report, ProbeError> {
    // Every check gets a guest of its own: one that failed may be in any state.
    let timed = Guest::new(kvm, instructions::COUNT_DOWN)?;
    let checks = instructions::needed(guest::has_xsave(kvm)?)
        .into_iter()
        .map(|check| Ok((check.name, Guest::new(kvm, check.code)?)))
        .collect::<Result<Vec<_>, ProbeError>>()?;
    // A vCPU that spins cannot be stopped without a signal, whose handler would be the whole process's. A thread that
    // is left behind owns all it uses, and goes with the process.
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || {
            // Nobody listens after the deadline.
            let _ = sender.send(run(timed, checks));
        })
        .map_err(ProbeError::Thread)?;
    receiver
        .recv_timeout(DEADLINE)
        .map_err(|_| ProbeError::Stuck(DEADLINE))?
}

fn run(timed: Guest, checks: Vec<(&'static str, Guest)>) -> Result<Report, ProbeError> {
    let mut missing = Vec::new();
    for (name, mut guest) in checks {
        if guest.run(0)? != Outcome::Passed {
            missing.push(name);
        }
    }
    Ok(Report::new(time_loop(timed)?, missing))
}

/// Instructions per second. Never runs long: each run is at most eight times one that was too short.
fn time_loop(mut guest: Guest) -> Result<u64, ProbeError> {
    let mut iterations: u64 = 10_000;
    let mut best = 0;
    let mut runs = 0;
    while runs < TIMED_RUNS {
        let start = Instant::now();
        match guest.run(iterations)? {
            Outcome::Passed => {}
            Outcome::Failed(how) => return Err(ProbeError::Loop(how)),
        }
        let took = start.elapsed();
        if took < LONG_ENOUGH {
            iterations *= 8;
        } else {
            best = best.max(rate(iterations * instructions::COUNT_DOWN_LENGTH, took));
            runs += 1;
        }
    }
    Ok(best)
}

fn rate(instructions: u64, took: Duration) -> u64 {
    (instructions as f64 / took.as_secs_f64()) as u64
}

#[cfg(test)]
mod tests;
