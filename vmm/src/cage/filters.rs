//! System call filters (seccomp(2)): a list of what each kind of thread may ask of the kernel, and death for all else.
//!
//! The lists are `filters.json`, in the format of seccompiler with a reason beside each rule; the build script compiles them.
//! `LIGHTER_SECCOMP=log` has the kernel's log tell what a thread asks for that is not in its list, instead of ending it.

use super::CageError;
use seccompiler::{BpfProgram, sock_filter};
use std::io;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

const VARIABLE: &str = "LIGHTER_SECCOMP";

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Requests of the supervisor.
    Main,
    /// A vCPU.
    Vcpu,
    /// A disk.
    Block,
    /// The network device.
    Net,
    /// The socket device.
    Vsock,
    /// A shared folder.
    Fs,
    /// The devices that have nothing but memory: random numbers and the balloon.
    Memory,
    /// A snapshot's pages are had ready.
    Prefetch,
}

/// What becomes of a call that is not in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The process is killed.
    Kill,
    /// The kernel's log tells of it.
    Log,
    /// There is no list.
    Off,
}

impl Mode {
    /// As the environment says.
    ///
    /// # Errors
    /// When it says something else.
    pub fn from_environment() -> Result<Self, CageError> {
        match std::env::var(VARIABLE) {
            Err(_) => Ok(Self::Kill),
            Ok(value) if value == "log" => Ok(Self::Log),
            Ok(value) => Err(CageError::Variable(
                VARIABLE,
                value,
                "it can be `log`, or not be set",
            )),
        }
    }
}

/// A list as the build script compiled it: an instruction is its code, two jumps, and its operand.
struct Filter {
    kill: &'static [(u16, u8, u8, u32)],
    log: &'static [(u16, u8, u8, u32)],
}

impl Duty {
    fn filter(self) -> &'static Filter {
        match self {
            Self::Main => &MAIN,
            Self::Vcpu => &VCPU,
            Self::Block => &BLOCK,
            Self::Net => &NET,
            Self::Vsock => &VSOCK,
            Self::Fs => &FS,
            Self::Memory => &MEMORY,
            Self::Prefetch => &PREFETCH,
        }
    }
}

/// Has the calling thread, and those that it makes, ask the kernel for what `duty` takes and for nothing else, for ever.
///
/// # Errors
/// When the kernel refuses the filter.
pub fn apply(duty: Duty, mode: Mode) -> io::Result<()> {
    let apply = |program: &[(u16, u8, u8, u32)]| {
        let instruction = |&(code, jt, jf, k): &(u16, u8, u8, u32)| sock_filter { code, jt, jf, k };
        let program: BpfProgram = program.iter().map(instruction).collect();
        seccompiler::apply_filter(&program).map_err(io::Error::other)
    };
    // Only the main thread makes others; for all else the call that is not there is death anyway.
    let filters = match duty {
        Duty::Main => vec![&NOT_THERE, duty.filter()],
        _ => vec![duty.filter()],
    };
    filters.into_iter().try_for_each(|filter| match mode {
        Mode::Off => Ok(()),
        Mode::Kill => apply(filter.kill),
        Mode::Log => apply(filter.log),
    })
}
