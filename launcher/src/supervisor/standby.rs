//! The lives of a VM in one supervisor: it runs, suspends by itself when it is idle, and goes on when it is used.
//!
//! In between there is no monitor and no passt. The supervisor stands by: the engine's socket and those of published ports stay
//! open, and who comes to them wakes the VM.

use super::demand::Demand;
use super::host_clock::Jumps;
use super::ports::random;
use super::signals::Signals;
use super::snapshot::Snapshots;
use super::state::State;
use super::usage::Usage;
use super::{Lasting, Supervisor, failed};
use crate::boot::Begin;
use crate::error::{Error, say};
use crate::paths::Paths;
use crate::supervisor::suspension::is_suspended;
use crate::vm::Vm;
use lighter_protocol::monitor::StopReason;
use lighter_protocol::supervisor::{End, Phase, SnapshotAnswer};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long sockets are kept that no proxy has asked for once the engine is ready.
const REQUESTS: Duration = Duration::from_secs(60);

/// After a VM has not gone on when it was used: whoever tries again and again does not keep the host busy.
const PAUSE: Duration = Duration::from_secs(1);

/// Before a VM that cannot be saved is tried again.
const RETRY: Duration = Duration::from_secs(300);

/// How long the last tasks of a monitor that has ended may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// How a life has ended.
pub(super) struct Outcome {
    /// Why.
    pub end: End,
    /// It is to go on when it is used.
    pub stands_by: bool,
}

/// Runs `vm` until it is over; returns why it is.
pub(super) async fn live(
    paths: &Paths,
    vm: &Vm,
    begin: Begin<'_>,
    lasting: &Lasting,
    demands: (mpsc::Sender<Demand>, mpsc::Receiver<Demand>),
) -> End {
    let Lasting {
        state, ports, usage, ..
    } = lasting;
    let (sender, mut demands) = demands;
    let mut signals = Signals::new();
    let jumps = match Jumps::new() {
        Ok(jumps) => jumps,
        Err(error) => return failed(Error::failure(format!("cannot watch the host's clock: {error}"))),
    };
    // They are its own while it is suspended, too.
    let random_ports = random::reserve();
    let mut goes_on = false;
    let mut begin = Some(begin);
    loop {
        let started = Supervisor::start(
            paths,
            vm,
            begin.take().unwrap_or(Begin::Boot),
            lasting,
            random_ports.as_ref(),
            sender.clone(),
        )
        .await;
        let Outcome { end, stands_by } = match started {
            Ok(supervisor) => supervisor.run(&mut demands, &mut signals, &jumps).await,
            Err(error) => Outcome {
                end: failed(error),
                stands_by: false,
            },
        };
        if !is_suspended(&vm.paths) || !stands_by && (!goes_on || end.requested) {
            return end;
        }
        // Their sockets are kept already.
        let _ = timeout(FAREWELL, ports.until_given_up()).await;
        usage.closed();
        match stands_by {
            true => state.stands_by(vm, None),
            false => {
                not_woken(vm, lasting, &end);
                sleep(PAUSE).await;
            }
        }
        if !stand_by(lasting, &mut demands, &mut signals).await {
            return End {
                reason: StopReason::Requested,
                requested: true,
                unix_ms: crate::clock::unix_ms(),
                hint: None,
                last_lines: vec![],
            };
        }
        goes_on = true;
        state.wakes(vm);
        usage.open();
    }
}

/// The VM has not gone on: that is told, and whoever waits is turned away.
fn not_woken(vm: &Vm, lasting: &Lasting, end: &End) {
    let hint = end
        .hint
        .as_ref()
        .map_or(String::new(), |hint| format!("; {hint}"));
    let failure = format!("the VM was used and did not go on: {}{hint}", end.sentence());
    say(format_args!("lighter: {failure}"));
    lasting.state.stands_by(vm, Some(&failure));
    lasting.ports.turn_away();
}

/// Waits until the VM runs, or does not go on although it is used.
pub(super) async fn runs(state: &State, usage: &Usage) {
    let mut watch = state.watch();
    let failures = watch.borrow().wake_failures;
    tokio::select! {
        () = usage.opened() => {}
        _ = watch.wait_for(|status| status.wake_failures != failures) => {}
    }
}

