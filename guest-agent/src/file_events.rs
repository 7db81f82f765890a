//! Changes that the host makes in shared folders ([`lighter_protocol::file_events`]): carried between the guest's kernel, which
//! knows who watches what (its device /dev/lighter-events, a patch of ours), and the supervisor.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lighter_protocol::{
    agent::AgentMessage,
    escaped::Escaped,
    file_events::{FileEvent, FileId, MOST_IN_MESSAGE, MOST_WATCHES, WatchChange},
};
use tokio::{sync::Notify, task::spawn_blocking};

use crate::{fd::AsyncFile, log::Log};

mod device;

use device::{Record, Told};

/// The kernel's device.
const DEVICE: &str = "/dev/lighter-events";

/// Most events that wait for the kernel. It is quick: more come only from a supervisor that does not wait for its connection.
const MOST_WAITING: usize = 16384;

/// What the agent knows of watches; clones share it.
#[derive(Clone, Debug, Default)]
pub struct FileEvents(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to say to the supervisor.
    to_say: Notify,
    /// There is something to tell the kernel.
    to_tell: Notify,
}

#[derive(Debug, Default)]
struct State {
    watched: BTreeMap<FileId, Escaped>,
    /// Watches that the supervisor does not know of, or no longer should.
    changed: BTreeSet<FileId>,
    /// The number that the kernel waits for, and whether it was said.
    round: Option<(u64, bool)>,
    waiting: VecDeque<Told>,
    /// It was said that too much is watched.
    said_full: bool,
}

