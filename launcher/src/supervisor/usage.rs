//! Who uses the VM, and the door that they come through: it is open while the VM runs, and shut from the decision to suspend it
//! until it goes on. Whoever comes then waits, and is a reason to go on: nobody is lost in between.
//!
//! ```text
//!  open ── idle for long enough ──▶ closing ── all sockets are kept, the VM is saved ──▶ closed ── used ──▶ open
//!    ▲──────────── somebody came, or it cannot be saved ────┘
//! ```

use lighter_protocol::activity::{Activity, Busy};
use lighter_protocol::agent::ContainersLoad;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Containers that take less than this do nothing but wait, thousandths of a processor.
const QUIET_PER_MILLE: u64 = 10;

/// An agent that has told nothing for so long is not known to be idle.
const TOLD_WITHIN: Duration = Duration::from_secs(60);

/// What somebody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A connection to the engine's socket.
    Client,
    /// A client of a published port.
    Port,
    /// A command in the guest, or the wait for the engine.
    Session,
    /// Logs are followed.
    Logs,
    /// The VM is saved.
    Saving,
}

impl Purpose {
    /// Those for which a suspended VM goes on.
    const WAKING: [Self; 3] = [Self::Client, Self::Port, Self::Session];
}

/// Whether the VM takes who comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// It is being suspended, unless somebody comes.
    Closing,
    /// It is suspended.
    Closed,
}

/// Who uses a VM; clones share it.
#[derive(Clone, Debug)]
pub struct Usage(watch::Sender<Inner>);

#[derive(Debug)]
struct Inner {
    door: Door,
    /// By [`Purpose`].
    visits: [usize; 5],
    /// Published ports whose clients are being served.
    serving: usize,
    /// When the last one left, or the VM began to serve.
    since: Instant,
    load: Option<Load>,
}

/// What containers did lately.
#[derive(Clone, Copy, Debug)]
struct Load {
    told: ContainersLoad,
    at: Instant,
    per_mille: u64,
    /// Since when they do nothing but wait.
    quiet_since: Option<Instant>,
}

impl Inner {
    fn count(&self, purposes: &[Purpose]) -> usize {
        purposes
            .iter()
            .map(|&purpose| self.visits[purpose as usize])
            .sum()
    }

    fn total(&self) -> usize {
        self.visits.iter().sum()
    }

    /// How many there are for whom the VM has to run.
    fn waking(&self) -> usize {
        self.count(&Purpose::WAKING)
    }

    /// Changes the numbers of visits; tells whether others have to know.
    fn change(&mut self, act: impl FnOnce(&mut Self)) -> bool {
        let before = (self.total() == 0, self.waking() == 0);
        act(self);
        before != (self.total() == 0, self.waking() == 0)
    }

    /// Why the VM is in use at `now`, or since when it is idle.
    fn assess(&self, ready: bool, now: Instant) -> Result<Instant, Vec<Busy>> {
        let mut busy = vec![];
        let mut counted = |purpose, reason: fn(usize) -> Busy| match self.count(&[purpose]) {
            0 => {}
            count => busy.push(reason(count)),
        };
        counted(Purpose::Client, |count| Busy::Clients { count });
        counted(Purpose::Port, |count| Busy::Ports { count });
        counted(Purpose::Session, |count| Busy::Sessions { count });
        counted(Purpose::Logs, |count| Busy::Logs { count });
        counted(Purpose::Saving, |_| Busy::Saving);
        if !ready {
            busy.push(Busy::Starting);
        }
        let quiet_since = match self.load {
            Some(load) if now.duration_since(load.at) <= TOLD_WITHIN => match load.quiet_since {
                None if load.per_mille > 0 => {
                    busy.push(Busy::Containers {
                        cpu_per_mille: load.per_mille,
                    });
                    None
                }
                quiet_since => quiet_since,
            },
            _ => None,
        };
        match quiet_since {
            Some(quiet_since) if busy.is_empty() => return Ok(self.since.max(quiet_since)),
            None if busy.is_empty() => busy.push(Busy::Untold),
            _ => {}
        }
        Err(busy)
    }
}

impl Usage {
    /// Of a VM that begins.
    pub fn new() -> Self {
        Self(watch::Sender::new(Inner {
            door: Door::Open,
            visits: [0; 5],
            serving: 0,
            since: Instant::now(),
            load: None,
        }))
    }

    /// Somebody comes: in use until the visit is dropped.
    pub fn visit(&self, purpose: Purpose) -> Visit {
        self.0
            .send_if_modified(|inner| inner.change(|inner| inner.visits[purpose as usize] += 1));
        Visit {
            usage: self.clone(),
            purpose,
        }
    }

    /// A port's clients are served, until this is dropped.
    pub fn serving(&self) -> Serving {
        self.0.send_if_modified(|inner| {
            inner.serving += 1;
            false
        });
        Serving(self.clone())
    }

    /// The VM serves from now on.
    pub fn open(&self) {
        let now = Instant::now();
        self.0.send_modify(|inner| {
            inner.door = Door::Open;
            inner.since = now;
            if let Some(load) = &mut inner.load {
                // The guest's clock stood still, and so did containers.
                load.at = now;
                (load.per_mille, load.quiet_since) = (0, None);
            }
        });
    }

