//! The data disk: an ext4 on the second block device, mounted on /var/lib, where the engine keeps all its state.
//!
//! - all zeros: a new disk, formatted;
//! - ext4: checked when it was not unmounted or has errors, mounted, grown when the device was grown;
//! - anything else: refused. A disk with something on it is never formatted.
//!
//! The superblock is read here, so that e2fsck runs only when there is a reason.
//!
//! The mount option `discard` gives blocks back to the host when the transaction that freed them commits, so that
//! the disk's file shrinks after `docker image rm` without a timer; on a sparse file a discard is cheap.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::statfs::{EXT4_SUPER_MAGIC, statfs},
};

use crate::{
    ext4::{BACKUP_OFFSET, SUPERBLOCK_LENGTH, SUPERBLOCK_OFFSET, Superblock},
    log::Log,
    outbox::Outbox,
    process::PATH,
    timeline::Running,
};

/// The data disk's device.
pub const DEVICE: &str = "/dev/vdb";

/// Where it is mounted.
pub const MOUNT_POINT: &str = "/var/lib";

/// How much must be zero at both ends of a new disk: partition tables, RAID, LVM and file systems all mark one.
const BLANK_BYTES: u64 = 1 << 20;

/// Room for the tables of a disk of this size is reserved, so that growing to it is a matter of moments. mkfs.ext4 itself
/// reserves for a thousand times the disk's size, and writes that many blocks; beyond, the kernel grows slowly.
const GROWTH_BYTES: u64 = 1 << 40;

/// Why there is no data disk to use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such device.
    #[error("there is no data disk ({}); start the VM with one", device.display())]
    Missing {
        /// The device looked for.
        device: PathBuf,
    },
    /// The device cannot be read.
    #[error("cannot read the data disk {}", device.display())]
    Read {
        /// The device.
        device: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else is on it.
    #[error(
        "the data disk {} holds something that is not an ext4 file system; it was left untouched. \
         Start the VM with an empty disk, or with one that Lighter made", device.display()
    )]
    Foreign {
        /// The device.
        device: PathBuf,
    },
    /// Its beginning was overwritten by zeros.
    #[error(
        "the beginning of the data disk {0} is blank but an ext4 file system follows; it was left untouched. \
         Copy the disk's file, then repair it by `lighter exec NAME -- e2fsck -b 32768 -B 4096 -y {0}` and restart",
        device.display()
    )]
    Beheaded {
        /// The device.
        device: PathBuf,
    },
    /// A program could not be run.
    #[error("cannot run {program} on the data disk")]
    Run {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Formatting failed.
    #[error("mkfs.ext4 could not format the data disk ({status}): {output}")]
    Format {
        /// How mkfs.ext4 ended.
        status: ExitStatus,
        /// What it wrote.
        output: String,
    },
    /// The file system is damaged beyond an automatic repair.
    #[error(
        "the file system on the data disk {0} is damaged and needs a decision (e2fsck: {status}): {output}. \
         Copy the disk's file, then repair it by `lighter exec NAME -- e2fsck -fy {0}` and restart",
        device.display()
    )]
    Damaged {
        /// The device.
        device: PathBuf,
        /// How e2fsck ended.
        status: ExitStatus,
        /// What it wrote.
        output: String,
    },
    /// The kernel does not mount it.
    #[error(
        "cannot mount the data disk {0} on {MOUNT_POINT}; the console log has the kernel's reason. \
         Copy the disk's file, then check it by `lighter exec NAME -- e2fsck -f {0}`", device.display()
    )]
    Mount {
        /// The device.
        device: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// What is on a disk.
#[derive(Debug, PartialEq, Eq)]
enum Content {
    Blank,
    Ext4(Superblock),
    BeheadedExt4,
    Foreign,
}

/// Makes the data disk ready and mounts it. Blocks; reports its steps.
///
/// # Errors
/// When the engine must not be started on what there is.
pub fn prepare(log: &Log, outbox: &Outbox) -> Result<(), Error> {
    let device = Path::new(DEVICE);
    let read_error = |source| Error::Read {
        device: device.into(),
        source,
    };
    let file = File::open(device).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::Missing {
            device: device.into(),
        },
        _ => read_error(source),
    })?;
    let size = size(&file).map_err(read_error)?;
    let mut superblock = None;
    match inspect(&file, size).map_err(read_error)? {
        Content::Blank => {
            log.info(format!(
                "formatting the new data disk {DEVICE} of {} MiB",
                size >> 20
            ));
            let step = Running::begin("data-disk-format");
            format(device, size)?;
            step.end(outbox);
        }
        Content::Ext4(found) => {
            if let Some(reason) = found.wants_check() {
                let step = Running::begin("data-disk-check");
                let output = check(device)?;
                step.end(outbox);
                log.info(format!("checked the data disk {DEVICE} since {reason}: {output}"));
            }
            superblock = Some(found);
        }
        Content::BeheadedExt4 => {
            return Err(Error::Beheaded {
                device: device.into(),
            });
        }
        Content::Foreign => {
            return Err(Error::Foreign {
                device: device.into(),
            });
        }
    }
    let step = Running::begin("data-disk-mount");
    mount(
        Some(device),
        MOUNT_POINT,
        Some("ext4"),
        MsFlags::MS_NOATIME,
        Some("discard"),
    )
    .map_err(|source| Error::Mount {
        device: device.into(),
        source,
    })?;
    step.end(outbox);
    if let Some(blocks) = superblock.and_then(|superblock| superblock.growth(size)) {
        let step = Running::begin("data-disk-grow");
        match grow(blocks) {
            Ok(()) => log.info(format!(
                "the data disk's file system was grown to {blocks} blocks"
            )),
            // The engine works without.
            Err(error) => {
                log.error(format!(
                    "cannot grow the data disk's file system to {blocks} blocks: {error}"
                ));
            }
        }
        step.end(outbox);
    }
    Ok(())
}

