//! Who owns a file in the guest's eyes.
//!
//! On the host all that the guest creates belongs to the user who runs the VM. In the guest files have the owner that they
//! have on the host, which is right for most of what people do, and wrong for a database that gives its folder to an
//! account of its own and then looks whether it has it. So an owner that a guest gives to one of the user's files is
//! written down beside the file, in an extended attribute, and shown to guests from then on; the host's owner stays.

use std::ffi::CStr;
use std::fmt;
use std::str::FromStr;

/// The extended attribute.
pub(super) const ATTRIBUTE: &CStr = c"user.lighter.owner";

/// How the names of attributes begin that a guest neither sees nor sets: who can set an owner could make programs that
/// run as another.
pub(super) const RESERVED: &[u8] = b"user.lighter.";

/// Longest text of an owner, bytes.
pub(super) const MAX_TEXT: u32 = 21;

/// A user and a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// It is not `UID:GID` in decimal digits.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoOwner;

impl FromStr for Owner {
    type Err = NoOwner;

    fn from_str(text: &str) -> Result<Self, NoOwner> {
        let (uid, gid) = text.split_once(':').ok_or(NoOwner)?;
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            // The largest is no number of anybody, but "leave it as it is" in chown(2).
            let number = digits.then(|| text.parse().ok()).flatten();
            number.filter(|number| *number != u32::MAX).ok_or(NoOwner)
        };
        Ok(Self {
            uid: number(uid)?,
            gid: number(gid)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_nonsense_is_not() {
        let largest = Owner {
            uid: u32::MAX - 1,
            gid: u32::MAX - 1,
        };
        for owner in [Owner { uid: 0, gid: 999 }, largest] {
            let text = owner.to_string();
            assert!(text.len() <= MAX_TEXT as usize);
            assert_eq!(text.parse(), Ok(owner));
        }
        for bad in [
            "",
            ":",
            "1",
            "1:",
            ":1",
            "1:2:3",
            "-1:2",
            "+1:2",
            " 1:2",
            "1:4294967295",
            "4294967296:1",
        ] {
            assert_eq!(bad.parse::<Owner>(), Err(NoOwner), "{bad:?}");
        }
        assert!(ATTRIBUTE.to_bytes().starts_with(RESERVED));
    }
}
