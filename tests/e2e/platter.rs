//! A disk of the host that remembers each write, so that the moments at which power could have failed can be had again.
//!
//! The kernel's `dm-log-writes` notes what reaches the disk, in the order in which flushes make it last, and marks that a test sets
//! between. What a power cut leaves is then: all up to some flush, and of what came after it any part.

use super::world::until;
use lighter_tests::random::Random;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The unit of the disk: no sector is written by half.
const SECTOR: u64 = 512;

/// What a disk writes as one, sectors: ext4 keeps its superblock, of two sectors, in no journal that it could read without it.
const BLOCK: usize = 8;

/// Bits of an entry's flags, `drivers/md/dm-log-writes.c`.
mod flag {
    pub const FLUSH: u64 = 1;
    pub const FUA: u64 = 1 << 1;
    pub const DISCARD: u64 = 4;
    pub const MARK: u64 = 8;
}

/// Runs a program of the host's administrator; returns what it said.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (ok, said) = try_run(program, arguments);
    assert!(ok, "{program} {arguments:?}: {said}");
    said.trim().to_owned()
}

/// Whether it succeeded, and what it said.
fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        // Nobody else manages these devices.
        .env("DM_DISABLE_UDEV", "1")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// Checks the ext4 of `image`, which has been mounted since its power cut, so that its journal is replayed: nothing is wrong with it.
#[track_caller]
pub fn check_ext4(image: &Path, when: &str) {
    let path = image.to_str().expect("text");
    let (clean, said) = try_run("e2fsck", &["-f", "-n", path]);
    assert!(clean, "{when}: {said}");
}

/// A loop device.
pub struct Loop(pub String);

impl Loop {
    /// Over `file`, until this is dropped.
    pub fn over(file: &Path) -> Self {
        Self(run("losetup", &["-f", "--show", file.to_str().expect("text")]))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = try_run("losetup", &["-d", &self.0]);
    }
}

/// A file with an ext4, mounted until this is dropped.
pub struct Mounted {
    _device: Loop,
    pub at: PathBuf,
}

impl Mounted {
    pub fn new(image: &Path, at: &Path) -> Self {
        let device = Loop::over(image);
        std::fs::create_dir_all(at).expect("make a folder");
        mount(&*device.0, at, "ext4", MountFlags::empty(), None).expect("mount");
        let at = at.to_owned();
        Self { _device: device, at }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.at, UnmountFlags::empty()).expect("unmount");
    }
}

/// A file system whose disk is recorded, mounted somewhere.
pub struct Recording {
    name: String,
    folder: PathBuf,
    at: PathBuf,
    devices: Vec<Loop>,
}

impl Recording {
    /// Makes a file system of `mib` MiB, with files of its own in `folder`, and mounts it at `at`.
    pub fn start(folder: &Path, mib: u64, at: &Path) -> Self {
        for module in ["loop", "dm-log-writes"] {
            run("modprobe", &[module]);
        }
        let files = ["disk", "log", "before"].map(|name| folder.join(name));
        let make = |path: &PathBuf, mib: u64| {
            let file = File::create(path).expect("create");
            file.set_len(mib << 20).expect("set its length");
        };
        make(&files[0], mib);
        make(&files[1], 8 * mib);
        run("mkfs.ext4", &["-q", "-F", files[0].to_str().expect("text")]);
        copy_sparse(&files[0], &files[2]);
        let devices: Vec<Loop> = files[..2].iter().map(|file| Loop::over(file)).collect();
        let name = format!("lighter-{}", std::process::id());
        let sectors = (mib << 20) / SECTOR;
        let table = format!("0 {sectors} log-writes {} {}", devices[0].0, devices[1].0);
        run("dmsetup", &["create", "--noudevsync", &name, "--table", &table]);
        let recording = Self {
            name,
            folder: folder.to_owned(),
            at: at.to_owned(),
            devices,
        };
        std::fs::create_dir_all(at).expect("make a folder");
        let device = format!("/dev/mapper/{}", recording.name);
        mount(&*device, at, "ext4", MountFlags::empty(), Some(c"discard")).expect("mount");
        // Nobody's VM.
        std::fs::remove_dir(at.join("lost+found")).expect("remove");
        recording
    }

    /// Notes that `text` is true from here on.
    pub fn mark(&self, text: &str) {
        run("dmsetup", &["message", &self.name, "0", "mark", text]);
    }

    /// Ends it.
    pub fn end(self) -> Replay {
        until("end of the use of the disk", || {
            unmount(&self.at, UnmountFlags::empty()).ok()
        });
        run("dmsetup", &["remove", "--noudevsync", &self.name]);
        drop(self.devices);
        let [log, before] = ["log", "before"].map(|name| self.folder.join(name));
        Replay {
            log: File::open(log).expect("open the log"),
            disk: before,
            folder: self.folder,
            at: 0,
        }
    }
}

