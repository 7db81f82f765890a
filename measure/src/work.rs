//! Something that was done, and how long it took.

use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Something that was done, and how long it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// How many of it.
    pub amount: u64,
    /// Nanoseconds.
    pub ns: u64,
}

impl Work {
    /// How many of it in a second.
    pub fn per_second(self) -> f64 {
        self.amount as f64 * 1e9 / self.ns.max(1) as f64
    }

    /// MiB in a second, of work that is counted in bytes.
    pub fn mib_per_second(self) -> f64 {
        self.per_second() / f64::from(1 << 20)
    }
}

/// Nanoseconds since `began`.
pub(crate) fn since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
