//! The setting after how much idle time a VM suspends by itself.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Why a text is no such time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no time to suspend after: write a number from 1 with s, m, h or d, such as 90s or 10m, at most 365d; or off"
)]
pub struct AutoSuspendError(String);

/// The longest.
const MOST: u64 = 365 * 24 * 3600;

/// Seconds, largest first.
const UNITS: [(char, u64); 4] = [('d', 24 * 3600), ('h', 3600), ('m', 60), ('s', 1)];

/// After how much idle time a VM suspends by itself, if it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AutoSuspend(pub Option<Duration>);

impl AutoSuspend {
    /// Whether it never does.
    pub fn is_off(&self) -> bool {
        self.0.is_none()
    }
}

impl FromStr for AutoSuspend {
    type Err = AutoSuspendError;

    fn from_str(text: &str) -> Result<Self, AutoSuspendError> {
        if text == "off" {
            return Ok(Self(None));
        }
        let parse = || {
            let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
            let (_, unit) = UNITS.into_iter().find(|(name, _)| unit == name.to_string())?;
            let digits = number.bytes().all(|byte| byte.is_ascii_digit());
            let seconds = number.parse::<u64>().ok().filter(|_| digits)?.checked_mul(unit)?;
            (1..=MOST)
                .contains(&seconds)
                .then(|| Self(Some(Duration::from_secs(seconds))))
        };
        parse().ok_or_else(|| AutoSuspendError(text.into()))
    }
}

impl fmt::Display for AutoSuspend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(time) = self.0 else {
            return f.write_str("off");
        };
        let seconds = time.as_secs();
        let whole = UNITS.into_iter().find(|(_, unit)| seconds % unit == 0);
        let (name, unit) = whole.unwrap_or(('s', 1));
        write!(f, "{}{name}", seconds / unit)
    }
}

impl TryFrom<String> for AutoSuspend {
    type Error = AutoSuspendError;

    fn try_from(text: String) -> Result<Self, AutoSuspendError> {
        text.parse()
    }
}

impl From<AutoSuspend> for String {
    fn from(time: AutoSuspend) -> Self {
        time.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        for (text, seconds) in [("1s", 1), ("90s", 90), ("10m", 600), ("2h", 7200), ("365d", MOST)] {
            let time: AutoSuspend = text.parse().unwrap();
            assert_eq!(time, AutoSuspend(Some(Duration::from_secs(seconds))), "{text}");
            assert_eq!(time.to_string(), text);
        }
        assert_eq!("60s".parse::<AutoSuspend>().unwrap().to_string(), "1m");
        assert_eq!("off".parse(), Ok(AutoSuspend(None)));
        assert_eq!(AutoSuspend(None).to_string(), "off");
        for bad in [
            "",
            "0s",
            "10",
            "m",
            "+1m",
            "-1m",
            "1.5h",
            "366d",
            "1w",
            "10 m",
            "999999999999999999d",
            "é",
        ] {
            assert!(bad.parse::<AutoSuspend>().is_err(), "{bad:?}");
        }
    }
}
