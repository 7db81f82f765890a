//! Sizes and counts on the command line and in configuration files, with their limits.

use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};
use std::str::FromStr;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The most vCPUs: what the guest's kernel is built for.
pub const MAX_CPUS: u16 = 64;
const MIN_MEMORY: u64 = 256 * MIB;
const MIN_DISK: u64 = GIB;
/// The largest ext4 file system with 4 KiB blocks and 32-bit block numbers.
const MAX_DISK: u64 = 16 * TIB;

/// Why a text is not a size within the limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error(
        "{0:?} is not a size: write a number with k, m, g or t, such as 512m or 2g (a bare number is GiB)"
    )]
    Malformed(String),
    /// Not a whole number.
    #[error("{0:?} is not a whole number")]
    NotANumber(String),
    /// Under or over what is possible.
    #[error("{what} of {value} is out of range: {limits}")]
    OutOfRange {
        /// What the size is of.
        what: &'static str,
        /// What was asked for.
        value: String,
        /// What is possible.
        limits: String,
    },
}

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "SizeText", into = "String")]
pub struct Size(pub u64);

/// What configuration files may hold: `"2g"`, or a bare number of GiB.
#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Text(String),
    Gib(i64),
}

impl TryFrom<SizeText> for Size {
    type Error = SizeError;

    fn try_from(text: SizeText) -> Result<Self, SizeError> {
        match text {
            SizeText::Text(text) => text.parse(),
            SizeText::Gib(number) => number.to_string().parse(),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.to_string()
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.into());
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match lower[digits.len()..].trim_end_matches('b').trim_end_matches('i') {
            "" if digits.len() == lower.len() => GIB,
            "k" => KIB,
            "m" => MIB,
            "g" => GIB,
            "t" => TIB,
            _ => return Err(malformed()),
        };
        let number: f64 = digits.parse().map_err(|_| malformed())?;
        let bytes = number * unit as f64;
        if !bytes.is_finite() || number.is_sign_negative() || bytes >= u64::MAX as f64 {
            return Err(SizeError::OutOfRange {
                what: "a size",
                value: text.into(),
                limits: "it is a positive number of bytes below 16 EiB".into(),
            });
        }
        Ok(Self(bytes as u64))
    }
}

impl Display for Size {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(TIB, "t"), (GIB, "g"), (MIB, "m"), (KIB, "k")];
        match units
            .iter()
            .find(|(unit, _)| self.0 > 0 && self.0.is_multiple_of(*unit))
        {
            Some((unit, letter)) => write!(out, "{}{letter}", self.0 / unit),
            None => write!(out, "{:.1}k", self.0 as f64 / KIB as f64),
        }
    }
}

