//! The guest's wall clock, held to the host's.
//!
//! Each check asks the host for its time a few times and trusts the quickest answer: the time it tells lies within
//! half the round trip. A large offset is stepped away, a small one slewed by the kernel, and one that may be
//! nothing but the round trip is left alone.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use lighter_protocol::{agent::AgentMessage, causes::chain};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_settime},
};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use crate::{log::Log, outbox::Outbox, timeline};

/// Between checks while the clock was just corrected or is not known yet.
const SHORT_INTERVAL: Duration = Duration::from_secs(10);

/// Between checks when several in a row found nothing to correct: at the most that a kernel's clock may be off
/// (500 ppm), 30 ms.
const LONG_INTERVAL: Duration = Duration::from_secs(60);

/// Checks without a correction until the long interval.
const STABLE_CHECKS: u32 = 3;

/// Questions in one check, at most.
const QUESTIONS: usize = 5;

/// A round trip this short needs no better one.
const GOOD_ROUND_TRIP_NS: u64 = 2_000_000;

/// How long an answer may take before the check is put off.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Larger offsets are stepped; half of what the guest's clock may be off.
const STEP_NS: u64 = 50_000_000;

/// Smaller offsets are noise.
const NOISE_NS: u64 = 500_000;

/// One question and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    /// Wall clocks, guest minus host.
    offset_ns: i64,
    /// Guest's CLOCK_BOOTTIME minus host's CLOCK_MONOTONIC, if the host told the latter.
    boot_offset_ns: Option<i64>,
    round_trip_ns: u64,
}

/// What to do about an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Correction {
    None,
    Slew,
    Step,
}

/// An answer of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of the question.
    pub id: u64,
    /// Host's wall clock, nanoseconds since 1970.
    pub unix_ns: u64,
    /// Host's CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: Option<u64>,
    /// When it was received.
    pub received: Instant,
}

/// A correction that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot correct the clock by {offset_ns} ns")]
struct Refused {
    offset_ns: i64,
    #[source]
    source: io::Error,
}

/// Sets the clock to what the host has just said, for a guest that stood still for long: what is off by the message's way is
/// corrected by the next check.
///
/// # Errors
/// When the kernel refuses.
pub fn set(unix_ns: u64) -> io::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_ns));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// Checks the clock for ever: at once when told by `check_now`, else at intervals.
pub async fn keep(outbox: Outbox, log: Log, mut answers: mpsc::Receiver<Answer>, check_now: Arc<Notify>) {
    let mut stable = 0;
    let mut id = 0;
    // The first check comes with the first connection.
    check_now.notified().await;
    loop {
        if let Some(sample) = measure(&outbox, &mut answers, &mut id).await {
            let correction = decide(sample);
            match correct(sample, correction) {
                Ok(()) => {
                    stable = if correction == Correction::None {
                        stable + 1
                    } else {
                        0
                    };
                    outbox.push(AgentMessage::Clock {
                        offset_ns: sample.offset_ns,
                        round_trip_ns: sample.round_trip_ns,
                        stepped: correction == Correction::Step,
                        boot_offset_ns: sample.boot_offset_ns,
                    });
                }
                Err(error) => log.error(chain(&error)),
            }
        }
        let interval = if stable >= STABLE_CHECKS {
            LONG_INTERVAL
        } else {
            SHORT_INTERVAL
        };
        // Either is a reason to check.
        drop(timeout(interval, check_now.notified()).await);
    }
}

/// Asks until a good answer comes, or a few times; `None` when nobody answers.
async fn measure(outbox: &Outbox, answers: &mut mpsc::Receiver<Answer>, id: &mut u64) -> Option<Sample> {
    let mut best: Option<Sample> = None;
    for _ in 0..QUESTIONS {
        *id += 1;
        let (asked, asked_boot, asked_at) = (unix_ns(), timeline::now_ns(), Instant::now());
        outbox.push(AgentMessage::TimeRequest { id: *id });
        let answer = timeout(ANSWER_LIMIT, async {
            loop {
                match answers.recv().await {
                    Some(answer) if answer.id == *id => break Some(answer),
                    Some(_late) => {}
                    None => break None,
                }
            }
        });
        let Ok(Some(answer)) = answer.await else { break };
        let round_trip = answer.received.saturating_duration_since(asked_at);
        let round_trip_ns = u64::try_from(round_trip.as_nanos()).unwrap_or(u64::MAX);
        let boot_offset = |host_ns| offset(asked_boot.into(), round_trip_ns, host_ns);
        let sample = Sample {
            offset_ns: offset(asked, round_trip_ns, answer.unix_ns),
            boot_offset_ns: answer.monotonic_ns.map(boot_offset),
            round_trip_ns,
        };
        if best.is_none_or(|best| sample.round_trip_ns < best.round_trip_ns) {
            best = Some(sample);
        }
        if sample.round_trip_ns <= GOOD_ROUND_TRIP_NS {
            break;
        }
    }
    best
}

