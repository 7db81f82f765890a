//! The host's files behind a disk: what is checked and locked before a guest gets it.

use super::SECTOR;
use super::operation::StepKind;
use super::trouble::Troubles;
use crate::virtio::worker;
use lighter_disk::{Chain, LayerError};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Length of a serial number, VIRTIO_BLK_ID_BYTES.
pub(super) const SERIAL_LENGTH: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;

/// A disk to give to a guest.
#[derive(Debug)]
pub struct BlockConfig {
    /// Shown in messages, and the guest's serial number: 1 to 20 printable ASCII characters.
    pub id: String,
    /// A regular file or block device, open for reading, and for writing unless `read_only`.
    pub file: File,
    /// Layers above it, the lowest first: `file` is only read then, and so are all but the last.
    pub layers: Vec<File>,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The serial number would not be the id.
    #[error("disk name {0:?} is not 1 to 20 printable ASCII characters")]
    Id(String),
    /// fstat, lseek or fcntl.
    #[error("cannot inspect the file of disk {id}")]
    Inspect {
        /// The disk.
        id: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe, a terminal, ….
    #[error("disk {0} is neither a regular file nor a block device")]
    Kind(String),
    /// The descriptor's mode does not fit.
    #[error("the file of disk {id} is not open for {wanted}")]
    Access {
        /// The disk.
        id: String,
        /// What it has to be open for.
        wanted: &'static str,
    },
    /// Damaged, or not of this disk.
    #[error("disk {id} cannot be read through its layer {number}")]
    Layer {
        /// The disk.
        id: String,
        /// Which layer, from 1.
        number: usize,
        /// What is wrong with it.
        #[source]
        source: LayerError,
    },
    /// The last layer, or the file that becomes one that is only read.
    #[error("cannot write disk {id}")]
    Write {
        /// The disk.
        id: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Requests are under way.
    #[error("disk {0} is in use by its guest: pause the VM first")]
    Busy(String),
    /// Empty, or cut off.
    #[error("disk {id} has a length of {length} bytes, which is not a multiple of 512 above 0")]
    Length {
        /// The disk.
        id: String,
        /// The file's length, bytes.
        length: u64,
    },
    /// Somebody else's lock: writers exclude everybody, readers exclude writers.
    #[error("disk {0} is in use by another VM")]
    InUse(String),
    /// The file system has no locks.
    #[error("cannot lock the file of disk {id}")]
    Lock {
        /// The disk.
        id: String,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// A disk's files, checked and locked.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) id: String,
    /// The base, if there are layers.
    file: Arc<File>,
    /// Those and their map.
    layers: Option<Mutex<Chain>>,
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// A sync failed: the host may have dropped data that it had accepted, and later syncs would not tell.
    unreliable: AtomicBool,
    troubles: Mutex<Troubles>,
}

impl Disk {
    /// Checks `config`'s files and locks each as a whole.
    ///
    /// A lock belongs to the open file description (F_OFD_SETLK), so it also holds for descriptors that the file was
    /// inherited from, and goes when the last of them is closed, however the process ended.
    pub(super) fn open(config: BlockConfig) -> Result<Self, BlockError> {
        let BlockConfig {
            id,
            file,
            layers,
            read_only,
        } = config;
        let printable = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        if id.is_empty() || id.len() > SERIAL_LENGTH || !id.bytes().all(printable) {
            return Err(BlockError::Id(id));
        }
        let length = check(&id, &file, read_only || !layers.is_empty())?;
        let Some(last) = layers.len().checked_sub(1) else {
            return Ok(Self::unchecked(id, file, length / SECTOR, read_only));
        };
        for (number, layer) in layers.iter().enumerate() {
            check(&id, layer, read_only || number < last)?;
        }
        let layers = layers.into_iter().map(Arc::new).collect();
        let chain = Chain::open(Arc::new(file), layers);
        let mut chain = chain.map_err(|(number, source)| BlockError::Layer {
            id: id.clone(),
            number: number + 1,
            source,
        })?;
        if !read_only {
            let written = chain.make_writable();
            written.map_err(|source| BlockError::Write {
                id: id.clone(),
                source,
            })?;
        }
        let base = chain.files()[0].clone();
        let mut disk = Self::over(id, base, chain.size() / SECTOR, read_only);
        disk.layers = Some(Mutex::new(chain));
        Ok(disk)
    }

    /// Freezes what is written to until now, all of which is synced, and writes to the empty `layer` from here on. `merged` takes
    /// the place of the layers that were frozen before, if it is given.
    ///
    /// # Errors
    /// When that cannot be; the disk is as it was then.
    pub(super) fn add_layer(&mut self, layer: File, merged: Option<File>) -> Result<(), BlockError> {
        let id = &self.id;
        check(id, &layer, false)?;
        if let Some(merged) = &merged {
            check(id, merged, true)?;
        }
        let written = |source| BlockError::Write {
            id: id.clone(),
            source,
        };
        let wrong = |number, source| BlockError::Layer {
            id: id.clone(),
            number,
            source,
        };
        let (layer, merged) = (Arc::new(layer), merged.map(Arc::new));
        let frozen = match &mut self.layers {
            Some(chain) => {
                let chain = chain.get_mut().unwrap_or_else(PoisonError::into_inner);
                chain.flush().map_err(written)?;
                let (number, frozen) = (chain.files().len(), chain.files()[chain.top()].clone());
                chain
                    .push(layer, merged)
                    .map_err(|source| wrong(number, source))?;
                frozen
            }
            None => {
                self.file.sync_data().map_err(written)?;
                let chain = Chain::open(self.file.clone(), vec![layer]);
                let chain = chain.map_err(|(_, source)| wrong(1, source))?;
                if chain.size() != self.sectors * SECTOR {
                    let (size, below) = (chain.size(), self.sectors * SECTOR);
                    return Err(wrong(1, LayerError::Order { size, below }));
                }
                self.layers = Some(Mutex::new(chain));
                self.file.clone()
            }
        };
        // Others may read it now. The lock is there, and weaker than before, so that this cannot fail.
        let _ = lock(frozen.as_raw_fd(), true);
        Ok(())
    }

    /// The chain of files, if there are several.
    pub(super) fn layers(&self) -> Option<MutexGuard<'_, Chain>> {
        let chain = self.layers.as_ref()?;
        Some(chain.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there are several.
    pub(super) fn has_layers(&self) -> bool {
        self.layers.is_some()
    }

    /// All files, for an engine.
    pub(super) fn files(&self) -> Vec<Arc<File>> {
        match self.layers() {
            Some(chain) => chain.files().to_vec(),
            None => vec![self.file.clone()],
        }
    }

    /// A disk over any file at all.
    pub(super) fn unchecked(id: String, file: File, sectors: u64, read_only: bool) -> Self {
        Self::over(id, Arc::new(file), sectors, read_only)
    }

    fn over(id: String, file: Arc<File>, sectors: u64, read_only: bool) -> Self {
        Self {
            id,
            file,
            layers: None,
            sectors,
            read_only,
            unreliable: AtomicBool::new(false),
            troubles: Mutex::default(),
        }
    }

    /// The id as a serial number, padded with zeros.
    pub(super) fn serial(&self) -> [u8; SERIAL_LENGTH] {
        let mut serial = [0; SERIAL_LENGTH];
        for (to, from) in serial.iter_mut().zip(self.id.bytes()) {
            *to = from;
        }
        serial
    }

    /// Notes an error of the file; what to tell people if it is news.
    pub(super) fn note_trouble(&self, step: StepKind, error: &io::Error) -> Option<String> {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.note(step, error, Instant::now())
    }

    /// Has the map of the layers say what was written, when no request is under way.
    pub(super) fn settle(&self, name: &str) {
        let Some(mut chain) = self.layers() else { return };
        if !chain.is_written()
            && let Err(error) = chain.flush()
        {
            self.distrust();
            if let Some(text) = self.note_trouble(StepKind::Sync, &error) {
                worker::report(worker::Severity::Trouble, name, &text);
            }
        }
    }

    /// Notes that a sync failed.
    pub(super) fn distrust(&self) {
        self.unreliable.store(true, Ordering::Relaxed);
    }

    /// Whether a sync can still vouch for all data accepted so far.
    pub(super) fn is_reliable(&self) -> bool {
        !self.unreliable.load(Ordering::Relaxed)
    }
}

/// Checks one file of disk `id`, and locks it; returns its length.
fn check(id: &str, mut file: &File, read_only: bool) -> Result<u64, BlockError> {
    let id = || id.to_owned();
    let inspect = |source| BlockError::Inspect { id: id(), source };
    let metadata = file.metadata().map_err(inspect)?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(BlockError::Kind(id()));
    }
    let flags = status_flags(file.as_raw_fd()).map_err(inspect)?;
    if let Some(wanted) = missing_access(flags, read_only) {
        return Err(BlockError::Access { id: id(), wanted });
    }
    let length = file.seek(SeekFrom::End(0)).map_err(inspect)?;
    if length == 0 || !length.is_multiple_of(SECTOR) {
        return Err(BlockError::Length { id: id(), length });
    }
    match lock(file.as_raw_fd(), read_only) {
        Ok(()) => Ok(length),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(BlockError::InUse(id()))
        }
        Err(source) => Err(BlockError::Lock { id: id(), source }),
    }
}

fn status_flags(fd: RawFd) -> io::Result<i32> {
    // SAFETY: plain fcntl on an open descriptor.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(flags)
}

fn missing_access(flags: i32, read_only: bool) -> Option<&'static str> {
    match (flags & libc::O_ACCMODE, read_only) {
        (libc::O_RDONLY, true) => None,
        // Writes would go to the file's end, wherever the guest wants them.
        (libc::O_RDWR, _) if flags & libc::O_APPEND != 0 => Some("writing at any place (O_APPEND is set)"),
        (libc::O_RDWR, _) => None,
        (_, true) => Some("reading"),
        (_, false) => Some("reading and writing"),
    }
}

fn lock(fd: RawFd, read_only: bool) -> io::Result<()> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    // SAFETY: `flock` is plain numbers; zero is right for those not named here (OFD locks want l_pid 0).
    let mut whole_file: libc::flock = unsafe { std::mem::zeroed() };
    whole_file.l_type = kind as libc::c_short;
    whole_file.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: an open descriptor and a valid `flock` for the length of the call.
    if unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const whole_file) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::path::Path;

    fn open(path: &Path, write: bool) -> File {
        OpenOptions::new().read(true).write(write).open(path).unwrap()
    }

    fn disk(path: &Path, read_only: bool) -> Result<Disk, BlockError> {
        Disk::open(BlockConfig {
            id: "data".into(),
            file: open(path, !read_only),
            layers: vec![],
            read_only,
        })
    }

    #[test]
    fn a_writer_excludes_everybody_and_readers_share() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1024).unwrap();
        let writer = disk(file.path(), false).unwrap();
        assert_eq!(writer.sectors, 2);
        for read_only in [false, true] {
            let refused = disk(file.path(), read_only).unwrap_err();
            assert_eq!(refused.to_string(), "disk data is in use by another VM");
        }
        drop(writer);
        let reader = disk(file.path(), true).unwrap();
        let _another = disk(file.path(), true).unwrap();
        assert!(matches!(disk(file.path(), false), Err(BlockError::InUse(_))));
        drop(reader);
        assert!(matches!(disk(file.path(), false), Err(BlockError::InUse(_))));
    }

    #[test]
    fn files_that_cannot_be_disks_are_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = disk(file.path(), false).unwrap_err();
        assert!(matches!(error, BlockError::Length { length: 0, .. }), "{error}");
        file.as_file().set_len(1000).unwrap();
        let error = disk(file.path(), true).unwrap_err();
        assert!(
            error.to_string().contains("disk data has a length of 1000 bytes"),
            "{error}"
        );
        file.as_file().set_len(1024).unwrap();
        let config = |id: &str, file| BlockConfig {
            id: id.into(),
            file,
            layers: vec![],
            read_only: false,
        };
        let error = Disk::open(config("data", open(file.path(), false))).unwrap_err();
        assert!(
            error.to_string().contains("not open for reading and writing"),
            "{error}"
        );
        let append = OpenOptions::new()
            .read(true)
            .append(true)
            .open(file.path())
            .unwrap();
        let error = Disk::open(config("data", append)).unwrap_err();
        assert!(error.to_string().contains("O_APPEND"), "{error}");
        for id in ["", "a name of 21 letters..", "caf\u{e9}", "two\nlines"] {
            let error = Disk::open(config(id, open(file.path(), true))).unwrap_err();
            assert!(matches!(error, BlockError::Id(_)), "{error}");
        }
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let error = Disk::open(config("data", null)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("neither a regular file nor a block device"),
            "{error}"
        );
    }
}
