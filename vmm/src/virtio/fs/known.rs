//! How many files a guest remembers. Each takes a descriptor of this process, and Linux remembers files for as long as it has
//! memory: long before there are no descriptors left it is asked to forget what it does not use.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two times that the guest is asked.
const PAUSE: Duration = Duration::from_millis(500);

/// The files that a guest remembers.
#[derive(Debug)]
pub(super) struct Known {
    state: Mutex<State>,
    /// From here on the guest is asked to forget.
    many: usize,
}

#[derive(Debug, Default)]
struct State {
    /// How often each was told to the guest, less how often it has forgotten it.
    counts: HashMap<u64, u64>,
    asked: Option<Instant>,
}

impl Known {
    /// For a guest that can remember `most` files.
    pub(super) fn new(most: u64) -> Self {
        Self {
            state: Mutex::default(),
            many: usize::try_from(most / 2).unwrap_or(usize::MAX),
        }
    }

    /// The guest was told of a file. Says whether to ask it to forget some.
    pub(super) fn told(&self, inode: u64, now: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state.counts.entry(inode).or_default() += 1;
        let soon = state.asked.is_some_and(|asked| now.duration_since(asked) < PAUSE);
        let ask = state.counts.len() >= self.many && !soon;
        if ask {
            state.asked = Some(now);
        }
        ask
    }

    /// The guest has forgotten it `count` times.
    pub(super) fn forgotten(&self, inode: u64, count: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = state.counts.get_mut(&inode) {
            *told = told.saturating_sub(count);
            if *told == 0 {
                state.counts.remove(&inode);
            }
        }
    }

    /// It remembers nothing any more.
    pub(super) fn clear(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State::default();
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
}