/// Waits until somebody uses the VM; `false` when the supervisor is to end instead.
async fn stand_by(lasting: &Lasting, demands: &mut mpsc::Receiver<Demand>, signals: &mut Signals) -> bool {
    let port = lasting.ports.wanted();
    tokio::pin!(port);
    let mut watched = true;
    loop {
        tokio::select! {
            () = lasting.usage.wanted() => return true,
            wanted = &mut port, if watched => match wanted {
                Ok(()) => return true,
                Err(error) => {
                    say(format_args!("lighter: published ports do not wake the VM: cannot watch their sockets: {error}"));
                    watched = false;
                }
            },
            demand = demands.recv() => match demand {
                // It comes from what has been done already.
                Some(Demand::StandBy) => {}
                Some(Demand::StandDown(answer)) => {
                    let _ = answer.send(true);
                    return false;
                }
                Some(Demand::Stop(_)) | None => return false,
            },
            () = signals.end() => return false,
        }
    }
}

/// What became of an idle VM.
enum Attempt {
    Suspended,
    /// Somebody has come meanwhile.
    Used,
    /// It cannot be saved, and goes on.
    Failed,
}

/// Suspends the VM when it has been idle for as long as its settings say.
#[derive(Debug)]
pub(super) struct IdleWatch {
    pub name: String,
    pub lasting: Lasting,
    pub demands: mpsc::Sender<Demand>,
}

impl IdleWatch {
    /// Until the VM is suspended.
    pub(super) async fn run(self) {
        let Lasting {
            state,
            ports,
            snapshots,
            usage,
            ..
        } = &self.lasting;
        let began = std::time::Instant::now();
        ready(state).await;
        usage.touch();
        // Who was there when the VM was suspended has asked by then.
        let close = async {
            sleep(REQUESTS).await;
            ports.close_kept(began);
            std::future::pending().await
        };
        let suspend = async {
            let Some(after) = self.lasting.suspends_after else {
                return std::future::pending().await;
            };
            loop {
                until_idle(state, usage, after).await;
                if !usage.close_if_idle(state.phase() == Phase::Ready, after) {
                    continue;
                }
                ports.close_kept(began);
                match self.suspend(snapshots, state, usage).await {
                    Attempt::Suspended => return,
                    Attempt::Used => usage.open(),
                    Attempt::Failed => {
                        usage.open();
                        sleep(RETRY).await;
                    }
                }
            }
        };
        tokio::select! {
            () = suspend => {}
            () = close => {}
        }
    }

    /// Suspends it, unless somebody comes or it cannot be saved.
    async fn suspend(&self, snapshots: &Snapshots, state: &State, usage: &Usage) -> Attempt {
        if !usage.all_kept().await || self.lasting.ports.is_wanted() {
            return Attempt::Used;
        }
        match snapshots.suspend(state).await {
            SnapshotAnswer::Taken(_) => {
                usage.closed();
                let _ = self.demands.send(Demand::StandBy).await;
                Attempt::Suspended
            }
            SnapshotAnswer::Failed { reason, hint } => {
                let hint = hint.map_or(String::new(), |hint| format!("; {hint}"));
                let failure = format!("VM {} is idle and cannot be suspended: {reason}{hint}", self.name);
                say(format_args!("lighter: {failure}"));
                state.trouble("auto-suspend", &failure);
                Attempt::Failed
            }
        }
    }
}

async fn ready(state: &State) {
    // Its sender is here.
    let _ = state
        .watch()
        .wait_for(|status| status.phase == Phase::Ready)
        .await;
}

/// Until the VM has been idle for as long as `after`.
async fn until_idle(state: &State, usage: &Usage, after: Duration) {
    loop {
        let changes = usage.changes();
        if state.phase() != Phase::Ready {
            ready(state).await;
            usage.touch();
        }
        let due = usage
            .idle_since(true)
            .map(|since| Instant::from_std(since + after));
        match due {
            Some(due) if due <= Instant::now() => return,
            Some(due) => tokio::select! {
                () = changes => {}
                () = sleep_until(due) => {}
            },
            None => changes.await,
        }
    }
}
