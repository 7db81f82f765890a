//! Signals to the supervisor.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Those that it does not die of.
#[derive(Debug)]
pub struct Signals {
    terminate: Option<Signal>,
    interrupt: Option<Signal>,
    hangup: Option<Signal>,
}

impl Signals {
    /// From now on.
    pub fn new() -> Self {
        let watch = |kind| signal(kind).ok();
        Self {
            terminate: watch(SignalKind::terminate()),
            interrupt: watch(SignalKind::interrupt()),
            hangup: watch(SignalKind::hangup()),
        }
    }

    /// Until one comes that asks for the end. The terminal of whoever started this is none of its business.
    pub async fn end(&mut self) {
        loop {
            tokio::select! {
                () = received(&mut self.terminate) => return,
                () = received(&mut self.interrupt) => return,
                () = received(&mut self.hangup) => {}
            }
        }
    }
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