impl Size {
    /// Bytes for people: `1.5 GiB`.
    pub fn human(self) -> String {
        let units = [(TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")];
        match units.iter().find(|(unit, _)| self.0 >= *unit) {
            Some((unit, name)) if self.0.is_multiple_of(*unit) => format!("{} {name}", self.0 / unit),
            Some((unit, name)) => format!("{:.1} {name}", self.0 as f64 / *unit as f64),
            None => format!("{} bytes", self.0),
        }
    }

    /// Whole MiB, rounded down.
    pub fn mib(self) -> u64 {
        self.0 / MIB
    }

    fn within(self, what: &'static str, low: u64, high: u64, high_name: &str) -> Result<Self, SizeError> {
        if (low..=high).contains(&self.0) {
            return Ok(self);
        }
        Err(SizeError::OutOfRange {
            what,
            value: self.human(),
            limits: format!(
                "from {} to {} ({high_name})",
                Self(low).human(),
                Self(high).human()
            ),
        })
    }
}

/// Guest memory: from 256 MiB to what the host has.
///
/// # Errors
/// When `text` is no size, or out of range.
pub fn memory(text: &str) -> Result<Size, SizeError> {
    check_memory(text.parse()?)
}

/// As [`memory`], for a size that was read elsewhere. Rounded down to whole MiB.
///
/// # Errors
/// When it is out of range.
pub fn check_memory(size: Size) -> Result<Size, SizeError> {
    let size = size.within("guest memory", MIN_MEMORY, host_memory().0, "what this host has")?;
    Ok(Size(size.0 / MIB * MIB))
}

/// The data disk: from 1 GiB to what ext4 can use.
///
/// # Errors
/// When `text` is no size, or out of range.
pub fn disk(text: &str) -> Result<Size, SizeError> {
    check_disk(text.parse()?)
}

/// As [`disk`], for a size that was read elsewhere. Rounded down to whole MiB.
///
/// # Errors
/// When it is out of range.
pub fn check_disk(size: Size) -> Result<Size, SizeError> {
    let size = size.within("a data disk", MIN_DISK, MAX_DISK, "the most ext4 can use")?;
    Ok(Size(size.0 / MIB * MIB))
}

/// vCPUs: from 1 to [`MAX_CPUS`].
///
/// # Errors
/// When `text` is no whole number, or out of range.
pub fn cpus(text: &str) -> Result<u16, SizeError> {
    let number: i64 = text
        .trim()
        .parse()
        .map_err(|_| SizeError::NotANumber(text.into()))?;
    check_cpus(number)
}

/// As [`cpus`], for a number that was read elsewhere.
///
/// # Errors
/// When it is out of range.
pub fn check_cpus(number: i64) -> Result<u16, SizeError> {
    u16::try_from(number)
        .ok()
        .filter(|n| (1..=MAX_CPUS).contains(n))
        .ok_or_else(|| SizeError::OutOfRange {
            what: "a number of vCPUs",
            value: number.to_string(),
            limits: format!("from 1 to {MAX_CPUS} (what the guest's kernel is built for)"),
        })
}

/// The host's memory.
pub fn host_memory() -> Size {
    let info = rustix::system::sysinfo();
    Size((info.totalram as u64).saturating_mul(u64::from(info.mem_unit)))
}

/// CPUs that this process may run on.
pub fn host_cpus() -> u16 {
    std::thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX))
}

/// Used when nobody says otherwise: the host's CPUs, at most 4.
pub fn default_cpus() -> u16 {
    host_cpus().min(4)
}

/// Used when nobody says otherwise: 2 GiB, or a quarter of the host's memory if that is less.
pub fn default_memory() -> Size {
    let quarter = host_memory().0 / 4;
    Size(quarter.clamp(MIN_MEMORY, 2 * GIB) / MIB * MIB)
}

/// Used when nobody says otherwise: 20 GiB, which take space only as the guest writes to them.
pub fn default_disk() -> Size {
    Size(20 * GIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_and_a_bare_number_is_gib() {
        for (text, bytes) in [
            ("2", 2 * GIB),
            ("2g", 2 * GIB),
            ("2GiB", 2 * GIB),
            ("2GB", 2 * GIB),
            ("512m", 512 * MIB),
            ("1.5g", 3 * GIB / 2),
            ("1t", TIB),
            ("4096k", 4 * MIB),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "g", "2x", "2bytes", "b", "2 g g", "nan", "infg", "-1g", "1e30t", "0x10",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn limits_are_in_the_message() {
        assert!(memory("0").unwrap_err().to_string().contains("256 MiB"));
        assert!(
            memory("900t")
                .unwrap_err()
                .to_string()
                .contains("what this host has")
        );
        assert!(disk("17t").unwrap_err().to_string().contains("16 TiB"));
        assert!(disk("1m").is_err());
        for bad in ["0", "-1", "65", "99999999999999999999", "two", "1.5"] {
            assert!(cpus(bad).is_err(), "{bad}");
        }
        assert_eq!(cpus("64"), Ok(64));
    }

    #[test]
    fn what_is_written_is_read_back() {
        for bytes in [GIB, 20 * GIB, 1536 * MIB, 300 * MIB, TIB] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
    }

    #[test]
    fn defaults_are_within_the_limits() {
        assert!(check_memory(default_memory()).is_ok());
        assert!(check_disk(default_disk()).is_ok());
        assert!(check_cpus(i64::from(default_cpus())).is_ok());
    }
}
