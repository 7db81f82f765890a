//! Random names for things.

use std::{fs, io};

const SOURCE: &str = "/proc/sys/kernel/random/uuid";

/// The kernel does not give one.
#[derive(Debug, thiserror::Error)]
#[error("cannot read a random identifier from {SOURCE}")]
pub struct Error(#[source] io::Error);

/// A new UUID (version 4).
///
/// # Errors
/// When the kernel gives none.
pub fn uuid() -> Result<String, Error> {
    Ok(fs::read_to_string(SOURCE).map_err(Error)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_are_the_same() {
        let (one, other) = (uuid().unwrap(), uuid().unwrap());
        assert_eq!((one.len(), one.matches('-').count()), (36, 4));
        assert_ne!(one, other);
    }
}
