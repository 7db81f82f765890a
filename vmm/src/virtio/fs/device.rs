//! The device's thread: answers FUSE requests.

use super::folder::{Folder, ask_to_forget};
use super::known::{Known, Next};
use super::translate::Translator;
use super::{HIPRIO, QUEUES, REQUESTS};
use crate::memory::GuestMemory;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::queue::{QueueError, VirtQueue};
use crate::virtio::worker::{Handler, Poller};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtiofsd::filesystem::SerializableFileSystem;
use virtiofsd::server::Server;
use vmm_sys_util::epoll::EventSet;

/// Most requests answered of one queue before the other gets its turn, and a stop is heard.
const BATCH: usize = 16;

/// A folder, and what the guest has open in it.
pub(super) struct Share {
    /// The device's name.
    name: String,
    /// The folder /proc/self/fd: files are opened again by their descriptors.
    proc_self_fd: File,
    read_only: bool,
    descriptors: u64,
    known: Arc<Known>,
    /// None before the first driver comes.
    server: Option<Server<Folder>>,
    /// What a driver had open when the device was saved, until its thread opens it again.
    saved: Option<File>,
}

impl Share {
    pub(super) fn new(name: &str, proc_self_fd: File, read_only: bool, descriptors: u64) -> Self {
        Self {
            name: name.to_owned(),
            proc_self_fd,
            read_only,
            descriptors,
            known: Arc::new(Known::new(descriptors)),
            server: None,
            saved: None,
        }
    }

    /// What the driver has open, by paths in the folder; nothing, if none has come. For the device's thread.
    pub(super) fn save(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![];
        if let Some(server) = &self.server {
            let mut file = memory_file()?;
            // Nobody cancels it.
            server.prepare_serialization(Arc::default());
            server.serialize(file.try_clone()?)?;
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
        }
        Ok(bytes)
    }

    /// Opens what was saved when the thread starts.
    pub(super) fn restore(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !bytes.is_empty() {
            let mut file = memory_file()?;
            file.write_all(bytes)?;
            file.rewind()?;
            self.saved = Some(file);
        }
        Ok(())
    }

    /// Closes what a driver left open.
    pub(super) fn forget_driver(&mut self) {
        self.saved = None;
        if let Some(server) = &self.server {
            server.destroy();
        }
    }

    /// Has the server there, and what a saved driver had open; the calling thread is in the folder ([`crate::cage::reach`]).
    fn enter(&mut self) -> Result<(), FsWorkError> {
        if self.server.is_none() {
            let folder = Folder::open(
                &self.name,
                self.proc_self_fd.try_clone().map_err(FsWorkError::Open)?,
                self.read_only,
                self.descriptors,
                Arc::clone(&self.known),
            );
            self.server = Some(Server::new(folder.map_err(FsWorkError::Open)?));
        }
        if let Some((server, saved)) = self.server.as_ref().zip(self.saved.take()) {
            server
                .deserialize_and_apply(saved)
                .map_err(FsWorkError::Restore)?;
        }
        Ok(())
    }
}

/// A file that is nowhere but in memory.
fn memory_file() -> io::Result<File> {
    // SAFETY: a name that ends with zero.
    let fd = unsafe { libc::memfd_create(c"shared folder".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum FsWorkError {
    /// The driver broke a ring.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The folder cannot be served.
    #[error("cannot open the shared folder")]
    Open(#[source] io::Error),
    /// What was saved is not there any more, or no state.
    #[error("cannot open again what the guest had open in the shared folder")]
    Restore(#[source] io::Error),
}

/// The folder, with the queues and the memory of the driver that is active.
#[derive(Debug)]
pub(super) struct FsHandler {
    share: Share,
    memory: GuestMemory,
    translator: Translator,
    queues: [VirtQueue; QUEUES],
    interrupt: Interrupt,
    /// How long to wait for events, milliseconds: not at all when there may be more requests than were answered.
    timeout_ms: i32,
}

impl FsHandler {
    pub(super) fn new(
        share: Share,
        memory: GuestMemory,
        translator: Translator,
        queues: [VirtQueue; QUEUES],
        interrupt: Interrupt,
    ) -> Self {
        Self {
            share,
            memory,
            translator,
            queues,
            interrupt,
            timeout_ms: 0,
        }
    }

    /// Takes it apart again.
    pub(super) fn into_parts(self) -> (Share, [VirtQueue; QUEUES]) {
        (self.share, self.queues)
    }

    /// Answers requests of one queue. Each is given back as soon as it is answered: whoever waits for it does not wait for
    /// those behind it.
    fn serve(&mut self, number: usize) -> Result<Served, QueueError> {
        let Some(server) = &self.share.server else {
            return Ok(Served::All);
        };
        let queue = &mut self.queues[number];
        queue.disable_kicks(&self.memory)?;
        for _ in 0..BATCH {
            // What the guest forgets comes by the other queue.
            if number == REQUESTS
                && let Next::Wait { at_most, ask } = self.share.known.next(Instant::now())
            {
                if ask {
                    ask_to_forget(&self.share.name);
                }
                return Ok(Served::Waits(at_most));
            }
            let Some(chain) = queue.pop_or_listen(&self.memory)? else {
                return Ok(Served::All);
            };
            let head = chain.head_index();
            let request = self.translator.translate(chain)?;
            let unwanted = request.unwanted;
            let answered = server.handle_message(request.reader, request.writer, None::<&mut ()>);
            // What is no FUSE request, or has no room for its answer, gets none.
            let written = answered.ok().filter(|_| !unwanted).unwrap_or(0);
            // At most what the chain has room for, which the library counted; a driver could not use more.
            queue.push_used(&self.memory, head, u32::try_from(written).unwrap_or(u32::MAX))?;
            queue.signal(&self.memory, &self.interrupt)?;
        }
        Ok(Served::More)
    }
}

/// How far a queue was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Served {
    /// A kick tells of the next request.
    All,
    /// There may be more.
    More,
    /// There may be more, which wait at most this long.
    Waits(Duration),
}

impl Served {
    /// How long to wait for events, milliseconds.
    fn timeout_ms(self) -> i32 {
        match self {
            Self::All => -1,
            Self::More => 0,
            Self::Waits(at_most) => i32::try_from(at_most.as_millis()).unwrap_or(i32::MAX).max(1),
        }
    }
}

impl Handler for FsHandler {
    type Error = FsWorkError;

    fn register(&mut self, poller: &Poller) -> io::Result<()> {
        for (number, queue) in (0..).zip(&self.queues) {
            poller.add(queue.kick().as_raw_fd(), number, EventSet::IN)?;
        }
        Ok(())
    }

    fn start(&mut self, poller: &Poller) -> Result<(), FsWorkError> {
        self.share.enter()?;
        self.after_batch(poller)
    }

    fn handle(&mut self, token: u64, _events: EventSet, _poller: &Poller) -> Result<(), FsWorkError> {
        if let Some(queue) = usize::try_from(token).ok().and_then(|n| self.queues.get(n)) {
            queue.consume_kick();
        }
        Ok(())
    }

    fn after_batch(&mut self, _poller: &Poller) -> Result<(), FsWorkError> {
        let first = self.serve(HIPRIO)?;
        let second = self.serve(REQUESTS)?;
        self.timeout_ms = match first {
            Served::More => Served::More.timeout_ms(),
            _ => second.timeout_ms(),
        };
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        self.timeout_ms
    }
}