fn size(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

fn inspect(disk: &File, size: u64) -> io::Result<Content> {
    let mut bytes = [0; SUPERBLOCK_LENGTH];
    if size >= SUPERBLOCK_OFFSET + bytes.len() as u64 {
        disk.read_exact_at(&mut bytes, SUPERBLOCK_OFFSET)?;
    }
    if let Some(superblock) = Superblock::parse(&bytes) {
        return Ok(Content::Ext4(superblock));
    }
    if size >= BACKUP_OFFSET + bytes.len() as u64 {
        disk.read_exact_at(&mut bytes, BACKUP_OFFSET)?;
        if Superblock::parse(&bytes).is_some() {
            return Ok(Content::BeheadedExt4);
        }
    }
    let blank = is_zero(disk, 0, size.min(BLANK_BYTES))?
        && is_zero(disk, size.saturating_sub(BLANK_BYTES), size.min(BLANK_BYTES))?;
    Ok(if blank { Content::Blank } else { Content::Foreign })
}

fn is_zero(disk: &File, offset: u64, length: u64) -> io::Result<bool> {
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    disk.read_exact_at(&mut bytes, offset)?;
    // Whole blocks at a time, which is a hundred times as fast as bytes.
    let zeros = [0; 4096];
    Ok(bytes
        .chunks(zeros.len())
        .all(|block| block == &zeros[..block.len()]))
}

/// Makes an ext4, leaving the writing of most of its tables to the mounted file system.
fn format(device: &Path, size: u64) -> Result<(), Error> {
    // No discard, since a new disk has nothing to give back; no blocks reserved for root, who alone writes here.
    let mut extended = "lazy_itable_init=1,lazy_journal_init=1,nodiscard".to_owned();
    if size < GROWTH_BYTES {
        extended += &format!(",resize={}", GROWTH_BYTES / 4096);
    }
    let arguments = [
        "-q",
        "-b",
        "4096",
        "-m",
        "0",
        "-L",
        "lighter-data",
        "-E",
        &extended,
    ];
    let (status, output) = run("mkfs.ext4", &arguments, device)?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Format { status, output })
    }
}

/// Replays the journal and repairs what can be repaired without a decision; returns what was said.
fn check(device: &Path) -> Result<String, Error> {
    let (status, output) = run("e2fsck", &["-p"], device)?;
    // e2fsck(8): 1 is "errors corrected", 2 "reboot", for a file system that is mounted; 4 and up are failures.
    match status.code() {
        Some(0..=3) => Ok(output),
        _ => Err(Error::Damaged {
            device: device.into(),
            status,
            output,
        }),
    }
}

