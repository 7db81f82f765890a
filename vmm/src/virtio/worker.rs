//! The thread of an active device: waits for events and calls the device's [`Handler`].
//!
//! A handler that returns an error is done for: the driver is told that the device needs a reset, whoever watches the VM
//! hears why, and the thread waits to be stopped. The handler always comes back from [`Worker::stop`], with its queues.

use super::interrupt::Interrupt;
use crate::threads;
use lighter_protocol::causes::chain;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Reserved token of the stop event.
const STOP: u64 = u64::MAX;

/// How many events are taken from the kernel at once.
const BATCH: usize = 64;

/// How bad it is, what is told of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The device is dead until its driver resets it.
    Failed,
    /// The host could not do what was asked; the device goes on.
    Trouble,
    /// The guest remembers so many files that it should forget those it does not use.
    Crowded,
}

/// Who hears of devices in need: how bad, name and reason.
pub type ReportSink = Arc<dyn Fn(Severity, &str, &str) + Send + Sync>;

static REPORTS: OnceLock<ReportSink> = OnceLock::new();

/// Sets who hears of devices in need, once for the process. Until then it is standard error.
pub fn report_to(sink: ReportSink) {
    // A second call is ignored, as documented.
    let _ = REPORTS.set(sink);
}

/// The set of descriptors a worker waits on.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// Waits for nothing yet.
    ///
    /// # Errors
    /// When the host has no epoll to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    /// Waits for `events` on `fd` too, and gives `token` (not `u64::MAX`) to the handler then.
    ///
    /// # Errors
    /// As epoll_ctl.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Changes what is waited for on `fd`.
    ///
    /// # Errors
    /// As epoll_ctl.
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Waits no longer for `fd`.
    ///
    /// # Errors
    /// As epoll_ctl.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }
}

/// What a device does on its thread.
pub trait Handler: Send + 'static {
    /// Why the device cannot go on: the guest broke a rule, or the host failed it.
    type Error: std::error::Error;

    /// Adds the descriptors to wait for. Called once, before the thread starts.
    ///
    /// # Errors
    /// As epoll_ctl.
    fn register(&mut self, poller: &Poller) -> io::Result<()>;

    /// Called on the thread before the first wait: work that came before the thread did.
    ///
    /// # Errors
    /// As [`Self::handle`].
    fn start(&mut self, _poller: &Poller) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Something happened on the descriptor added with `token`. Must not block.
    ///
    /// # Errors
    /// The device is then dead until the driver resets it.
    fn handle(&mut self, token: u64, events: EventSet, poller: &Poller) -> Result<(), Self::Error>;

    /// Called after the events of one wait are handled.
    ///
    /// # Errors
    /// As [`Self::handle`].
    fn after_batch(&mut self, _poller: &Poller) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Longest wait in milliseconds, -1 for no limit; [`Self::after_batch`] is called when it is over.
    fn timeout_ms(&self) -> i32 {
        -1
    }

    /// Called on the thread when it is told to stop: requests that are under way are completed here.
    fn stop(&mut self) {}
}

/// What a thread does before it serves a device, once: it gives up what that does not need.
pub type Prepare = Box<dyn FnOnce() -> io::Result<()> + Send>;

type Job = Box<dyn FnOnce(&EventFd) + Send>;

/// A device's thread. It is made with the device, and runs a worker whenever a driver has activated it: a thread that were made
/// then would be made by a vCPU's, which may make none.
#[derive(Clone, Debug)]
pub struct DeviceThread {
    name: Arc<str>,
    jobs: Sender<Job>,
    stop: Arc<EventFd>,
}

