//! What of FUSE a guest may ask for: the library's file system, with what a hostile guest could do beyond the folder, or to
//! the thread, refused first.
//!
//! The library was made to run in a file system tree of its own and trusts names to be names, and whoever opens a pipe
//! not to wait for ever. Here names are checked, only regular files and folders are opened, no device files are made, and
//! no extended attributes are passed on but those of users.

use super::checked::{
    attribute as checked_attribute, error, is_users, name as checked, offset_in_file, open_flags,
};
use super::known::Known;
use super::owner::Owners;
use crate::virtio::worker::{Severity, report};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::soft_idmap::{Id, cmdline::IdMap};

/// How long the guest may go by what it knows of a file or a name: the host may change both at any time.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Longest list of extended attributes (XATTR_LIST_MAX of Linux).
const MAX_XATTR_LIST: u32 = 64 << 10;

/// A shared folder.
pub(super) struct Folder {
    /// The device's name, for messages.
    name: String,
    fs: PassthroughFs,
    read_only: bool,
    owners: Owners,
    known: Arc<Known>,
    /// It was said that there are no more descriptors.
    said_full: AtomicBool,
    descriptors: u64,
}

impl Folder {
    /// Serves the calling thread's working directory to one guest. `proc_self_fd` is the folder of that path; `descriptors` is how many files it may have open or remember; `known` counts them.
    ///
    /// # Errors
    /// When the server cannot be set up.
    pub(super) fn open(
        name: &str,
        proc_self_fd: File,
        read_only: bool,
        descriptors: u64,
        known: Arc<Known>,
    ) -> io::Result<Self> {
        // SAFETY: these cannot fail.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        let squash = |id: u32| IdMap::SquashGuest {
            from_guest: 0,
            to_host: id,
            count: u32::MAX,
        };
        let config = Config {
            entry_timeout: TIMEOUT,
            attr_timeout: TIMEOUT,
            cache_policy: CachePolicy::Auto,
            root_dir: ".".into(),
            proc_sfd_rawfd: Some(proc_self_fd),
            xattr: true,
            announce_submounts: true,
            // With it the guest's kernel need not ask for file capabilities before each write.
            killpriv_v2: true,
            uid_map: Some(vec![squash(uid)]),
            gid_map: Some(vec![squash(gid)]),
            guest_fd_limit: descriptors,
            ..Config::default()
        };
        Ok(Self {
            name: name.to_owned(),
            fs: PassthroughFs::new(config)?,
            read_only,
            owners: Owners::new(uid),
            known,
            said_full: AtomicBool::new(false),
            descriptors,
        })
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(error(libc::EROFS));
        }
        Ok(())
    }

    /// Before what would wait for ever, or do something, with a pipe, a socket or a device.
    fn plain(&self, ctx: Context, inode: u64) -> io::Result<Attr> {
        let (attr, _) = self.fs.getattr(ctx, inode, None)?;
        match attr.mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR => Ok(attr),
            _ => Err(error(libc::ENXIO)),
        }
    }

    /// Says it once when the guest may have no more files.
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && matches!(error.raw_os_error(), Some(libc::ENFILE | libc::EMFILE))
            && !self.said_full.swap(true, Ordering::Relaxed)
        {
            let reason = format!(
                "the guest knows {} files at once, and gets no more: each takes an open file on the host; raise the \
                 limit for open files (ulimit -Hn) of whoever starts the VM",
                self.descriptors
            );
            report(Severity::Trouble, &self.name, &reason);
        }
        result
    }

    /// Counts a file that the guest is told of.
    fn told(&self, entry: Entry) -> Entry {
        if self.known.told(entry.inode, Instant::now()) {
            ask_to_forget(&self.name);
        }
        entry
    }

    fn shown_entry(&self, ctx: Context, mut entry: Entry) -> Entry {
        entry.attr = self.owners.shown(&self.fs, ctx, entry.inode, entry.attr);
        entry
    }

    /// A new file or folder belongs to whoever made it, in the guest's eyes.
    fn adopt(&self, ctx: Context, parent: u64, entry: Entry) -> io::Result<Entry> {
        let entry = self.told(entry);
        match self.owners.adopt(&self.fs, ctx, parent, entry.inode, entry.attr) {
            Ok(attr) => Ok(Entry { attr, ..entry }),
            Err(error) => {
                self.forget(ctx, entry.inode, 1);
                Err(error)
            }
        }
    }
}