/// One entry of the log.
#[derive(Clone, Debug)]
pub struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    /// Where its data is in the log.
    data: u64,
    /// Of a mark.
    pub text: Option<String>,
}

impl Entry {
    /// Whether all before it, and it, last.
    pub fn is_flush(&self) -> bool {
        self.flags & flag::FLUSH != 0
    }
}

/// A recorded disk as it was at some moment.
pub struct Replay {
    log: File,
    disk: PathBuf,
    folder: PathBuf,
    at: usize,
}

impl Replay {
    /// All that was written, in its order.
    pub fn entries(&self) -> Vec<Entry> {
        // struct log_write_super: magic, version, number of entries, bytes in a sector.
        let mut header = [0; 28];
        self.log.read_exact_at(&mut header, 0).expect("read the log");
        let number =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        assert_eq!(number(&header, 0), 0x006a_7366_7773_6872, "no log");
        assert_eq!(&header[24..], &(SECTOR as u32).to_le_bytes());
        let mut at = SECTOR;
        let mut entries = vec![];
        for _ in 0..number(&header, 16) {
            // struct log_write_entry, and the text of a mark.
            let mut entry = [0; SECTOR as usize];
            self.log.read_exact_at(&mut entry, at).expect("read the log");
            let [sector, sectors, flags, length] = [0, 8, 16, 24].map(|at| number(&entry, at));
            let text = &entry[32..32 + length as usize];
            let text = (flags & flag::MARK != 0).then(|| String::from_utf8_lossy(text).into_owned());
            let data = at + SECTOR;
            at = match flags & flag::DISCARD {
                0 => data + sectors * SECTOR,
                _ => data,
            };
            entries.push(Entry {
                sector,
                sectors,
                flags,
                data,
                text,
            });
        }
        entries
    }

    /// Goes on until `end` of the `entries` have happened.
    pub fn advance(&mut self, entries: &[Entry], end: usize) {
        let disk = open(&self.disk);
        for entry in &entries[self.at..end] {
            self.write(&disk, entry, 0..entry.sectors);
        }
        self.at = end;
    }

    /// A copy of the disk as it is now.
    pub fn cut(&self) -> PathBuf {
        let path = self.folder.join("cut");
        copy_sparse(&self.disk, &path);
        path
    }

    /// A copy of the disk on which some of the writes happened, too, that no flush had promised yet; of some only a part.
    pub fn cut_amid(&self, entries: &[Entry], random: &mut Random) -> PathBuf {
        let path = self.cut();
        let disk = open(&path);
        for entry in entries[self.at..].iter().take_while(|entry| !entry.is_flush()) {
            let [some, all] = [random.below(4), random.below(2)];
            match (some, all) {
                // It lasted when it had ended, and what followed may rely on that: a journal's blocks are used again.
                _ if entry.flags & flag::FUA != 0 => self.write(&disk, entry, 0..entry.sectors),
                (0, _) => {}
                (_, 0) => self.write(&disk, entry, 0..entry.sectors),
                _ => {
                    for from in (0..entry.sectors).step_by(BLOCK) {
                        if random.once_in(2) {
                            self.write(&disk, entry, from..entry.sectors.min(from + BLOCK as u64));
                        }
                    }
                }
            }
        }
        path
    }

    fn write(&self, disk: &File, entry: &Entry, sectors: std::ops::Range<u64>) {
        if entry.text.is_some() || sectors.is_empty() {
            return;
        }
        let at = (entry.sector + sectors.start) * SECTOR;
        let length = (sectors.end - sectors.start) * SECTOR;
        if entry.flags & flag::DISCARD != 0 {
            use rustix::fs::{FallocateFlags, fallocate};
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(disk, hole, at, length).expect("punch a hole");
            return;
        }
        let mut bytes = vec![0; length as usize];
        let data = entry.data + sectors.start * SECTOR;
        self.log.read_exact_at(&mut bytes, data).expect("read the log");
        disk.write_all_at(&bytes, at).expect("write");
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).expect("open")
}

/// Copies a file without its holes.
fn copy_sparse(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).expect("open"), File::create(to).expect("create"));
    let length = from.metadata().expect("its length").len();
    to.set_len(length).expect("set its length");
    for extent in lighter_disk::extents(&from, 0..length).expect("find its data") {
        copy_range(&from, &to, extent).expect("copy");
    }
}

fn copy_range(from: &File, to: &File, range: std::ops::Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = range.start;
    while at < range.end {
        let part = (range.end - at).min(buffer.len() as u64) as usize;
        from.read_exact_at(&mut buffer[..part], at)?;
        to.write_all_at(&buffer[..part], at)?;
        at += part as u64;
    }
    Ok(())
}