    /// The VM was in use until now.
    pub fn touch(&self) {
        self.0.send_modify(|inner| inner.since = Instant::now());
    }

    /// The agent tells what containers have done.
    pub fn containers(&self, told: ContainersLoad) {
        let now = Instant::now();
        self.0
            .send_modify(|inner| inner.load = Some(Load::next(inner.load, told, now)));
    }

    /// Shuts the door, if the VM has been idle for as long as `after`.
    pub fn close_if_idle(&self, ready: bool, after: Duration) -> bool {
        let now = Instant::now();
        self.0.send_if_modified(|inner| {
            let idle = inner
                .assess(ready, now)
                .is_ok_and(|since| now.duration_since(since) >= after);
            let closes = idle && inner.door == Door::Open;
            if closes {
                inner.door = Door::Closing;
            }
            closes
        })
    }

    /// Until no port's clients are served any more; `false` when somebody has come first.
    pub async fn all_kept(&self) -> bool {
        let mut watch = self.0.subscribe();
        let settled = watch.wait_for(|inner| inner.serving == 0 || inner.waking() > 0);
        settled.await.is_ok_and(|inner| inner.waking() == 0)
    }

    /// The VM is suspended, and will not go on before the door is opened.
    pub fn closed(&self) {
        self.0.send_modify(|inner| inner.door = Door::Closed);
    }

    /// Whether the VM is suspended.
    pub fn is_closed(&self) -> bool {
        self.0.borrow().door == Door::Closed
    }

    /// Until somebody comes for whom the VM has to run.
    pub async fn wanted(&self) {
        self.wait(|inner| inner.waking() > 0).await;
    }

    /// Until the VM serves.
    pub async fn opened(&self) {
        self.wait(|inner| inner.door == Door::Open).await;
    }

    /// Until no more clients are to be taken, and there are none.
    pub async fn left(&self) {
        self.wait(|inner| inner.door != Door::Open && inner.waking() == 0)
            .await;
    }

    async fn wait(&self, until: impl FnMut(&Inner) -> bool) {
        // Its sender is here.
        let _ = self.0.subscribe().wait_for(until).await;
    }

    /// Since when the VM is idle, unless it is in use.
    pub fn idle_since(&self, ready: bool) -> Option<Instant> {
        self.0.borrow().assess(ready, Instant::now()).ok()
    }

    /// Until something has changed that makes a VM idle or not.
    pub fn changes(&self) -> impl Future<Output = ()> + use<> {
        let mut watch = self.0.subscribe();
        async move {
            let _ = watch.changed().await;
        }
    }

    /// For `lighter status`.
    pub fn activity(&self, ready: bool, after: Option<Duration>) -> Activity {
        let now = Instant::now();
        let assessed = self.0.borrow().assess(ready, now);
        let (busy, idle_s) = match assessed {
            Ok(since) => (vec![], Some(now.duration_since(since).as_secs())),
            Err(busy) => (busy, None),
        };
        Activity {
            busy,
            idle_s,
            auto_suspend_s: after.map(|after| after.as_secs()),
        }
    }
}

impl Load {
    /// What is known once `told` has come, with `before`.
    fn next(before: Option<Self>, told: ContainersLoad, now: Instant) -> Self {
        let first = Self {
            told,
            at: now,
            per_mille: 0,
            quiet_since: None,
        };
        // A clock that goes back is that of another boot.
        let Some((before, over)) = before.and_then(|before| {
            let over = told.clock_us.checked_sub(before.told.clock_us)?;
            (over > 0).then_some((before, over))
        }) else {
            return first;
        };
        let took = told.cpu_us.saturating_sub(before.told.cpu_us);
        let per_mille = took.saturating_mul(1000) / over;
        Self {
            per_mille,
            quiet_since: (per_mille <= QUIET_PER_MILLE).then(|| before.quiet_since.unwrap_or(before.at)),
            ..first
        }
    }
}

/// Somebody's use of the VM.
#[derive(Debug)]
pub struct Visit {
    usage: Usage,
    purpose: Purpose,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.usage.0.send_if_modified(|inner| {
            inner.since = Instant::now();
            inner.change(|inner| inner.visits[self.purpose as usize] -= 1)
        });
    }
}