/// Has the guest asked to forget files that it does not use. `name` is the device's.
pub(super) fn ask_to_forget(name: &str) {
    report(Severity::Crowded, name, "the guest remembers many files");
}

impl FileSystem for Folder {
    type Inode = u64;
    type Handle = u64;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that cannot be told of mounts would take files of two file systems for one; and the server would say so on
        // standard error, as often as that guest likes.
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(error(libc::EOPNOTSUPP));
        }
        self.fs.init(capable)
    }

    fn destroy(&self) {
        self.fs.destroy();
        self.owners.forget();
        self.known.clear();
        self.said_full.store(false, Ordering::Relaxed);
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.noted(self.fs.lookup(ctx, parent, checked(name)?))?;
        Ok(self.shown_entry(ctx, self.told(entry)))
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.fs.forget(ctx, inode, count);
        self.known.forgotten(inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        for &(inode, count) in &requests {
            self.known.forgotten(inode, count);
        }
        self.fs.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let (attr, timeout) = self.fs.getattr(ctx, inode, handle)?;
        Ok((self.owners.shown(&self.fs, ctx, inode, attr), timeout))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.writable()?;
        let owner = SetattrValid::UID | SetattrValid::GID;
        if valid.intersects(owner) {
            let uid = valid.contains(SetattrValid::UID).then(|| attr.uid.into_inner());
            let gid = valid.contains(SetattrValid::GID).then(|| attr.gid.into_inner());
            self.owners.give(&self.fs, ctx, inode, uid, gid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            self.plain(ctx, inode)?;
        }
        let (attr, timeout) = self.noted(self.fs.setattr(ctx, inode, attr, handle, valid & !owner))?;
        Ok((self.owners.shown(&self.fs, ctx, inode, attr), timeout))
    }

    fn readlink(&self, ctx: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.fs.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        link: &CStr,
        parent: u64,
        name: &CStr,
        _extensions: Extensions,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(name)?;
        let made = self.fs.symlink(ctx, link, parent, name, Extensions::default());
        self.noted(made).map(|entry| self.told(entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _device: u32,
        umask: u32,
        _extensions: Extensions,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(name)?;
        if !matches!(
            mode & libc::S_IFMT,
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK
        ) {
            return Err(error(libc::EPERM));
        }
        let made = self
            .fs
            .mknod(ctx, parent, name, mode, 0, umask, Extensions::default());
        let adopted = self.adopt(ctx, parent, self.noted(made)?);
        adopted.inspect_err(|_| drop(self.fs.unlink(ctx, parent, name)))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        _extensions: Extensions,
    ) -> io::Result<Entry> {
        self.writable()?;
        let name = checked(name)?;
        let made = self
            .fs
            .mkdir(ctx, parent, name, mode, umask, Extensions::default());
        let adopted = self.adopt(ctx, parent, self.noted(made)?);
        adopted.inspect_err(|_| drop(self.fs.rmdir(ctx, parent, name)))
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        self.fs.unlink(ctx, parent, checked(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        self.fs.rmdir(ctx, parent, checked(name)?)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        let (old_name, new_name) = (checked(old_name)?, checked(new_name)?);
        if !matches!(flags, 0 | libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) {
            return Err(error(libc::EINVAL));
        }
        self.fs
            .rename(ctx, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, ctx: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.writable()?;
        let entry = self.noted(self.fs.link(ctx, inode, parent, checked(name)?))?;
        Ok(self.shown_entry(ctx, self.told(entry)))
    }

    fn open(
        &self,
        ctx: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = open_flags(flags)?;
        if flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0 {
            self.writable()?;
        }
        if self.plain(ctx, inode)?.mode & libc::S_IFMT == libc::S_IFDIR {
            return Err(error(libc::EISDIR));
        }
        self.noted(self.fs.open(ctx, inode, kill_priv, flags.cast_unsigned()))
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        _extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let name = checked(name)?;
        let exclusive = flags.cast_signed() & libc::O_EXCL != 0;
        // The library would open what is there already, whatever it is.
        let new = (open_flags(flags)? | libc::O_CREAT | libc::O_EXCL).cast_unsigned();
        let made = self.writable().and_then(|()| {
            let extensions = Extensions::default();
            self.noted(
                self.fs
                    .create(ctx, parent, name, mode, kill_priv, new, umask, extensions),
            )
        });
        match made {
            Ok((entry, handle, options)) => {
                let inode = entry.inode;
                let adopted = self.adopt(ctx, parent, entry).inspect_err(|_| {
                    if let Some(handle) = handle {
                        drop(self.fs.release(ctx, inode, 0, handle, false, false, None));
                    }
                    drop(self.fs.unlink(ctx, parent, name));
                })?;
                Ok((adopted, handle, options))
            }
            Err(error) if !exclusive && matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EROFS)) => {
                let entry = self.lookup(ctx, parent, name).map_err(|missing| {
                    // Not there, and not to be made.
                    if missing.raw_os_error() == Some(libc::ENOENT) {
                        error
                    } else {
                        missing
                    }
                })?;
                match self.open(ctx, entry.inode, kill_priv, flags) {
                    Ok((handle, options)) => Ok((entry, handle, options)),
                    Err(error) => {
                        self.forget(ctx, entry.inode, 1);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        writer: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let offset = offset_in_file(offset)?;
        self.fs
            .read(ctx, inode, handle, writer, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        reader: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        let (fs, offset) = (&self.fs, offset_in_file(offset)?);
        fs.write(
            ctx,
            inode,
            handle,
            reader,
            size,
            offset,
            lock_owner,
            delayed_write,
            kill_priv,
            flags,
        )
    }

    fn flush(&self, ctx: Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.fs.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fs.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        self.fs.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.fs
            .release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: u64) -> io::Result<libc::statvfs64> {
        self.fs.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.writable()?;
        let name = checked_attribute(name)?;
        self.fs.setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.fs.getxattr(ctx, inode, checked_attribute(name)?, size)
    }

    fn listxattr(&self, ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        // Asked for whole, since what is hidden must not count.
        let ListxattrReply::Names(names) = self.fs.listxattr(ctx, inode, MAX_XATTR_LIST)? else {
            return Err(error(libc::EIO));
        };
        let mut shown = vec![];
        for name in names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| is_users(name))
        {
            shown.extend_from_slice(name);
        }
        match u32::try_from(shown.len()) {
            Ok(length) if size == 0 => Ok(ListxattrReply::Count(length)),
            Ok(length) if length <= size => Ok(ListxattrReply::Names(shown)),
            _ => Err(error(libc::ERANGE)),
        }
    }

    fn removexattr(&self, ctx: Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        self.fs.removexattr(ctx, inode, checked_attribute(name)?)
    }

    fn opendir(&self, ctx: Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.noted(self.fs.opendir(ctx, inode, 0))
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        self.fs.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fs.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.fs.releasedir(ctx, inode, flags, handle)
    }

    fn lseek(&self, ctx: Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.fs.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.writable()?;
        let (from, to) = (
            (inode_in, handle_in, offset_in),
            (inode_out, handle_out, offset_out),
        );
        self.fs
            .copyfilerange(ctx, from.0, from.1, from.2, to.0, to.1, to.2, length, flags)
    }

    fn syncfs(&self, ctx: Context, inode: u64) -> io::Result<()> {
        self.plain(ctx, inode)?;
        self.fs.syncfs(ctx, inode)
    }
}

impl SerializableFileSystem for Folder {
    fn prepare_serialization(&self, cancel: Arc<AtomicBool>) {
        self.fs.prepare_serialization(cancel);
    }

    fn serialize(&self, to: File) -> io::Result<()> {
        self.fs.serialize(to)
    }

    fn deserialize_and_apply(&self, from: File) -> io::Result<()> {
        self.fs.deserialize_and_apply(from)
    }
}
