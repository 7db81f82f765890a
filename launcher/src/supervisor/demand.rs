//! What clients want of the supervisor.

use super::STOP_TIMEOUT;
use std::time::Duration;
use tokio::sync::oneshot;

/// Something for the supervisor to do.
#[derive(Debug)]
pub enum Demand {
    /// The VM is to end.
    Stop(StopRequest),
    /// It is suspended and stands still: its monitor is to end, and it is to go on when it is used.
    StandBy,
    /// The supervisor is to end if it stands by. It answers whether it does.
    StandDown(oneshot::Sender<bool>),
}

/// How the VM is to end.
#[derive(Clone, Copy, Debug)]
pub struct StopRequest {
    /// Pull the plug.
    pub force: bool,
    /// How long the guest may take otherwise.
    pub timeout: Duration,
}

impl StopRequest {
    /// At once.
    pub const PULL_THE_PLUG: Self = Self {
        force: true,
        timeout: Duration::ZERO,
    };

    /// As the guest likes.
    pub const GRACEFUL: Self = Self {
        force: false,
        timeout: STOP_TIMEOUT,
    };
}