/// A port whose clients are served.
#[derive(Debug)]
pub struct Serving(Usage);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.0.send_if_modified(|inner| {
            inner.serving -= 1;
            inner.serving == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn told(cpu_us: u64, clock_s: u64) -> ContainersLoad {
        ContainersLoad {
            cpu_us,
            clock_us: clock_s * 1_000_000,
        }
    }

    /// A VM that serves since `now`, with containers that have been quiet for as long.
    fn inner(now: Instant) -> Inner {
        Inner {
            door: Door::Open,
            visits: [0; 5],
            serving: 0,
            since: now,
            load: Some(Load {
                told: told(0, 0),
                at: now,
                per_mille: 0,
                quiet_since: Some(now),
            }),
        }
    }

    #[test]
    fn a_vm_is_idle_since_the_last_use_and_the_last_work() {
        let began = Instant::now();
        let mut vm = inner(began);
        let now = began + 30 * SECOND;
        assert_eq!(vm.assess(true, now), Ok(began));
        vm.since = began + 7 * SECOND;
        assert_eq!(vm.assess(true, now), Ok(began + 7 * SECOND));
        vm.load.as_mut().unwrap().quiet_since = Some(began + 9 * SECOND);
        assert_eq!(vm.assess(true, now), Ok(began + 9 * SECOND));
        assert_eq!(vm.assess(false, now), Err(vec![Busy::Starting]));
        for purpose in Purpose::WAKING
            .into_iter()
            .chain([Purpose::Logs, Purpose::Saving])
        {
            vm.visits[purpose as usize] = 2;
        }
        let all = vec![
            Busy::Clients { count: 2 },
            Busy::Ports { count: 2 },
            Busy::Sessions { count: 2 },
            Busy::Logs { count: 2 },
            Busy::Saving,
        ];
        assert_eq!(vm.assess(true, now), Err(all));
    }

    #[test]
    fn what_is_not_told_is_not_idleness() {
        let began = Instant::now();
        let mut vm = inner(began);
        assert_eq!(
            vm.assess(true, began + 2 * TOLD_WITHIN),
            Err(vec![Busy::Untold]),
            "an agent that is silent"
        );
        vm.load = None;
        assert_eq!(vm.assess(true, began), Err(vec![Busy::Untold]));
        assert_eq!(vm.assess(false, began), Err(vec![Busy::Starting]));
    }

    #[test]
    fn containers_that_only_wait_are_quiet_since_their_last_work() {
        let began = Instant::now();
        let at = |second: u64| began + Duration::from_secs(second);
        let first = Load::next(None, told(5_000_000, 100), at(10));
        assert_eq!(first.quiet_since, None);
        // 1 % of ten seconds, and no more.
        let quiet = Load::next(Some(first), told(5_100_000, 110), at(20));
        assert_eq!((quiet.per_mille, quiet.quiet_since), (10, Some(at(10))));
        let still = Load::next(Some(quiet), told(5_100_000, 120), at(30));
        assert_eq!(still.quiet_since, Some(at(10)));
        let work = Load::next(Some(still), told(10_100_000, 130), at(40));
        assert_eq!((work.per_mille, work.quiet_since), (500, None));
        let mut vm = inner(began);
        vm.load = Some(work);
        assert_eq!(
            vm.assess(true, at(40)),
            Err(vec![Busy::Containers { cpu_per_mille: 500 }])
        );
        let quiet = Load::next(Some(work), told(10_100_000, 140), at(50));
        assert_eq!(quiet.quiet_since, Some(at(40)));
        // Reports that waited for the supervisor come at once, and another boot begins anew.
        let late = Load::next(Some(quiet), told(10_110_000, 150), at(50));
        assert_eq!(late.quiet_since, Some(at(40)));
        let other = Load::next(Some(late), told(1, 3), at(60));
        assert_eq!((other.per_mille, other.quiet_since), (0, None));
    }

    #[tokio::test]
    async fn whoever_comes_while_the_door_is_shut_waits_and_is_wanted() {
        let usage = Usage::new();
        usage.containers(told(0, 0));
        usage.containers(told(0, 10));
        let visit = usage.visit(Purpose::Client);
        assert!(!usage.close_if_idle(true, Duration::ZERO));
        drop(visit);
        assert!(!usage.close_if_idle(true, 3600 * SECOND));
        assert!(!usage.close_if_idle(false, Duration::ZERO));
        assert!(usage.close_if_idle(true, Duration::ZERO));
        assert!(!usage.close_if_idle(true, Duration::ZERO), "it is shut");
        let serving = usage.serving();
        let kept = tokio::spawn({
            let usage = usage.clone();
            async move { usage.all_kept().await }
        });
        tokio::task::yield_now().await;
        assert!(!kept.is_finished());
        usage.left().await;
        drop(serving);
        assert!(kept.await.unwrap());
        usage.closed();
        // Neither needs it to run.
        let _logs = usage.visit(Purpose::Logs);
        assert_eq!(usage.0.borrow().waking(), 0);
        let visit = usage.visit(Purpose::Port);
        usage.wanted().await;
        assert!(!usage.all_kept().await);
        let waiting = tokio::spawn({
            let usage = usage.clone();
            async move { usage.opened().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        usage.open();
        waiting.await.unwrap();
        drop(visit);
        assert_eq!(usage.0.borrow().waking(), 0);
    }

    #[test]
    fn status_tells_why_or_for_how_long() {
        let usage = Usage::new();
        let activity = usage.activity(true, Some(600 * SECOND));
        assert_eq!(activity.busy, [Busy::Untold]);
        assert_eq!((activity.idle_s, activity.auto_suspend_s), (None, Some(600)));
        usage.containers(told(0, 0));
        usage.containers(told(0, 10));
        let activity = usage.activity(true, None);
        assert_eq!((activity.busy.len(), activity.idle_s), (0, Some(0)));
    }
}
