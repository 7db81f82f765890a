//! The thread of an active device: waits for events and calls the device's [`Handler`].
//!
//! A handler that returns an error is done for: the driver is told that the device needs a reset, whoever watches the VM
//! hears why, and the thread waits to be stopped. The handler always comes back from [`Worker::stop`], with its queues.

use super::interrupt::Interrupt;
use crate::threads;
use lighter_protocol::causes::chain;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
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

/// A running worker.
#[derive(Debug)]
pub struct Worker<H> {
    thread: JoinHandle<H>,
    stop: EventFd,
}

impl<H: Handler> Worker<H> {
    /// Starts the thread. `name` is the device's; the host shows the first 15 bytes of it.
    ///
    /// # Errors
    /// When the host has no thread, epoll or eventfd to give, or a descriptor cannot be waited for.
    pub fn spawn(name: &str, interrupt: Interrupt, mut handler: H) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let poller = Poller::new()?;
        let stopped = stop.try_clone()?;
        poller.add(stop.as_raw_fd(), STOP, EventSet::IN)?;
        handler.register(&poller)?;
        let device = name.to_owned();
        let thread = threads::builder(name).spawn(move || {
            if let Err(error) = run(&mut handler, &poller) {
                interrupt.device_failed();
                report(Severity::Failed, &device, &chain(&error));
                wait_for(&stopped);
            }
            handler.stop();
            handler
        })?;
        Ok(Self { thread, stop })
    }

    /// Ends the thread and returns the handler; `None` if it panicked, which is a bug of ours.
    pub fn stop(self) -> Option<H> {
        // Cannot fail: the counter is read by nobody and written once.
        let _ = self.stop.write(1);
        self.thread.join().ok()
    }
}

fn run<H: Handler>(handler: &mut H, poller: &Poller) -> Result<(), H::Error> {
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
