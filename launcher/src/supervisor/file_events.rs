//! Changes that the host makes in shared folders, for whoever watches files in the guest ([`lighter_protocol::file_events`]).
//!
//! The guest says what it watches, and only that is watched here: whole folders would be too much. It is hostile: it can
//! name nothing outside of the shared folders, no more than so many files, and what it does not read waits in the kernel's
//! bounded queue.

use crate::mounts::{self, Mount};
use lighter_protocol::agent::SupervisorMessage;
use lighter_protocol::causes::chain;
use lighter_protocol::escaped::Escaped;
use lighter_protocol::file_events::{
    EVENTS, FileEvent, FileId, IS_FOLDER, MOST_IN_MESSAGE, MOST_WATCHES, WatchChange,
};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use tokio::io::unix::AsyncFd;

/// Most events that the kernel keeps for one reader, by default (fs.inotify.max_queued_events): whoever has read so many has
/// read all that there was.
const QUEUE: usize = 16384;

/// What may not be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// No inotify for this user.
    #[error(
        "changes in shared folders do not reach programs in the guest that watch files: the host gives no inotify \
         instance (fs.inotify.max_user_instances)"
    )]
    Instance(#[source] io::Error),
    /// No more watches for this user.
    #[error(
        "changes in shared folders do not reach all programs in the guest that watch files: they watch more than \
         {watched}, and the host allows no more (fs.inotify.max_user_watches)"
    )]
    Full {
        /// How many there are.
        watched: usize,
    },
    /// More than is allowed to one guest.
    #[error(
        "changes in shared folders do not reach all programs in the guest that watch files: they watch more than \
         {MOST_WATCHES}"
    )]
    TooMany,
}

/// A shared folder.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    folder: OwnedFd,
}

/// What there is once the guest watches something.
#[derive(Debug)]
struct Active {
    inotify: AsyncFd<OwnedFd>,
    folders: Vec<Folder>,
}

/// Watches files for one agent.
#[derive(Debug)]
pub struct Watcher {
    mounts: Vec<Mount>,
    active: Option<Active>,
    /// A file on the host can be several in the guest, of shared folders that lie in each other.
    files: HashMap<i32, Vec<FileId>>,
    watches: HashMap<FileId, i32>,
    /// It was said that there can be no more.
    said_full: bool,
}

/// What happened.
#[derive(Debug, Default)]
struct Happened {
    events: Vec<FileEvent>,
    lost: bool,
}

impl Watcher {
    /// For a guest that has these folders. Nothing is opened before it watches something.
    pub fn new(mounts: Vec<Mount>) -> Self {
        Self {
            mounts,
            active: None,
            files: HashMap::new(),
            watches: HashMap::new(),
            said_full: false,
        }
    }

    /// Watches what the guest watches. Returns what is to be said of it, once.
    pub fn change(&mut self, changes: Vec<WatchChange>) -> Option<String> {
        let mut error = None;
        for WatchChange { file, path } in changes {
            match path {
                Some(path) => error = error.or(self.watch(file, &path).err()),
                None => self.forget(file),
            }
        }
        error
            .filter(|_| !std::mem::replace(&mut self.said_full, true))
            .map(|error| chain(&error))
    }

    /// What is gone, is not the user's to read, or lies outside of the folders is not watched, and nothing is said of it.
    fn watch(&mut self, file: FileId, Escaped(path): &Escaped) -> Result<(), WatchError> {
        if self.watches.len() >= MOST_WATCHES && !self.watches.contains_key(&file) {
            return Err(WatchError::TooMany);
        }
        if self.active.is_none() {
            self.active = Some(Active::new(&self.mounts).map_err(WatchError::Instance)?);
        }
        let added = self
            .active
            .as_ref()
            .map(|active| active.add(Path::new(OsStr::from_bytes(path))));
        match added {
            Some(Ok(watch)) => {
                if self.watches.get(&file) != Some(&watch) {
                    self.forget(file);
                    let files = self.files.entry(watch).or_default();
                    if files.len() < mounts::MOST {
                        files.push(file);
                        self.watches.insert(file, watch);
                    }
                }
                Ok(())
            }
            Some(Err(Errno::NOSPC)) => Err(WatchError::Full {
                watched: self.files.len(),
            }),
            Some(Err(_)) | None => Ok(()),
        }
    }

    fn forget(&mut self, file: FileId) {
        let Some(watch) = self.watches.remove(&file) else {
            return;
        };
        let Some(files) = self.files.get_mut(&watch) else {
            return;
        };
        files.retain(|other| *other != file);
        if files.is_empty() {
            self.files.remove(&watch);
            if let Some(active) = &self.active {
                // It is gone already when the file is.
                let _ = inotify::remove_watch(active.inotify.get_ref(), watch);
            }
        }
    }