fn run(program: &'static str, arguments: &[&str], device: &Path) -> Result<(ExitStatus, String), Error> {
    let output = Command::new(program)
        .args(arguments)
        .arg(device)
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Run { program, source })?;
    let text = [output.stdout, output.stderr].concat();
    let lines: Vec<_> = String::from_utf8_lossy(&text)
        .lines()
        .map(str::trim)
        .map(String::from)
        .collect();
    Ok((output.status, lines.join("; ")))
}

nix::ioctl_write_ptr!(
    /// Grows a mounted ext4 to this number of blocks (EXT4_IOC_RESIZE_FS).
    ext4_resize, b'f', 16, u64
);

/// Shorter pieces, bytes, free little, and in a disk that has layers would have the rest of their cluster copied.
const SHORTEST_TRIM: u64 = 64 << 10;

/// What FITRIM reads and writes (linux/fs.h).
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    shortest: u64,
}

nix::ioctl_readwrite!(
    /// Discards the free blocks of a file system.
    fitrim, b'X', 121, TrimRange
);

/// Gives the host the free blocks that it was not given before. The mount option leaves out what was freed before it, and what a
/// device had no time for.
///
/// # Errors
/// From the system.
pub fn trim() -> io::Result<()> {
    let mount_point = File::open(MOUNT_POINT)?;
    let mut range = TrimRange {
        start: 0,
        length: u64::MAX,
        shortest: SHORTEST_TRIM,
    };
    // SAFETY: the kernel reads and writes one range at the pointer.
    unsafe { fitrim(mount_point.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

/// How much of the data disk is free, KiB; `None` as long as it is not mounted.
pub fn free_kib() -> Option<u64> {
    let stat = statfs(MOUNT_POINT).ok()?;
    let block = u64::try_from(stat.block_size()).ok()?;
    (stat.filesystem_type() == EXT4_SUPER_MAGIC).then(|| stat.blocks_free().saturating_mul(block) >> 10)
}

fn grow(blocks: u64) -> io::Result<()> {
    let mount_point = File::open(MOUNT_POINT)?;
    // SAFETY: the kernel reads one u64 from the pointer.
    unsafe { ext4_resize(mount_point.as_raw_fd(), &raw const blocks) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 256 << 20;

    fn disk() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        file
    }

    fn content(file: &tempfile::NamedTempFile) -> Content {
        inspect(file.as_file(), size(file.as_file()).unwrap()).unwrap()
    }

    #[test]
    fn only_an_empty_disk_is_blank() {
        let file = disk();
        assert_eq!(content(&file), Content::Blank);
        // A partition table, a swap signature, a backup GPT.
        for offset in [510, 4086, SIZE - 512] {
            file.as_file().write_all_at(&[0x55], offset).unwrap();
            assert_eq!(content(&file), Content::Foreign, "{offset}");
            file.as_file().write_all_at(&[0], offset).unwrap();
        }
        let tiny = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(content(&tiny), Content::Blank);
    }

    #[test]
    fn a_formatted_disk_is_recognised_clean_even_without_its_head() {
        let file = disk();
        format(file.path(), SIZE).unwrap();
        let Content::Ext4(superblock) = content(&file) else {
            panic!("not recognised")
        };
        assert_eq!(superblock.wants_check(), None);
        assert_eq!(superblock.growth(SIZE), None);
        file.as_file().write_all_at(&vec![0; 1 << 20], 0).unwrap();
        assert_eq!(content(&file), Content::BeheadedExt4);
    }

    #[test]
    fn a_disk_that_is_too_small_is_a_named_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let error = format(file.path(), SIZE).unwrap_err();
        assert!(matches!(error, Error::Format { .. }), "{error}");
    }

    #[test]
    fn a_check_repairs_small_damage_and_names_what_it_cannot_repair() {
        let file = disk();
        format(file.path(), SIZE).unwrap();
        let debugfs = |request: &str| {
            let done = Command::new("debugfs")
                .args(["-w", "-R", request])
                .arg(file.path())
                .output()
                .unwrap();
            assert!(done.status.success());
        };
        debugfs("set_super_value state 0");
        check(file.path()).unwrap();
        let Content::Ext4(superblock) = content(&file) else {
            panic!("not recognised")
        };
        assert_eq!(superblock.wants_check(), None);
        // The root folder lost: that wants a person.
        debugfs("clri <2>");
        debugfs("set_super_value state 2");
        let error = check(file.path()).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        assert!(error.to_string().contains("e2fsck -fy"), "{error}");
    }
}
