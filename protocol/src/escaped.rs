//! Bytes as text: what a word of a command line, a JSON string or a reader could take for something else is written as
//! `%` and two digits. Paths and names on Linux need not be UTF-8.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Bytes that are text on their way.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Escaped(pub Vec<u8>);

/// A `%` without two digits behind it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} has a % without two hexadecimal digits")]
pub struct EscapeError(String);

impl fmt::Display for Escaped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in &self.0 {
            match byte {
                b'/' | b'-' | b'_' | b'.' | b'+' => write!(f, "{}", char::from(byte))?,
                byte if byte.is_ascii_alphanumeric() => write!(f, "{}", char::from(byte))?,
                byte => write!(f, "%{byte:02x}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Escaped {
    type Err = EscapeError;

    fn from_str(text: &str) -> Result<Self, EscapeError> {
        let parse = || {
            let mut bytes = vec![];
            let mut rest = text.bytes();
            while let Some(byte) = rest.next() {
                if byte != b'%' {
                    bytes.push(byte);
                    continue;
                }
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                bytes.push(u8::try_from(high * 16 + low).ok()?);
            }
            Some(Self(bytes))
        };
        parse().ok_or_else(|| EscapeError(text.to_owned()))
    }
}

impl TryFrom<String> for Escaped {
    type Error = EscapeError;

    fn try_from(text: String) -> Result<Self, EscapeError> {
        text.parse()
    }
}

impl From<Escaped> for String {
    fn from(escaped: Escaped) -> Self {
        escaped.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again(bytes: Vec<u8>) {
            let escaped = Escaped(bytes);
            let text = escaped.to_string();
            prop_assert!(text.bytes().all(|byte| byte.is_ascii_graphic()));
            prop_assert_eq!(text.parse(), Ok(escaped));
        }
    }

    #[test]
    fn half_an_escape_is_refused() {
        for bad in ["%", "%4", "%zz", "a%"] {
            assert!(bad.parse::<Escaped>().is_err(), "{bad:?}");
        }
    }
}