/// Guest minus host, supposing that the host told its time in the middle of the round trip.
fn offset(asked_ns: i128, round_trip_ns: u64, host_ns: u64) -> i64 {
    let offset = asked_ns + i128::from(round_trip_ns / 2) - i128::from(host_ns);
    let clamped = offset.clamp(i128::from(i64::MIN), i128::from(i64::MAX));
    i64::try_from(clamped).unwrap_or_default()
}

fn decide(sample: Sample) -> Correction {
    let offset = sample.offset_ns.unsigned_abs();
    if offset <= NOISE_NS.max(sample.round_trip_ns / 2) {
        Correction::None
    } else if offset > STEP_NS {
        Correction::Step
    } else {
        Correction::Slew
    }
}

fn correct(sample: Sample, correction: Correction) -> Result<(), Refused> {
    let delta_ns = sample.offset_ns.checked_neg().unwrap_or(i64::MAX);
    // SAFETY: a timex is plain data, for which zeros are valid.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    match correction {
        Correction::None => return Ok(()),
        Correction::Slew => {
            timex.modes = libc::ADJ_OFFSET_SINGLESHOT;
            timex.offset = delta_ns / 1000;
        }
        Correction::Step => {
            timex.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
            timex.time.tv_sec = delta_ns.div_euclid(1_000_000_000);
            timex.time.tv_usec = delta_ns.rem_euclid(1_000_000_000);
        }
    }
    // SAFETY: adjtimex reads and writes one timex.
    if unsafe { libc::adjtimex(&raw mut timex) } < 0 {
        return Err(Refused {
            offset_ns: sample.offset_ns,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}

/// The guest's wall clock; negative before 1970.
fn unix_ns() -> i128 {
    let nanoseconds = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => nanoseconds(since),
        Err(before) => -nanoseconds(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn decision(offset_ms: i64, round_trip_ms: u64) -> Correction {
        decide(Sample {
            offset_ns: offset_ms * MS,
            boot_offset_ns: None,
            round_trip_ns: round_trip_ms * 1_000_000,
        })
    }

    #[test]
    fn the_offset_is_counted_from_the_middle_of_the_round_trip() {
        assert_eq!(offset(1_000, 200, 600), 500);
    }

    #[test]
    fn absurd_times_do_not_overflow() {
        for offset_ns in [offset(-5, u64::MAX, u64::MAX), i64::MIN] {
            for round_trip_ns in [0, u64::MAX] {
                decide(Sample {
                    offset_ns,
                    boot_offset_ns: None,
                    round_trip_ns,
                });
            }
        }
    }

    #[test]
    fn large_offsets_are_stepped_small_ones_slewed_and_uncertain_ones_left() {
        assert_eq!(decision(3_600_000, 1), Correction::Step);
        assert_eq!(decision(-120, 10), Correction::Step);
        assert_eq!(decision(-20, 10), Correction::Slew);
        assert_eq!(decision(4, 10), Correction::None);
        assert_eq!(decision(120, 300), Correction::None);
        assert_eq!(decision(0, 0), Correction::None);
    }

    #[tokio::test]
    async fn the_quickest_of_several_answers_counts_and_strangers_are_ignored() {
        let outbox = Outbox::new();
        let (sender, mut answers) = mpsc::channel(8);
        let host = tokio::spawn({
            let outbox = outbox.clone();
            async move {
                for slowness in [40, 5, 20, 30, 60] {
                    let AgentMessage::TimeRequest { id } = outbox.next().await else {
                        panic!("no question")
                    };
                    let unix_ns = u64::try_from(unix_ns()).unwrap() + 3_600_000_000_000;
                    let received = Instant::now() + Duration::from_millis(slowness);
                    sender
                        .send(Answer {
                            id: id + 100,
                            unix_ns: 0,
                            monotonic_ns: None,
                            received,
                        })
                        .await
                        .unwrap();
                    sender
                        .send(Answer {
                            id,
                            unix_ns,
                            monotonic_ns: Some(timeline::now_ns().unsigned_abs() + 7_200_000_000_000),
                            received,
                        })
                        .await
                        .unwrap();
                }
            }
        });
        let sample = measure(&outbox, &mut answers, &mut 0).await.unwrap();
        host.await.unwrap();
        assert!(
            (5_000_000..1_000_000_000).contains(&sample.round_trip_ns),
            "{sample:?}"
        );
        assert!((sample.offset_ns / MS + 3_600_000).abs() < 1000, "{sample:?}");
        let boot_offset_ns = sample.boot_offset_ns.unwrap();
        assert!((boot_offset_ns / MS + 7_200_000).abs() < 1000, "{sample:?}");
    }
}
