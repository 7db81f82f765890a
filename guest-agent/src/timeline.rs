//! The start-up's timeline: one [`Step`] for each phase, by CLOCK_BOOTTIME, whose zero is early in the start of the kernel.

use lighter_protocol::agent::{AgentMessage, Step};
use nix::time::{ClockId, clock_gettime};

use crate::outbox::Outbox;

/// CLOCK_BOOTTIME in nanoseconds; the kernel always has it.
pub fn now_ns() -> i64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// A step that has begun.
#[derive(Debug)]
pub struct Running {
    name: String,
    began_ns: i64,
}

impl Running {
    /// Begins a step now.
    pub fn begin(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            began_ns: now_ns(),
        }
    }

    /// Ends it now and reports it.
    pub fn end(self, outbox: &Outbox) {
        report(outbox, self.name, self.began_ns, now_ns());
    }
}

/// Reports a step whose times are known.
pub fn report(outbox: &Outbox, name: impl Into<String>, began_ns: i64, ended_ns: i64) {
    let step = Step {
        name: name.into(),
        began_ns,
        ended_ns,
    };
    crate::log::to_kernel_log(
        6,
        &format!(
            "step {} {:.1} ms, ended at {:.1} ms",
            step.name,
            ms(ended_ns.saturating_sub(began_ns)),
            ms(ended_ns)
        ),
    );
    outbox.push(AgentMessage::Step(step));
}

/// For people to read; a double is exact enough for that.
#[expect(
    clippy::cast_precision_loss,
    reason = "rounded to a tenth of a millisecond anyway"
)]
fn ms(ns: i64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_has_its_name_and_ends_after_it_began() {
        let outbox = Outbox::new();
        Running::begin("mounts").end(&outbox);
        let Some(AgentMessage::Step(step)) = outbox.take() else {
            panic!("no step was reported")
        };
        assert_eq!(step.name, "mounts");
        assert!(step.began_ns > 0 && step.began_ns <= step.ended_ns);
    }
}
