//! When a VM that was just started is idle: there is no event for "the guest has nothing more to give back", so its memory
//! is looked at until it stays as it is.

use serde::Serialize;
use std::collections::VecDeque;
use std::time::Duration;

/// Between two looks.
pub const BETWEEN_LOOKS: Duration = Duration::from_secs(2);

/// Looks in a row that have to agree. The guest's kernel reports free pages about 2 s after they became free, so that as
/// many looks span several of its rounds.
pub const LOOKS: usize = 6;

/// How far the looks may differ, parts in a thousand of the largest.
pub const TOLERANCE: u64 = 10;

/// How long it may take. What has not settled by then is measured as it is, and marked.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// The rule, for a report.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rule {
    looks: usize,
    between_looks_ms: u128,
    tolerance_per_mille: u64,
    patience_ms: u128,
}

impl Rule {
    /// The rule as it is.
    pub fn new() -> Self {
        Self {
            looks: LOOKS,
            between_looks_ms: BETWEEN_LOOKS.as_millis(),
            tolerance_per_mille: TOLERANCE,
            patience_ms: PATIENCE.as_millis(),
        }
    }
}

/// The last looks at a figure.
#[derive(Debug, Default)]
pub struct Settling(VecDeque<u64>);

impl Settling {
    /// Takes another look. Returns whether the figure has settled.
    pub fn look(&mut self, value: u64) -> bool {
        if self.0.len() == LOOKS {
            self.0.pop_front();
        }
        self.0.push_back(value);
        let largest = self.0.iter().max().copied().unwrap_or(0);
        let smallest = self.0.iter().min().copied().unwrap_or(0);
        self.0.len() == LOOKS
            && u128::from(largest - smallest) * 1000 <= u128::from(largest) * u128::from(TOLERANCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of looks after which `values` has settled.
    fn settled_after(values: impl IntoIterator<Item = u64>) -> Option<usize> {
        let mut settling = Settling::default();
        values
            .into_iter()
            .position(|value| settling.look(value))
            .map(|index| index + 1)
    }

    #[test]
    fn a_constant_figure_has_settled_once_it_was_looked_at_often_enough() {
        assert_eq!(settled_after([7; 20]), Some(LOOKS));
        assert_eq!(settled_after([0; 20]), Some(LOOKS));
        assert_eq!(settled_after([7; LOOKS - 1]), None);
    }

    #[test]
    fn a_fall_or_a_rise_begins_the_wait_anew() {
        let fall = std::iter::repeat_n(1000, LOOKS - 1).chain([980; 20]);
        assert_eq!(settled_after(fall), Some(LOOKS - 1 + LOOKS));
        let rise = std::iter::repeat_n(1000, LOOKS - 1).chain([1020; 20]);
        assert_eq!(settled_after(rise), Some(LOOKS - 1 + LOOKS));
        assert_eq!(settled_after((0..100).map(|step| 100_000 - 300 * step)), None);
    }

    #[test]
    fn what_stays_within_the_tolerance_has_settled() {
        assert_eq!(settled_after([1000, 990, 995, 1000, 990, 991]), Some(LOOKS));
        assert_eq!(settled_after([u64::MAX; 6]), Some(LOOKS));
    }
}