impl DeviceThread {
    /// Starts the thread, which does `prepare` first; what comes of that is received. `name` is the device's; the host shows the
    /// first 15 bytes of it. The thread ends with the last clone of this.
    ///
    /// # Errors
    /// When the host has no thread or eventfd to give.
    pub fn start(name: &str, prepare: Prepare) -> io::Result<(Self, Receiver<io::Result<()>>)> {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (jobs, to_do) = mpsc::channel::<Job>();
        let (prepared, is_prepared) = mpsc::channel();
        let stopped = stop.clone();
        threads::builder(name).spawn(move || {
            let outcome = prepare();
            let failed = outcome.is_err();
            let _ = prepared.send(outcome);
            if !failed {
                to_do.into_iter().for_each(|job| job(&stopped));
            }
        })?;
        let name = name.into();
        Ok((Self { name, jobs, stop }, is_prepared))
    }

    /// Has the thread do `work` while no worker runs on it, and waits for what comes of that.
    ///
    /// # Errors
    /// When the thread panicked, which is a bug of ours.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (done, outcome) = mpsc::channel();
        let job = move |_: &EventFd| drop(done.send(work()));
        let sent = self.jobs.send(Box::new(job));
        let gone = "the device's thread is gone";
        sent.map_err(|_| io::Error::other(gone))?;
        outcome.recv().map_err(|_| io::Error::other(gone))
    }
}

/// A running worker.
#[derive(Debug)]
pub struct Worker<H> {
    thread: DeviceThread,
    handler: Receiver<H>,
}

impl<H: Handler> Worker<H> {
    /// Has the thread run `handler`.
    ///
    /// # Errors
    /// When the thread panicked before, which is a bug of ours.
    pub fn start(thread: &DeviceThread, interrupt: Interrupt, mut handler: H) -> io::Result<Self> {
        let (back, returned) = mpsc::channel();
        let device = thread.name.clone();
        let job = move |stop: &EventFd| {
            if let Err(reason) = run(&mut handler, stop) {
                interrupt.device_failed();
                report(Severity::Failed, &device, &reason);
                wait_for(stop);
            }
            handler.stop();
            // For the next.
            let _ = stop.read();
            let _ = back.send(handler);
        };
        let sent = thread.jobs.send(Box::new(job));
        sent.map_err(|_| io::Error::other("the device's thread is gone"))?;
        Ok(Self {
            thread: thread.clone(),
            handler: returned,
        })
    }

    /// Stops the worker and returns its handler; `None` if it panicked, which is a bug of ours.
    pub fn stop(self) -> Option<H> {
        // Cannot fail: the counter is written once between two reads.
        let _ = self.thread.stop.write(1);
        self.handler.recv().ok()
    }
}

/// Runs `handler` until `stop` is signalled; an error is why it cannot go on.
fn run<H: Handler>(handler: &mut H, stop: &EventFd) -> Result<(), String> {
    let mut register = || {
        let poller = Poller::new()?;
        poller.add(stop.as_raw_fd(), STOP, EventSet::IN)?;
        handler.register(&poller)?;
        Ok(poller)
    };
    let poller = register().map_err(|error: io::Error| format!("cannot wait for its queues: {error}"))?;
    serve(handler, &poller).map_err(|error| chain(&error))
}

fn serve<H: Handler>(handler: &mut H, poller: &Poller) -> Result<(), H::Error> {
    let mut events = vec![EpollEvent::default(); BATCH];
    handler.start(poller)?;
    loop {
        let count = match poller.epoll.wait(handler.timeout_ms(), &mut events) {
            Ok(count) => count,
            // Only EINTR is possible for a valid epoll and buffer.
            Err(_) => continue,
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return Ok(());
            }
            handler.handle(event.data(), event.event_set(), poller)?;
        }
        handler.after_batch(poller)?;
    }
}

fn wait_for(event: &EventFd) {
    let mut waited = libc::pollfd {
        fd: event.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd for the length of the call.
    while unsafe { libc::poll(&mut waited, 1, -1) } < 0 {}
}

/// Tells whoever watches the VM that `device` is in need, and why.
pub fn report(severity: Severity, device: &str, reason: &str) {
    match REPORTS.get() {
        Some(sink) => sink(severity, device, reason),
        None => drop(writeln!(io::stderr(), "{device}: {reason}")),
    }
}
