//! Names of VMs and of snapshots.

use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};
use std::str::FromStr;

/// The longest name, bytes: it is also the guest's hostname.
const MAX_LENGTH: usize = 63;

/// A valid name of a VM or a snapshot: `[a-z0-9][a-z0-9._-]{0,62}`. Safe as a file name and as a hostname.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing.
    #[error("a name cannot be empty")]
    Empty,
    /// Longer than [`MAX_LENGTH`].
    #[error("a name has at most {MAX_LENGTH} characters, this one has {0}")]
    TooLong(usize),
    /// The first character is neither a lower-case letter nor a digit.
    #[error("a name starts with a lower-case letter or a digit, not with {0:?}")]
    Start(char),
    /// A character that names do not have.
    #[error("a name has only lower-case letters, digits, '.', '_' and '-', not {0:?}")]
    Character(char),
}

impl Name {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let first = text.chars().next().ok_or(NameError::Empty)?;
        if !plain(first) {
            return Err(NameError::Start(first));
        }
        if let Some(c) = text.chars().find(|&c| !plain(c) && !matches!(c, '.' | '_' | '-')) {
            return Err(NameError::Character(c));
        }
        if text.len() > MAX_LENGTH {
            return Err(NameError::TooLong(text.len()));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl Display for Name {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for bad in [
            "..", ".", "a/b", "/", "-rf", ".hidden", "a b", "A", "ä", "a\0", "a\n",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
        assert_eq!("".parse::<Name>(), Err(NameError::Empty));
    }

    #[test]
    fn sixty_three_characters_are_the_most() {
        assert!("a".repeat(63).parse::<Name>().is_ok());
        assert_eq!("a".repeat(64).parse::<Name>(), Err(NameError::TooLong(64)));
        assert!("0a.b_c-d".parse::<Name>().is_ok());
    }
}
