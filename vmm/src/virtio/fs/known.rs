//! How many files a guest remembers. Each takes a descriptor of this process, and Linux remembers files for as long as it has
//! memory: long before there are no descriptors left it is asked to forget what it does not use, and if it learns of files faster
//! than it forgets them, its requests wait for that.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two times that the guest is asked.
const PAUSE: Duration = Duration::from_millis(500);

/// The longest that requests wait. A guest that has not forgotten enough by then uses its files.
const PATIENCE: Duration = Duration::from_secs(10);

/// The files that a guest remembers.
#[derive(Debug)]
pub(super) struct Known {
    state: Mutex<State>,
    /// From here on the guest is asked to forget.
    many: usize,
    /// From here on its requests wait until it has.
    too_many: usize,
}

#[derive(Debug, Default)]
struct State {
    /// How often each was told to the guest, less how often it has forgotten it.
    counts: HashMap<u64, u64>,
    asked: Option<Instant>,
    /// Since when requests wait, or did: it is over when few enough are known.
    waits: Option<Instant>,
}

impl State {
    fn ask(&mut self, now: Instant) -> bool {
        let soon = self.asked.is_some_and(|asked| now.duration_since(asked) < PAUSE);
        if !soon {
            self.asked = Some(now);
        }
        !soon
    }
}

/// What becomes of a guest's next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It is answered.
    Answer,
    /// It waits for the guest to forget files, at most this long before it is looked at again.
    Wait {
        /// How long.
        at_most: Duration,
        /// Whether to ask the guest once more.
        ask: bool,
    },
}

impl Known {
    /// For a guest that can remember `most` files.
    pub(super) fn new(most: u64) -> Self {
        let part = |files| usize::try_from(files).unwrap_or(usize::MAX);
        Self {
            state: Mutex::default(),
            many: part(most / 2),
            too_many: part(most - most / 4),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest was told of a file. Says whether to ask it to forget some.
    pub(super) fn told(&self, inode: u64, now: Instant) -> bool {
        let mut state = self.state();
        *state.counts.entry(inode).or_default() += 1;
        state.counts.len() >= self.many && state.ask(now)
    }

    /// Whether the guest's next request is answered now.
    pub(super) fn next(&self, now: Instant) -> Next {
        let mut state = self.state();
        if state.counts.len() < self.too_many {
            if state.counts.len() < self.many {
                state.waits = None;
            }
            return Next::Answer;
        }
        let since = *state.waits.get_or_insert(now);
        let left = PATIENCE.saturating_sub(now.duration_since(since));
        if left.is_zero() {
            return Next::Answer;
        }
        Next::Wait {
            at_most: left.min(PAUSE),
            ask: state.ask(now),
        }
    }

    /// The guest has forgotten it `count` times.
    pub(super) fn forgotten(&self, inode: u64, count: u64) {
        let mut state = self.state();
        if let Some(told) = state.counts.get_mut(&inode) {
            *told = told.saturating_sub(count);
            if *told == 0 {
                state.counts.remove(&inode);
            }
        }
    }

    /// It remembers nothing any more.
    pub(super) fn clear(&self) {
        *self.state() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_remembers_half_of_what_it_can_is_asked_now_and_then() {
        let known = Known::new(6);
        let start = Instant::now();
        assert!(!known.told(10, start));
        assert!(!known.told(11, start));
        assert!(!known.told(10, start), "the same again");
        assert!(known.told(12, start));
        assert!(!known.told(13, start), "it was just asked");
        assert!(known.told(14, start + PAUSE));
        for inode in 11..15 {
            known.forgotten(inode, 1);
        }
        known.forgotten(10, 1);
        known.forgotten(99, 7);
        // It still remembers one.
        assert!(!known.told(20, start + 2 * PAUSE));
        assert!(known.told(21, start + 2 * PAUSE));
        known.clear();
        known.forgotten(20, u64::MAX);
        assert!(!known.told(22, start + 3 * PAUSE));
    }

    #[test]
    fn requests_wait_for_a_guest_that_forgets_too_slowly_and_not_for_ever() {
        let known = Known::new(8);
        let start = Instant::now();
        let tell = |inodes: std::ops::Range<u64>| inodes.map(|inode| known.told(inode, start)).last();
        tell(0..5);
        assert_eq!(known.next(start), Next::Answer);
        tell(5..6);
        let wait = |ask| Next::Wait { at_most: PAUSE, ask };
        assert_eq!(known.next(start), wait(false), "it was just asked");
        assert_eq!(known.next(start + PAUSE), wait(true));
        known.forgotten(5, 1);
        assert_eq!(known.next(start + PAUSE), Next::Answer);
        // It goes on as before: the waiting is the same one.
        tell(5..6);
        let end = start + PATIENCE;
        let little = Duration::from_millis(1);
        assert_eq!(
            known.next(end - little),
            Next::Wait {
                at_most: little,
                ask: true
            }
        );
        assert_eq!(known.next(end), Next::Answer, "it uses its files");
        for inode in 3..6 {
            known.forgotten(inode, 1);
        }
        assert_eq!(known.next(end), Next::Answer);
        tell(3..6);
        let later = end + PAUSE;
        assert_eq!(known.next(later), wait(true), "it has shown that it forgets");
    }
}
