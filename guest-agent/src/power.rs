//! Requests to power off, from wherever they come.

use std::{fmt, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use crate::log::Log;

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The supervisor.
    Supervisor,
    /// The ACPI power button.
    PowerButton,
    /// SIGTERM to PID 1, or ctrl-alt-del, which PID 1 passes on.
    Signal,
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Supervisor => "the supervisor asked for it",
            Self::PowerButton => "the power button was pressed",
            Self::Signal => "init was asked to",
        })
    }
}

/// A request to power off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asked.
    pub reason: Reason,
    /// The longest that containers get between SIGTERM and SIGKILL; `None` leaves it to Docker.
    pub container_grace: Option<Duration>,
}

impl Request {
    /// A request that leaves the containers' time to Docker.
    pub fn from(reason: Reason) -> Self {
        Self {
            reason,
            container_grace: None,
        }
    }
}

/// Turns SIGTERM into a request.
pub async fn watch_signals(power: mpsc::Sender<Request>, log: Log) {
    let mut terminate = match signal(SignalKind::terminate()) {
        Ok(terminate) => terminate,
        Err(error) => return log.error(format!("cannot watch for SIGTERM: {error}")),
    };
    while terminate.recv().await.is_some() {
        // Full only when a shutdown is under way.
        let _ = power.try_send(Request::from(Reason::Signal));
    }
}