    /// The next message for the agent. May be cancelled; never ends while nothing is watched.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub async fn next(&mut self) -> io::Result<SupervisorMessage> {
        loop {
            while let Some(happened) = self.read()? {
                if happened.is_anything() {
                    return Ok(message(happened, None));
                }
            }
            match &self.active {
                Some(active) => active.inotify.readable().await?.clear_ready(),
                None => std::future::pending().await,
            }
        }
    }

    /// Everything that has happened until now, as messages of which the last returns `round`.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn all(&mut self, round: u64) -> io::Result<Vec<SupervisorMessage>> {
        let mut messages = vec![];
        let mut count = 0;
        while count < QUEUE
            && let Some(happened) = self.read()?
        {
            count += happened.events.len() + 1;
            if happened.is_anything() {
                messages.push(message(happened, None));
            }
        }
        messages.push(message(Happened::default(), Some(round)));
        Ok(messages)
    }

    /// A part of what has happened, if anything has.
    fn read(&mut self) -> io::Result<Option<Happened>> {
        let Some(active) = &self.active else {
            return Ok(None);
        };
        // As many events as fit into a message: the shortest are of 16 bytes.
        let mut buffer = [MaybeUninit::uninit(); 16 * MOST_IN_MESSAGE];
        let mut reader = Reader::new(active.inotify.get_ref(), &mut buffer);
        let mut happened = Happened::default();
        let mut gone = vec![];
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let flags = event.events();
            happened.lost |= flags.contains(ReadFlags::QUEUE_OVERFLOW);
            if flags.contains(ReadFlags::IGNORED) {
                gone.push(event.wd());
            }
            let mask = flags.bits() & (EVENTS | IS_FOLDER);
            if mask & EVENTS != 0 {
                let files = self.files.get(&event.wd()).map_or(&[][..], Vec::as_slice);
                happened.events.extend(files.iter().map(|&file| FileEvent {
                    file,
                    mask,
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| Escaped(name.to_bytes().to_vec())),
                }));
            }
            if reader.is_buffer_empty() {
                break;
            }
        }
        for watch in gone {
            for file in self.files.remove(&watch).unwrap_or_default() {
                self.watches.remove(&file);
            }
        }
        Ok(Some(happened))
    }
}

impl Happened {
    fn is_anything(&self) -> bool {
        self.lost || !self.events.is_empty()
    }
}

fn message(happened: Happened, round: Option<u64>) -> SupervisorMessage {
    SupervisorMessage::FileEvents {
        events: happened.events,
        lost: happened.lost,
        round,
    }
}

