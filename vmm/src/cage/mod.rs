//! The cage: what keeps this process from the rest of the host when a guest has taken it over.
//!
//! The process is given its descriptors and needs nothing else. It goes into the cage when it has opened what only a path leads to,
//! and before any of the guest's code runs:
//!
//! 1. [`processes`]: no other's process has a number, from the first moment on;
//! 2. [`namespaces`]: an empty root, no network, no other's IPC, while there is one thread;
//! 3. [`limits`]: no more memory and no more processes than it needs, no core files;
//! 4. each thread, when it begins: [`privileges`] are given up, then [`reach`] (Landlock), then [`filters`] (seccomp) by what the
//!    thread is for.
//!
//! A layer that this host does not have is reported, and refused by a VM that is `strict`. `docs/security.md` says what each is
//! for.

pub mod filters;
pub mod limits;
pub mod namespaces;
pub mod privileges;
pub mod processes;
pub mod reach;

use crate::virtio::device_type;
use crate::virtio::worker::Prepare;
use filters::{Duty, Mode};
use lighter_protocol::monitor::{Cage as Report, Layer};
use namespaces::OldRoot;
use processes::Standing;
use std::io;

/// For measurements: `off` runs without a cage.
const VARIABLE: &str = "LIGHTER_CAGE";

/// Why the process cannot be caged.
#[derive(Debug, thiserror::Error)]
pub enum CageError {
    /// The variable has another value.
    #[error("{0} is set to {1:?}; {2}")]
    Variable(&'static str, String, &'static str),
    /// A layer that the host has did not come about.
    #[error("cannot {0}")]
    Step(&'static str, #[source] io::Error),
    /// Layers are missing, and the VM is strict.
    #[error("the VM is strict, and this host does not have all layers of its cage: {0}")]
    Strict(String),
}

/// The cage that this process is in; threads go into theirs by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cage {
    mode: Mode,
    /// It runs as the host's root, so its threads for shared folders keep what that may do with files.
    roots_files: bool,
}

/// Whether there is to be none, by the environment.
fn is_off() -> Result<bool, CageError> {
    match std::env::var(VARIABLE) {
        Err(_) => Ok(false),
        Ok(value) if value == "off" => Ok(true),
        Ok(value) => Err(CageError::Variable(
            VARIABLE,
            value,
            "it can be `off`, or not be set",
        )),
    }
}

/// A process that is going into its cage: until it is there, no guest may run.
#[derive(Debug)]
pub struct Entering {
    cage: Cage,
    report: Report,
    old_root: Option<OldRoot>,
}

impl Entering {
    /// For the process's threads.
    pub fn cage(&self) -> Cage {
        self.cage
    }

    /// Waits until the process is in its cage. Says what this host has of it.
    ///
    /// # Errors
    /// When a layer is missing, and the VM is `strict`.
    pub fn wait(self, strict: bool) -> Result<Report, CageError> {
        let mut report = self.report;
        if let Some(Err(error)) = self.old_root.map(OldRoot::wait_gone) {
            report.namespaces = Layer::Missing {
                why: error.to_string(),
            };
        }
        let holes = report.holes();
        match strict && !holes.is_empty() {
            true => Err(CageError::Strict(holes.join(", "))),
            false => Ok(report),
        }
    }
}

impl Cage {
    /// No cage, for a process that only runs tests.
    pub const OPEN: Self = Self {
        mode: Mode::Off,
        roots_files: false,
    };

    /// Puts the process, which must have one thread and stand where [`processes::split`] has brought it, into its cage; the calling
    /// thread has still to go into its own. It may have `memory` bytes of memory.
    ///
    /// # Errors
    /// When a layer fails that the host has.
    pub fn enter(memory: u64, standing: Standing) -> Result<Entering, CageError> {
        let off = is_off()?;
        let mode = if off { Mode::Off } else { Mode::from_environment()? };
        let missing = |why: &str| Layer::Missing { why: why.to_owned() };
        if off {
            let why = "LIGHTER_CAGE=off";
            let report = Report {
                namespaces: missing(why),
                landlock: missing(why),
                seccomp: missing(why),
            };
            return Ok(Entering {
                cage: Self::OPEN,
                report,
                old_root: None,
            });
        }
        let entered = namespaces::enter(&standing);
        let Standing {
            is_root: roots_files,
            refused,
            ..
        } = standing;
        limits::set(memory, entered.is_ok() && !roots_files)
            .map_err(|error| CageError::Step("limit the process", error))?;
        privileges::never_more().map_err(|error| CageError::Step("forbid new privileges", error))?;
        let (old_root, namespaces) = match (entered, refused) {
            (Ok(old_root), None) => (Some(old_root), Layer::On),
            (Ok(old_root), Some(error)) => (Some(old_root), missing(&error.to_string())),
            (Err(error), _) => (None, missing(&error.to_string())),
        };
        let landlock = match reach::is_possible() {
            true => Layer::On,
            false => missing("this host's kernel has no Landlock, or it is not switched on"),
        };
        let seccomp = match mode {
            Mode::Kill => Layer::On,
            Mode::Log | Mode::Off => missing("LIGHTER_SECCOMP=log"),
        };
        Ok(Entering {
            cage: Self { mode, roots_files },
            report: Report {
                namespaces,
                landlock,
                seccomp,
            },
            old_root,
        })
    }

    /// What a device's thread does first: `reach` is what its device has it do to reach no more than it needs.
    pub fn prepare(self, device_type: u32, reach: Prepare) -> Prepare {
        let duty = match device_type {
            device_type::BLOCK => Duty::Block,
            device_type::NET => Duty::Net,
            device_type::VSOCK => Duty::Vsock,
            device_type::FS => Duty::Fs,
            _ => Duty::Memory,
        };
        Box::new(move || {
            if self == Self::OPEN {
                // A shared folder's thread needs its place.
                return if duty == Duty::Fs { reach() } else { Ok(()) };
            }
            privileges::give_up(self.roots_files && duty == Duty::Fs)?;
            reach()?;
            filters::apply(duty, self.mode)
        })
    }

    /// Puts the calling thread, which serves no device, into its cage.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn confine(self, duty: Duty) -> io::Result<()> {
        if self == Self::OPEN {
            return Ok(());
        }
        privileges::give_up(false)?;
        reach::nothing()?;
        filters::apply(duty, self.mode)
    }
}