impl FileEvents {
    /// Carries until the VM ends.
    pub fn start(&self, log: &Log) {
        let open = || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_CLOEXEC)
                .open(DEVICE)?;
            io::Result::Ok((AsyncFile::new(file.try_clone()?.into())?, file))
        };
        match open() {
            Ok((reader, writer)) => {
                drop(tokio::spawn(self.clone().read(reader, log.clone())));
                drop(tokio::spawn(self.clone().write(writer)));
            }
            Err(error) => log.warn(format!(
                "changes that the host makes in shared folders do not wake programs that watch files: cannot open {DEVICE}: \
                 {error}; build the kernel by scripts/build-kernel of the same checkout"
            )),
        }
    }

    /// On a new connection: the supervisor knows nothing.
    pub fn begin(&self) {
        let mut state = self.state();
        state.changed = state.watched.keys().copied().collect();
        if let Some((_, said)) = &mut state.round {
            *said = false;
        }
        drop(state);
        self.0.to_say.notify_one();
    }

    /// The next message for the supervisor. May be cancelled.
    pub async fn next(&self) -> AgentMessage {
        loop {
            if let Some(message) = self.state().message() {
                return message;
            }
            self.0.to_say.notified().await;
        }
    }

    /// What the supervisor says.
    pub fn take(&self, events: Vec<FileEvent>, lost: bool, round: Option<u64>) {
        let mut state = self.state();
        state.take(events, lost, round);
        drop(state);
        self.0.to_tell.notify_one();
    }

    async fn read(self, device: AsyncFile, log: Log) {
        let mut mounts = device::Mounts::default();
        let mut buffer = vec![0; device::LONGEST_RECORD];
        loop {
            let length = match device.read(&mut buffer).await {
                Ok(length) => length,
                Err(error) => return log.error(format!("cannot read from {DEVICE}: {error}")),
            };
            let record = Record::parse(&buffer[..length]);
            let warning = match record {
                // A file system that is not mounted where the agent is has no path that the host would know.
                Some(Record::Watched(file, path)) => match mounts.whole(file.dev, path) {
                    Some(path) => self.state().watch(file, path),
                    None => None,
                },
                Some(Record::Unwatched(file)) => {
                    self.state().unwatch(file);
                    None
                }
                Some(Record::Round(round)) => {
                    self.state().round = Some((round, false));
                    None
                }
                Some(Record::Lost) => {
                    Some("more files of shared folders are watched than the kernel could tell at once")
                }
                None => None,
            };
            if let Some(warning) = warning {
                log.warn(format!(
                    "{warning}: changes that the host makes do not wake all programs that watch them"
                ));
            }
            self.0.to_say.notify_one();
        }
    }

    /// The kernel may ask the host for a file's attributes on the way, so this is not for the event loop.
    async fn write(self, mut device: File) {
        loop {
            let batch = std::mem::take(&mut self.state().waiting);
            if batch.is_empty() {
                self.0.to_tell.notified().await;
                continue;
            }
            let written = spawn_blocking(move || {
                for told in batch {
                    // Who watched it may have gone.
                    let _ = device.write(&told.to_bytes());
                }
                device
            });
            match written.await {
                Ok(returned) => device = returned,
                // The runtime ends.
                Err(_) => return,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns what is to be said of it.
    fn watch(&mut self, file: FileId, path: Escaped) -> Option<&'static str> {
        if self.watched.len() >= MOST_WATCHES && !self.watched.contains_key(&file) {
            let first = !std::mem::replace(&mut self.said_full, true);
            return first.then_some("more files of shared folders are watched than the host is told of");
        }
        self.watched.insert(file, path);
        self.changed.insert(file);
        None
    }

    fn unwatch(&mut self, file: FileId) {
        if self.watched.remove(&file).is_some() {
            self.changed.insert(file);
        }
    }

    /// A round is asked for when the supervisor knows all watches.
    fn message(&mut self) -> Option<AgentMessage> {
        let mut changes = vec![];
        while changes.len() < MOST_IN_MESSAGE
            && let Some(file) = self.changed.pop_first()
        {
            let path = self.watched.get(&file).cloned();
            changes.push(WatchChange { file, path });
        }
        let round = match &mut self.round {
            Some((round, said)) if self.changed.is_empty() && !*said => {
                *said = true;
                Some(*round)
            }
            _ => None,
        };
        (round.is_some() || !changes.is_empty()).then_some(AgentMessage::FileWatches { changes, round })
    }

    fn take(&mut self, events: Vec<FileEvent>, lost: bool, round: Option<u64>) {
        let lost = lost || self.waiting.len() + events.len() > MOST_WAITING;
        if lost {
            // Whoever hears of it looks at everything anew.
            self.waiting.retain(|told| matches!(told, Told::RoundOver(_)));
            self.waiting
                .extend(self.watched.keys().map(|&file| Told::Lost(file)));
        } else {
            self.waiting.extend(events.into_iter().map(Told::Happened));
        }
        if let Some(round) = round
            && self.round.is_some_and(|(asked, _)| asked == round)
        {
            self.round = None;
            self.waiting.push_back(Told::RoundOver(round));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(node: u64) -> FileId {
        FileId { dev: 38, node }
    }

    fn path(text: &str) -> Escaped {
        Escaped(text.as_bytes().to_vec())
    }

    fn event(node: u64) -> FileEvent {
        FileEvent {
            file: file(node),
            mask: 2,
            cookie: 0,
            name: None,
        }
    }

    fn change(node: u64, to: Option<&str>) -> WatchChange {
        WatchChange {
            file: file(node),
            path: to.map(path),
        }
    }

    #[tokio::test]
    async fn the_supervisor_hears_of_each_change_once_and_of_all_when_it_is_new() {
        let events = FileEvents::default();
        assert_eq!(events.state().watch(file(1), path("/a")), None);
        assert_eq!(events.state().watch(file(2), path("/b")), None);
        events.state().round = Some((7, false));
        events.state().unwatch(file(3));
        let first = AgentMessage::FileWatches {
            changes: vec![change(1, Some("/a")), change(2, Some("/b"))],
            round: Some(7),
        };
        assert_eq!(events.next().await, first);
        assert_eq!(events.state().message(), None);
        events.state().unwatch(file(1));
        let second = AgentMessage::FileWatches {
            changes: vec![change(1, None)],
            round: None,
        };
        assert_eq!(events.next().await, second);
        events.begin();
        let anew = AgentMessage::FileWatches {
            changes: vec![change(2, Some("/b"))],
            round: Some(7),
        };
        assert_eq!(events.next().await, anew);
    }

    #[test]
    fn a_round_is_asked_for_after_all_changes_and_ends_after_all_events() {
        let mut state = State::default();
        for node in 0..=MOST_IN_MESSAGE as u64 {
            state.watch(file(node), path("/x"));
        }
        state.round = Some((1, false));
        let rounds: Vec<Option<u64>> = std::iter::from_fn(|| state.message())
            .map(|message| match message {
                AgentMessage::FileWatches { round, .. } => round,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(rounds, [None, Some(1)]);
        state.take(vec![event(1)], false, None);
        state.take(vec![event(2)], false, Some(1));
        // Of a connection before this.
        state.take(vec![], false, Some(1));
        assert_eq!(
            state.waiting,
            [
                Told::Happened(event(1)),
                Told::Happened(event(2)),
                Told::RoundOver(1)
            ]
        );
    }

    #[test]
    fn when_there_is_too_much_every_watcher_is_told_to_look_anew() {
        let mut state = State::default();
        state.watch(file(1), path("/a"));
        state.watch(file(2), path("/b"));
        state.take(vec![event(1)], false, None);
        state.take(vec![], true, None);
        let lost = [Told::Lost(file(1)), Told::Lost(file(2))];
        assert_eq!(state.waiting, lost);
        state.take(vec![event(1); MOST_WAITING], false, None);
        assert_eq!(state.waiting, lost);
    }

    #[test]
    fn what_is_watched_is_bounded() {
        let mut state = State::default();
        for node in 0..MOST_WATCHES as u64 {
            assert_eq!(state.watch(file(node), path("/x")), None);
        }
        assert!(state.watch(file(u64::MAX), path("/x")).is_some());
        assert_eq!(state.watch(file(u64::MAX), path("/x")), None, "said once");
        assert_eq!(state.watched.len(), MOST_WATCHES);
    }
}