impl Active {
    fn new(mounts: &[Mount]) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // A folder that is gone meanwhile has nothing to watch.
        let folders = mounts.iter().filter_map(|mount| {
            Some(Folder {
                path: mount.path.clone(),
                folder: mount.open().ok()?,
            })
        });
        Ok(Self {
            // SAFETY: an owned descriptor stays open and the same until the registration is dropped.
            inotify: unsafe { AsyncFd::register(inotify) }?,
            folders: folders.collect(),
        })
    }

    /// Watches `path`, which is in one of the folders and on the way to which there are no links.
    fn add(&self, path: &Path) -> Result<i32, Errno> {
        let inside = self.folders.iter().filter_map(|folder| {
            let rest = path.strip_prefix(&folder.path).ok()?;
            Some((folder, rest))
        });
        let (folder, rest) = inside
            .min_by_key(|(_, rest)| rest.as_os_str().len())
            .ok_or(Errno::NOENT)?;
        let rest = if rest.as_os_str().is_empty() {
            Path::new(".")
        } else {
            rest
        };
        let file = openat2(
            &folder.folder,
            rest,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )?;
        let this = format!("/proc/self/fd/{}", file.as_raw_fd());
        inotify::add_watch(self.inotify.get_ref(), this, WatchFlags::from_bits_retain(EVENTS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn file(node: u64) -> FileId {
        FileId { dev: 38, node }
    }

    fn watch(node: u64, path: &Path) -> WatchChange {
        WatchChange {
            file: file(node),
            path: Some(Escaped(path.as_os_str().as_bytes().to_vec())),
        }
    }

    fn watcher(folders: &[&Path]) -> Watcher {
        let mounts = folders.iter().map(|folder| Mount {
            path: folder.to_path_buf(),
            read_only: false,
        });
        Watcher::new(mounts.collect())
    }

    /// What has happened: node, mask, name.
    fn told(watcher: &mut Watcher) -> Vec<(u64, u32, String)> {
        let messages = watcher.all(1).unwrap();
        let events = messages.into_iter().flat_map(|message| match message {
            SupervisorMessage::FileEvents { events, .. } => events,
            other => panic!("{other:?}"),
        });
        let name = |event: &FileEvent| event.name.as_ref().map_or(String::new(), Escaped::to_string);
        events
            .map(|event| (event.file.node, event.mask, name(&event)))
            .collect()
    }

    #[tokio::test]
    async fn what_happens_to_what_is_watched_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("ä b");
        fs::create_dir(&inner).unwrap();
        let mut watcher = watcher(&[folder.path()]);
        assert_eq!(
            watcher.change(vec![watch(1, folder.path()), watch(2, &inner)]),
            None
        );
        fs::write(inner.join("file"), "x").unwrap();
        let message = watcher.next().await.unwrap();
        let SupervisorMessage::FileEvents { events, .. } = message else {
            panic!("{message:?}");
        };
        assert_eq!((events[0].file, events[0].mask), (file(2), 0x100));
        told(&mut watcher);
        fs::rename(inner.join("file"), folder.path().join("moved")).unwrap();
        fs::remove_file(folder.path().join("moved")).unwrap();
        fs::remove_dir(&inner).unwrap();
        assert_eq!(
            told(&mut watcher),
            [
                (2, 0x40, "file".to_owned()),
                (1, 0x80, "moved".to_owned()),
                (1, 0x200, "moved".to_owned()),
                (1, 0x200 | IS_FOLDER, "%c3%a4%20b".to_owned()),
            ]
        );
        assert!(!watcher.watches.contains_key(&file(2)), "it is gone");
        watcher.change(vec![WatchChange {
            file: file(1),
            path: None,
        }]);
        fs::write(folder.path().join("unseen"), "").unwrap();
        assert_eq!(told(&mut watcher), []);
        assert!(watcher.files.is_empty() && watcher.watches.is_empty());
    }

    #[tokio::test]
    async fn a_round_comes_after_what_happened_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut watcher = watcher(&[folder.path()]);
        let empty = SupervisorMessage::FileEvents {
            events: vec![],
            lost: false,
            round: Some(3),
        };
        assert_eq!(watcher.all(3).unwrap(), std::slice::from_ref(&empty));
        watcher.change(vec![watch(1, folder.path())]);
        for number in 0..3 * MOST_IN_MESSAGE {
            fs::create_dir(folder.path().join(number.to_string())).unwrap();
        }
        let mut messages = watcher.all(3).unwrap();
        assert_eq!(messages.pop(), Some(empty));
        let count: usize = messages
            .iter()
            .map(|message| match message {
                SupervisorMessage::FileEvents { events, round, .. } => {
                    assert!(events.len() <= MOST_IN_MESSAGE && round.is_none());
                    events.len()
                }
                other => panic!("{other:?}"),
            })
            .sum();
        assert_eq!(count, 3 * MOST_IN_MESSAGE);
    }

    #[tokio::test]
    async fn a_guest_can_watch_nothing_outside_and_no_file_too_often() {
        let parent = tempfile::tempdir().unwrap();
        let (shared, outside) = (parent.path().join("shared"), parent.path().join("outside"));
        fs::create_dir(&shared).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, shared.join("link")).unwrap();
        fs::create_dir(outside.join("below")).unwrap();
        let mut watcher = watcher(&[&shared]);
        for path in [
            outside.clone(),
            shared.join("../outside"),
            shared.join("link/below"),
            shared.join("link/"),
            shared.join("missing"),
            "relative".into(),
            Path::new(OsStr::from_bytes(b"/zero\0")).to_owned(),
        ] {
            watcher.change(vec![watch(1, &path)]);
        }
        fs::write(outside.join("file"), "").unwrap();
        fs::write(outside.join("below/file"), "").unwrap();
        assert_eq!(told(&mut watcher), []);
        for node in 0..100 {
            watcher.change(vec![watch(node, &shared)]);
        }
        fs::create_dir(shared.join("new")).unwrap();
        assert_eq!(told(&mut watcher).len(), mounts::MOST);
    }

    #[tokio::test]
    async fn a_folder_inside_of_another_is_both() {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let mut watcher = watcher(&[outer.path(), &inner]);
        watcher.change(vec![watch(1, &inner), watch(2, &inner)]);
        fs::create_dir(inner.join("x")).unwrap();
        let nodes: Vec<u64> = told(&mut watcher).iter().map(|(node, ..)| *node).collect();
        assert_eq!(nodes, [1, 2]);
    }
}
