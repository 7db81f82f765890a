//! What of the host's file system is in the guest, as the supervisor tells it on the kernel's command line: the agent
//! mounts shared folders before the engine starts.

use crate::escaped::Escaped;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// How the word for a share begins.
pub const SHARE_WORD: &str = "lighter.share=";

/// How the word for the engine's socket begins.
pub const SOCKET_WORD: &str = "lighter.socket=";

/// A shared folder, at the same path in the guest as on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestShare {
    /// The file system device's tag: letters and digits.
    pub tag: String,
    /// Where it is, absolute.
    pub path: PathBuf,
    /// Whether it cannot be changed.
    pub read_only: bool,
}

/// A word's value is not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} on the kernel's command line is not understood")]
pub struct ShareError(String);

impl GuestShare {
    /// Finds the shares on a command line, in their order.
    ///
    /// # Errors
    /// When one is not understood.
    pub fn find_all(command_line: &str) -> Result<Vec<Self>, ShareError> {
        words(command_line, SHARE_WORD).map(str::parse).collect()
    }
}

impl fmt::Display for GuestShare {
    /// The word for the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = if self.read_only { "ro" } else { "rw" };
        write!(f, "{SHARE_WORD}{},{mode},{}", self.tag, encode(&self.path))
    }
}

impl FromStr for GuestShare {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let parse = || {
            let mut parts = text.splitn(3, ',');
            let tag = parts.next().filter(|tag| !tag.is_empty())?.to_owned();
            let read_only = match parts.next()? {
                "ro" => true,
                "rw" => false,
                _ => return None,
            };
            let path = decode(parts.next()?)?;
            Some(Self { tag, path, read_only })
        };
        parse().ok_or_else(|| ShareError(format!("{SHARE_WORD}{text}")))
    }
}

/// The word that says where on the host the engine's socket is: the guest has it there, too, for containers that mount it.
pub fn socket_word(path: &Path) -> String {
    format!("{SOCKET_WORD}{}", encode(path))
}

/// Finds the path of [`socket_word`] on a command line.
///
/// # Errors
/// When it is not understood.
pub fn find_socket(command_line: &str) -> Result<Option<PathBuf>, ShareError> {
    let word = words(command_line, SOCKET_WORD).next();
    word.map(|text| decode(text).ok_or_else(|| ShareError(format!("{SOCKET_WORD}{text}"))))
        .transpose()
}

fn words<'a>(command_line: &'a str, beginning: &'a str) -> impl Iterator<Item = &'a str> {
    let words = command_line.split_ascii_whitespace();
    words.filter_map(move |word| word.strip_prefix(beginning))
}

/// The path as a word, or a part of one.
fn encode(path: &Path) -> Escaped {
    Escaped(path.as_os_str().as_bytes().to_vec())
}

/// An absolute path; `None` for anything else.
fn decode(text: &str) -> Option<PathBuf> {
    let Escaped(bytes) = text.parse().ok()?;
    let path = PathBuf::from(OsString::from_vec(bytes));
    path.is_absolute().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_found_again() {
        let share = |tag: &str, path: &str, read_only| GuestShare {
            tag: tag.into(),
            path: path.into(),
            read_only,
        };
        let shares = vec![
            share("share0", "/home/a user/ü,%\"=", false),
            share("share1", "/srv/data", true),
        ];
        assert_eq!(shares[1].to_string(), "lighter.share=share1,ro,/srv/data");
        let socket = Path::new("/run/user/1000/lighter/a b/docker.sock");
        let line = format!("quiet {} {} {} ro", shares[0], socket_word(socket), shares[1]);
        assert!(line.is_ascii());
        assert_eq!(GuestShare::find_all(&line), Ok(shares));
        assert_eq!(find_socket(&line), Ok(Some(socket.to_owned())));
        assert_eq!(GuestShare::find_all("quiet ro"), Ok(vec![]));
        assert_eq!(find_socket("quiet ro"), Ok(None));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "",
            "tag",
            "tag,ro",
            ",ro,/x",
            "tag,rx,/x",
            "tag,ro,x",
            "tag,ro,/%4",
            "tag,ro,/%zz",
            "tag,ro,",
        ] {
            assert!(
                GuestShare::find_all(&format!("{SHARE_WORD}{bad}")).is_err(),
                "{bad:?}"
            );
        }
        assert!(find_socket(&format!("{SOCKET_WORD}x")).is_err());
    }
}
