//! What a guest says, checked: names, flags, extended attributes.

use super::owner::RESERVED;
use std::ffi::CStr;
use std::io;

/// Flags of open(2) that a guest has a say in.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_APPEND | libc::O_TRUNC | libc::O_SYNC | libc::O_DIRECT;

/// An error by its number.
pub(super) fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// A name that is one name: nothing that leads elsewhere.
pub(super) fn name(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
        return Err(error(libc::EINVAL));
    }
    Ok(name)
}

/// The flags of an open that a guest has a say in.
pub(super) fn open_flags(flags: u32) -> io::Result<i32> {
    let flags = flags.cast_signed() & OPEN_FLAGS;
    if flags & libc::O_ACCMODE == libc::O_ACCMODE {
        return Err(error(libc::EINVAL));
    }
    Ok(flags)
}

/// A place in a file: an `off_t`. The library takes others for impossible.
pub(super) fn offset_in_file(offset: u64) -> io::Result<u64> {
    match i64::try_from(offset) {
        Ok(_) => Ok(offset),
        Err(_) => Err(error(libc::EINVAL)),
    }
}

/// Whether a guest has a say in an extended attribute.
pub(super) fn is_users(name: &[u8]) -> bool {
    name.starts_with(b"user.") && !name.starts_with(RESERVED)
}

/// The name of an extended attribute that a guest has a say in.
pub(super) fn attribute(name: &CStr) -> io::Result<&CStr> {
    if !is_users(name.to_bytes()) {
        return Err(error(libc::EOPNOTSUPP));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_nowhere_else() {
        for good in [c"a", c"...", c"a b", c".hidden"] {
            assert_eq!(name(good).unwrap(), good);
        }
        for bad in [c"", c".", c"..", c"../x", c"/", c"a/b"] {
            assert_eq!(name(bad).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn flags_beyond_reading_and_writing_are_left_out() {
        let flags = libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT | libc::O_PATH | libc::O_TMPFILE;
        let kept = open_flags(flags.cast_unsigned()).unwrap();
        assert_eq!(kept, libc::O_RDWR | libc::O_TRUNC);
        assert!(open_flags(libc::O_ACCMODE.cast_unsigned()).is_err());
    }

    #[test]
    fn attributes_are_the_users_own() {
        assert!(attribute(c"user.x").is_ok());
        for bad in [c"user.lighter.owner", c"trusted.x", c"security.capability", c""] {
            assert!(attribute(bad).is_err());
        }
    }
}
