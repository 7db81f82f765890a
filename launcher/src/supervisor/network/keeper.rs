//! Keeps a passt running: one that ends is followed by another, and one that cannot be had yet is waited for. The guest sees its
//! cable pulled in between.

use super::DEVICE;
use super::passt::{self, Passt};
use super::routes::{Changes, DefaultRoutes};
use crate::error::{Context, Result, say};
use crate::supervisor::monitor;
use crate::supervisor::state::State;
use lighter_protocol::monitor::Request;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

/// A passt that has run for so long works.
const STEADY: Duration = Duration::from_secs(2);

/// So many in a row that did not are no accident.
const MOST_FAILURES: u32 = 5;

/// How long to wait before the next; longer after each failure.
const PAUSE: Duration = Duration::from_millis(200);

/// Without a word of the kernel's about routes, it is worth another look all the same: passt may have been installed meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// A passt that the main thread is to start, since it ends with the thread that starts it.
#[derive(Debug)]
pub struct Order {
    passt: Passt,
    answer: oneshot::Sender<Result<Child>>,
}

impl Order {
    /// Starts it.
    pub fn carry_out(self) {
        // If nobody waits any more, it ends at once.
        let _ = self.answer.send(passt::start(self.passt));
    }
}

/// What it takes to keep one running.
#[derive(Debug)]
pub struct Keeper {
    /// The monitor's control socket.
    pub monitor: PathBuf,
    /// Whether the guest reaches the host's loopback interface.
    pub host_access: bool,
    /// Who is told.
    pub state: State,
    /// To the main thread.
    pub orders: mpsc::Sender<Order>,
}

impl Keeper {
    /// Starts `first` when the guest has sent something, and goes on as [`Keeper::run`]. A guest that goes on from its memory says
    /// nothing of its own, and answers its first client sooner while nothing else is being started; many never send anything.
    pub async fn run_on_demand(self, first: Passt) {
        let started = match first.wanted().await {
            Ok(()) => self.order(first).await,
            Err(error) => Err(error),
        };
        self.run(Some(started)).await;
    }

    /// Watches over `first`, if there could be one, and over those that follow. It ends when there is to be none any more.
    pub async fn run(self, first: Option<Result<Child>>) {
        let mut next = first;
        let mut failures = 0;
        loop {
            let started = match next.take() {
                Some(started) => started,
                None => self.another().await,
            };
            let end = match started {
                Ok(child) => self.watch(child, &mut failures).await,
                Err(error) => Some(error.message),
            };
            self.state.network(None);
            let Some(end) = end else { continue };
            failures += 1;
            if failures >= MOST_FAILURES {
                return self.give_up(&end).await;
            }
            let reason = format!("{end}; another one is being started");
            // The next may be there before anybody has looked.
            say(format_args!("lighter: {DEVICE}: {reason}"));
            self.state.trouble(DEVICE, &reason);
            sleep(PAUSE * failures).await;
        }
    }

    /// Until the end of `child`, of which it says why; a while after its beginning, all is well. It looks at the host's network when it
    /// starts, and goes without a family that is not there: one that comes is worth another passt, with nothing to be told.
    async fn watch(&self, child: Child, failures: &mut u32) -> Option<String> {
        let changes = Changes::new();
        let routes = DefaultRoutes::of_host();
        self.state.network(child.id());
        let end = passt::watch(child);
        tokio::pin!(end);
        tokio::select! {
            end = &mut end => return Some(end),
            () = sleep(STEADY) => {}
        }
        *failures = 0;
        self.state.trouble_is_over(DEVICE);
        loop {
            tokio::select! {
                end = &mut end => return Some(end),
                () = changes.next() => {}
            }
            if DefaultRoutes::of_host().exceed(routes) {
                return None;
            }
        }
    }

    /// Plugs another one in as soon as there can be one.
    async fn another(&self) -> Result<Child> {
        let mut told = None;
        let changes = Changes::new();
        let (stream, passt) = loop {
            match passt::prepare(self.host_access)? {
                Ok(prepared) => break prepared,
                Err(absence) => {
                    if told.replace(absence) != Some(absence) {
                        self.state.trouble(DEVICE, absence);
                    }
                    let _ = timeout(LOOK_AGAIN, changes.next()).await;
                }
            }
        };
        let monitor = self.monitor.clone();
        let plug = move || monitor::ask(&monitor, &Request::Plug, &[stream.as_fd()]);
        tokio::task::spawn_blocking(plug)
            .await
            .context(|| "the task that plugs the network in ended early".into())??;
        self.order(passt).await
    }

    /// Has the main thread start `passt`.
    async fn order(&self, passt: Passt) -> Result<Child> {
        let (answer, answered) = oneshot::channel();
        let gone = || "the supervisor ends".to_owned();
        self.orders.send(Order { passt, answer }).await.context(gone)?;
        answered.await.context(gone)?
    }

    async fn give_up(&self, end: &str) {
        let reason = format!(
            "{end}; that was the {MOST_FAILURES}th in a row, and the guest has no network until it is started anew"
        );
        self.state.trouble(DEVICE, &reason);
        if let Err(error) = monitor::request(&self.monitor, &Request::Unplug).await {
            say(format_args!("lighter: {}", error.message));
        }
    }
}
