//! A device that keeps something beside its queues, such as sockets: with the device while no driver uses it, with the
//! [`Worker`] while one does.

use super::ActivateError;
use super::interrupt::Interrupt;
use super::queue::VirtQueue;
use super::worker::{DeviceThread, Handler, Worker};
use std::io;

/// Where what the device keeps is.
#[derive(Debug)]
pub enum Activity<K, H> {
    /// Here.
    Idle(Box<K>),
    /// With the worker.
    Running(Worker<H>),
    /// The worker could not start or died, and took it along.
    Lost,
}

impl<K, H: Handler> Activity<K, H> {
    /// Starts the worker on the device's `thread`; `handler` makes what it runs of what was kept.
    ///
    /// # Errors
    /// When the device runs already, has lost what it kept, or its thread is gone.
    pub fn start(
        &mut self,
        thread: &DeviceThread,
        interrupt: Interrupt,
        handler: impl FnOnce(K) -> H,
    ) -> Result<(), ActivateError> {
        let kept = match std::mem::replace(self, Self::Lost) {
            Self::Idle(kept) => *kept,
            other => {
                *self = other;
                let reason = "the device is active, or lost its sockets with its last worker";
                return Err(ActivateError::Worker(io::Error::other(reason)));
            }
        };
        let worker = Worker::start(thread, interrupt, handler(kept)).map_err(ActivateError::Worker)?;
        *self = Self::Running(worker);
        Ok(())
    }

    /// Stops the worker, if it runs; `parts` takes its handler apart again. Returns the queues, or none.
    pub fn stop<const N: usize>(&mut self, parts: impl FnOnce(H) -> (K, [VirtQueue; N])) -> Vec<VirtQueue> {
        match std::mem::replace(self, Self::Lost) {
            Self::Running(worker) => match worker.stop() {
                Some(handler) => {
                    let (kept, queues) = parts(handler);
                    *self = Self::Idle(kept.into());
                    queues.into()
                }
                None => vec![],
            },
            other => {
                *self = other;
                vec![]
            }
        }
    }
}
