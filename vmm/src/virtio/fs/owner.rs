//! Who owns a file in the guest's eyes.
//!
//! On the host all that the guest creates belongs to the user who runs the VM. In the guest files have the owner that they
//! have on the host, which is right for most of what people do, and wrong for a database that gives its folder to an
//! account of its own and then looks whether it has it. So an owner that a guest gives to one of the user's files is
//! written down beside the file, in an extended attribute, and shown to guests from then on; the host's owner stays.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use virtiofsd::filesystem::{Context, FileSystem, GetxattrReply, SetattrValid, SetxattrFlags};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::soft_idmap::Id;

/// The extended attribute.
const ATTRIBUTE: &CStr = c"user.lighter.owner";

/// How the names of attributes begin that a guest neither sees nor sets: who can set an owner could make programs that
/// run as another.
pub(super) const RESERVED: &[u8] = b"user.lighter.";

/// Longest text of an owner, bytes.
const MAX_TEXT: u32 = 21;

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

/// Most files whose recorded owner is remembered.
const REMEMBERED: usize = 64 << 10;

/// The owners of a folder's files.
#[derive(Debug)]
pub(super) struct Owners {
    /// Who runs this process, and owns on the host what the guest creates.
    user: u32,
    /// Recorded owners by inode, each with the change time of the file at which it was read.
    remembered: Mutex<HashMap<u64, (ChangeTime, Option<Owner>)>>,
}

type ChangeTime = (u64, u32);

impl Owners {
    /// For files that the guest creates on behalf of `user`.
    pub(super) fn new(user: u32) -> Self {
        Self {
            user,
            remembered: Mutex::default(),
        }
    }

    /// Forgets what it remembers of files.
    pub(super) fn forget(&self) {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// The owner that was recorded for a file of the user's.
    fn recorded(&self, fs: &PassthroughFs, ctx: Context, inode: u64, attr: &Attr) -> Option<Owner> {
        if attr.uid.into_inner() != self.user || !keeps_owner(attr) {
            return None;
        }
        let changed = (attr.ctime, attr.ctimensec);
        let mut owners = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, owner)) = owners.get(&inode)
            && *at == changed
        {
            return *owner;
        }
        let text = match fs.getxattr(ctx, inode, ATTRIBUTE, MAX_TEXT) {
            Ok(GetxattrReply::Value(text)) => text,
            // There is none, or it cannot be read.
            _ => vec![],
        };
        let owner = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
        if owners.len() >= REMEMBERED {
            owners.clear();
        }
        owners.insert(inode, (changed, owner));
        owner
    }

    /// The attributes as the guest sees them.
    pub(super) fn shown(&self, fs: &PassthroughFs, ctx: Context, inode: u64, mut attr: Attr) -> Attr {
        if let Some(owner) = self.recorded(fs, ctx, inode, &attr) {
            attr.uid = owner.uid.into();
            attr.gid = owner.gid.into();
        }
        attr
    }

    /// Writes down who owns a file in the guest's eyes; nothing, if that is who owns it on the host.
    fn record(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        inode: u64,
        attr: &Attr,
        owner: Owner,
    ) -> io::Result<()> {
        let on_host = Owner {
            uid: attr.uid.into_inner(),
            gid: attr.gid.into_inner(),
        };
        let text = owner.to_string();
        let write = || {
            if owner == on_host {
                let removed = fs.removexattr(ctx, inode, ATTRIBUTE);
                return removed.or_else(|error| match error.raw_os_error() {
                    Some(libc::ENODATA) => Ok(()),
                    _ => Err(error),
                });
            }
            let none = SetxattrFlags::empty();
            fs.setxattr(ctx, inode, ATTRIBUTE, text.as_bytes(), 0, none)
        };
        let written = match write() {
            // An attribute can only be written where the file can.
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                chmod(fs, ctx, inode, attr.mode | 0o600)?;
                let written = write();
                chmod(fs, ctx, inode, attr.mode)?;
                written
            }
            written => written,
        };
        let mut owners = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        owners.remove(&inode);
        match written {
            // A file system that has no such attributes: the owner stays what it is.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            written => written,
        }
    }

    /// Gives a file to another user, another group, or both.
    pub(super) fn give(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        inode: u64,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> io::Result<()> {
        let (attr, _) = fs.getattr(ctx, inode, None)?;
        if attr.uid.into_inner() != self.user {
            return Err(error(libc::EPERM));
        }
        if !keeps_owner(&attr) {
            return Ok(());
        }
        let shown = self.shown(fs, ctx, inode, attr);
        let owner = Owner {
            uid: uid.unwrap_or(shown.uid.into_inner()),
            gid: gid.unwrap_or(shown.gid.into_inner()),
        };
        self.record(fs, ctx, inode, &attr, owner)?;
        // As chown(2) does: a program that ran as its owner is not to run as another.
        let mut mode = attr.mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            mode &= !libc::S_ISGID;
        }
        if attr.mode & libc::S_IFMT == libc::S_IFREG && mode != attr.mode {
            chmod(fs, ctx, inode, mode)?;
        }
        Ok(())
    }

    /// A new file or folder belongs to whoever made it, in the guest's eyes: to the user if that is the guest's root.
    pub(super) fn adopt(
        &self,
        fs: &PassthroughFs,
        ctx: Context,
        parent: u64,
        inode: u64,
        attr: Attr,
    ) -> io::Result<Attr> {
        let (uid, mut gid) = (ctx.uid.into_inner(), ctx.gid.into_inner());
        if uid == 0 || uid == self.user || !keeps_owner(&attr) {
            return Ok(attr);
        }
        let (folder, _) = fs.getattr(ctx, parent, None)?;
        if folder.mode & libc::S_ISGID != 0 {
            gid = self.shown(fs, ctx, parent, folder).gid.into_inner();
        }
        self.record(fs, ctx, inode, &attr, Owner { uid, gid })?;
        // Its change time is another now.
        let (attr, _) = fs.getattr(ctx, inode, None)?;
        Ok(self.shown(fs, ctx, inode, attr))
    }
}

fn error(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Whether an owner can be recorded: Linux gives the attributes of users to nothing else.
fn keeps_owner(attr: &Attr) -> bool {
    matches!(attr.mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR)
}

fn chmod(fs: &PassthroughFs, ctx: Context, inode: u64, mode: u32) -> io::Result<()> {
    let attr = SetattrIn {
        mode: mode & 0o7777,
        ..SetattrIn::default()
    };
    fs.setattr(ctx, inode, attr, None, SetattrValid::MODE).map(drop)
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
