//! Changes that the host makes in shared folders, for those who watch files in the guest.
//!
//! The agent tells which files and folders are watched ([`crate::agent::AgentMessage::FileWatches`]), the supervisor what
//! happens to them ([`crate::agent::SupervisorMessage::FileEvents`]). The masks are those of inotify(7).

use crate::escaped::Escaped;
use serde::{Deserialize, Serialize};

/// What the host tells: IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE and
/// IN_MOVE_SELF. What only reads is not told, and the deletion of the watched file itself the guest finds by its attributes.
pub const EVENTS: u32 = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x800;

/// IN_ISDIR, which comes with an event.
pub const IS_FOLDER: u32 = 0x4000_0000;

/// Most files and folders that the host watches for a guest.
pub const MOST_WATCHES: usize = 65536;

/// Most changes or events of one message.
pub const MOST_IN_MESSAGE: usize = 128;

/// A file or folder in the guest's own terms, which mean nothing to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileId {
    /// The file system's device number.
    pub dev: u32,
    /// The number of the FUSE node.
    pub node: u64,
}

/// A file is watched, or no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchChange {
    /// Which.
    pub file: FileId,
    /// Where it is, absolute, the same on the host as in the guest; `None` when it is not watched any more.
    pub path: Option<Escaped>,
}

/// Something happened on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvent {
    /// To which watched file or folder.
    pub file: FileId,
    /// Some of [`EVENTS`], and [`IS_FOLDER`].
    pub mask: u32,
    /// Joins the two events of a move; else zero.
    pub cookie: u32,
    /// In a folder, the name of what it happened to.
    pub name: Option<Escaped>,
}
