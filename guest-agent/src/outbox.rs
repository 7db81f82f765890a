//! Messages on their way to the supervisor: a bounded queue that outlives the control connection.
//!
//! While nobody is connected (early in the boot, or when the supervisor restarts) messages wait here. When too many
//! wait, the oldest log lines go first, and how many went is told in their place; the timeline and the engine's
//! states are few and stay. Questions for the time go before everything else, since waiting would spoil them.

use std::{
    collections::VecDeque,
    mem::discriminant,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lighter_protocol::agent::{AgentMessage, LogLevel, LogLine, LogSource};
use tokio::sync::Notify;

/// The most bytes of log text that wait.
const MAX_LOG_BYTES: usize = 1 << 20;

/// What a message costs beside its text, roughly.
const OVERHEAD: usize = 100;

/// The most messages other than log lines that wait: steps, states and clock reports.
const MAX_OTHERS: usize = 1024;

/// The queue; clones share it.
#[derive(Clone, Debug)]
pub struct Outbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queues: Mutex<Queues>,
    filled: Notify,
    emptied: Notify,
}

#[derive(Debug, Default)]
struct Queues {
    urgent: VecDeque<AgentMessage>,
    others: VecDeque<(u64, AgentMessage)>,
    logs: VecDeque<(u64, LogLine)>,
    log_bytes: usize,
    dropped: u64,
    /// Orders messages of the two queues.
    next: u64,
    /// A message was taken and is not confirmed by [`Outbox::sent`].
    in_flight: bool,
    /// Somebody takes messages.
    connected: bool,
}

impl Outbox {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                queues: Mutex::default(),
                filled: Notify::new(),
                emptied: Notify::new(),
            }),
        }
    }

    /// Adds a message. Never blocks.
    pub fn push(&self, message: AgentMessage) {
        let mut queues = self.queues();
        let order = queues.next;
        queues.next += 1;
        match message {
            AgentMessage::TimeRequest { .. } => {
                // A question nobody was there to hear is stale.
                queues.urgent.clear();
                queues.urgent.push_back(message);
            }
            AgentMessage::Log(line) => {
                queues.log_bytes += line.text.len() + OVERHEAD;
                queues.logs.push_back((order, line));
                while queues.log_bytes > MAX_LOG_BYTES {
                    let Some((_, line)) = queues.logs.pop_front() else {
                        break;
                    };
                    queues.log_bytes -= line.text.len() + OVERHEAD;
                    queues.dropped += 1;
                }
            }
            other => {
                // Only the last one matters.
                if matches!(other, AgentMessage::Memory(_) | AgentMessage::Containers(_)) {
                    let kind = discriminant(&other);
                    queues.others.retain(|(_, message)| discriminant(message) != kind);
                }
                if queues.others.len() >= MAX_OTHERS {
                    queues.others.pop_front();
                }
                queues.others.push_back((order, other));
            }
        }
        drop(queues);
        self.shared.filled.notify_one();
    }

    /// The next message, if there is one; [`Outbox::sent`] must follow when it is written.
    pub fn take(&self) -> Option<AgentMessage> {
        let mut queues = self.queues();
        let message = queues.take();
        queues.in_flight = message.is_some();
        message
    }

    /// The next message, waiting for one.
    pub async fn next(&self) -> AgentMessage {
        loop {
            if let Some(message) = self.take() {
                return message;
            }
            self.shared.filled.notified().await;
        }
    }

    /// The taken message was written.
    pub fn sent(&self) {
        let mut queues = self.queues();
        queues.in_flight = false;
        if queues.is_empty() {
            self.shared.emptied.notify_waiters();
        }
    }

    /// Tells whether anybody takes messages.
    pub fn set_connected(&self, connected: bool) {
        self.queues().connected = connected;
        self.shared.emptied.notify_waiters();
    }

    /// Waits until every message was written, or nobody is there to write them.
    pub async fn flushed(&self) {
        loop {
            let emptied = self.shared.emptied.notified();
            tokio::pin!(emptied);
            // Registered before the look, so that the emptying between look and wait is not missed.
            emptied.as_mut().enable();
            let is_over = {
                let queues = self.queues();
                queues.is_empty() || !queues.connected
            };
            if is_over {
                return;
            }
            emptied.await;
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queues {
    fn take(&mut self) -> Option<AgentMessage> {
        if let Some(message) = self.urgent.pop_front() {
            return Some(message);
        }
        if self.dropped > 0 {
            let text = format!(
                "{} log lines were dropped while the supervisor did not listen",
                self.dropped
            );
            self.dropped = 0;
            return Some(AgentMessage::Log(crate::log::line(
                LogSource::Agent,
                LogLevel::Warn,
                text,
            )));
        }
        let log_is_next = match (self.logs.front(), self.others.front()) {
            (Some((log, _)), Some((other, _))) => log < other,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if log_is_next {
            let (_, line) = self.logs.pop_front()?;
            self.log_bytes -= line.text.len() + OVERHEAD;
            return Some(AgentMessage::Log(line));
        }
        self.others.pop_front().map(|(_, message)| message)
    }

    fn is_empty(&self) -> bool {
        !self.in_flight && self.urgent.is_empty() && self.others.is_empty() && self.logs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use lighter_protocol::agent::EngineState;

    use super::*;

    fn log(text: &str) -> AgentMessage {
        AgentMessage::Log(crate::log::line(
            LogSource::Dockerd,
            LogLevel::Info,
            text.to_owned(),
        ))
    }

    fn text(message: Option<AgentMessage>) -> String {
        match message {
            Some(AgentMessage::Log(line)) => line.text,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn messages_come_out_in_order_and_a_time_request_first() {
        let outbox = Outbox::new();
        outbox.push(log("one"));
        outbox.push(AgentMessage::Engine(EngineState::Ready));
        outbox.push(log("two"));
        outbox.push(AgentMessage::TimeRequest { id: 1 });
        outbox.push(AgentMessage::TimeRequest { id: 2 });
        assert_eq!(outbox.take(), Some(AgentMessage::TimeRequest { id: 2 }));
        assert_eq!(text(outbox.take()), "one");
        assert_eq!(outbox.take(), Some(AgentMessage::Engine(EngineState::Ready)));
        assert_eq!(text(outbox.take()), "two");
        assert_eq!(outbox.take(), None);
    }

    #[test]
    fn a_flood_of_logs_is_bounded_tells_what_it_lost_and_keeps_the_engines_state() {
        let outbox = Outbox::new();
        outbox.push(AgentMessage::Engine(EngineState::Starting));
        let line = "x".repeat(8000);
        for _ in 0..1000 {
            outbox.push(log(&line));
        }
        assert!(text(outbox.take()).ends_with("log lines were dropped while the supervisor did not listen"));
        assert_eq!(outbox.take(), Some(AgentMessage::Engine(EngineState::Starting)));
        let mut kept = 0;
        while outbox.take().is_some() {
            kept += 1;
        }
        assert_eq!(kept, MAX_LOG_BYTES / (8000 + OVERHEAD));
    }

    #[tokio::test]
    async fn flushed_waits_for_the_message_in_flight() {
        let outbox = Outbox::new();
        outbox.push(AgentMessage::PoweringOff);
        // Nobody will ever take it.
        outbox.flushed().await;
        outbox.set_connected(true);
        assert_eq!(outbox.next().await, AgentMessage::PoweringOff);
        let waiting = tokio::spawn({
            let outbox = outbox.clone();
            async move { outbox.flushed().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        outbox.sent();
        waiting.await.unwrap();
    }
}
