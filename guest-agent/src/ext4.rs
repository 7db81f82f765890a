//! What the agent wants to know of a disk before it mounts it, from the ext4 superblock (fs/ext4/ext4.h,
//! `struct ext4_super_block`): whether there is an ext4, whether it wants a check, whether it can grow.

/// Where the superblock lies on the disk, in bytes.
pub const SUPERBLOCK_OFFSET: u64 = 1024;

/// Its length in bytes.
pub const SUPERBLOCK_LENGTH: usize = 1024;

/// Where its first copy lies when a block has 4096 bytes, as on disks that the agent formatted: block 32,768.
pub const BACKUP_OFFSET: u64 = 32_768 * 4096;

const MAGIC: u16 = 0xEF53;

const STATE_VALID: u16 = 1;
const STATE_ERRORS: u16 = 2;
const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x80;

/// The superblock's parts of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Block size, bytes.
    pub block_size: u64,
    /// File system size, blocks.
    pub blocks: u64,
    state: u16,
    incompatible_features: u32,
    mount_count: u16,
    max_mount_count: i16,
}

impl Superblock {
    /// Reads the [`SUPERBLOCK_LENGTH`] bytes at [`SUPERBLOCK_OFFSET`]; `None` when this is no ext2, 3 or 4.
    pub fn parse(bytes: &[u8; SUPERBLOCK_LENGTH]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u16_at(0x38) != MAGIC {
            return None;
        }
        let incompatible_features = u32_at(0x60);
        let high = if incompatible_features & INCOMPAT_64BIT == 0 {
            0
        } else {
            u32_at(0x150)
        };
        Some(Self {
            // At most 64 KiB in reality; a nonsensical value must not overflow. The mount refuses it.
            block_size: 1024 << u32_at(0x18).min(16),
            blocks: u64::from(high) << 32 | u64::from(u32_at(0x4)),
            state: u16_at(0x3A),
            incompatible_features,
            mount_count: u16_at(0x34),
            max_mount_count: i16::from_le_bytes([bytes[0x36], bytes[0x37]]),
        })
    }

    /// Why the file system should be checked before it is mounted, if it should.
    pub fn wants_check(&self) -> Option<&'static str> {
        if self.state & STATE_ERRORS != 0 {
            Some("the kernel found errors in it")
        } else if self.state & STATE_VALID == 0 || self.incompatible_features & INCOMPAT_RECOVER != 0 {
            Some("it was not unmounted")
        } else if u16::try_from(self.max_mount_count).is_ok_and(|max| max > 0 && self.mount_count >= max) {
            Some("it was mounted many times since its last check")
        } else {
            None
        }
    }

    /// The number of blocks it can have on a device of `device_bytes`, if that is more than it has.
    pub fn growth(&self, device_bytes: u64) -> Option<u64> {
        let possible = device_bytes / self.block_size;
        (possible > self.blocks).then_some(possible)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt, process::Command};

    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 64 << 20;

    fn read(file: &File) -> Option<Superblock> {
        let mut bytes = [0; SUPERBLOCK_LENGTH];
        file.read_exact_at(&mut bytes, SUPERBLOCK_OFFSET).unwrap();
        Superblock::parse(&bytes)
    }

    fn formatted(arguments: &[&str]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let made = Command::new("mkfs.ext4")
            .arg("-qF")
            .args(arguments)
            .arg(file.path())
            .status()
            .unwrap();
        assert!(made.success());
        file
    }

    #[test]
    fn zeros_are_no_file_system() {
        assert_eq!(Superblock::parse(&[0; SUPERBLOCK_LENGTH]), None);
    }

    #[test]
    fn a_fresh_file_system_is_clean_and_fills_its_device() {
        for block_size in ["1024", "4096"] {
            let file = formatted(&["-b", block_size]);
            let superblock = read(file.as_file()).unwrap();
            assert_eq!(superblock.block_size.to_string(), block_size);
            assert_eq!(superblock.blocks * superblock.block_size, SIZE);
            assert_eq!(superblock.wants_check(), None);
            assert_eq!(superblock.growth(SIZE), None);
            assert_eq!(superblock.growth(2 * SIZE), Some(2 * superblock.blocks));
            assert_eq!(superblock.growth(SIZE / 2), None);
        }
    }

    #[test]
    fn a_file_system_that_was_not_unmounted_or_has_errors_wants_a_check() {
        let file = formatted(&[]);
        let at = |offset: u64, value: u8| {
            file.as_file()
                .write_all_at(&[value], SUPERBLOCK_OFFSET + offset)
                .unwrap()
        };
        at(0x3A, 0);
        assert_eq!(
            read(file.as_file()).unwrap().wants_check(),
            Some("it was not unmounted")
        );
        at(0x3A, 3);
        assert_eq!(
            read(file.as_file()).unwrap().wants_check(),
            Some("the kernel found errors in it")
        );
        at(0x3A, 1);
        assert_eq!(read(file.as_file()).unwrap().wants_check(), None);
        let mut incompatible = [0; 1];
        file.as_file()
            .read_exact_at(&mut incompatible, SUPERBLOCK_OFFSET + 0x60)
            .unwrap();
        at(0x60, incompatible[0] | 4);
        assert_eq!(
            read(file.as_file()).unwrap().wants_check(),
            Some("it was not unmounted")
        );
    }

    #[test]
    fn a_file_system_with_a_mount_limit_wants_a_check_when_it_is_reached() {
        let file = formatted(&[]);
        let tuned = Command::new("tune2fs")
            .args(["-c", "5", "-C", "5"])
            .arg(file.path())
            .output()
            .unwrap()
            .status;
        assert!(tuned.success());
        assert!(
            read(file.as_file())
                .unwrap()
                .wants_check()
                .unwrap()
                .contains("many times")
        );
    }

    proptest! {
        #[test]
        fn arbitrary_superblocks_never_panic(
            mut bytes in prop::collection::vec(any::<u8>(), SUPERBLOCK_LENGTH),
            device in any::<u64>(),
        ) {
            bytes[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
            let superblock = Superblock::parse(bytes.as_slice().try_into().unwrap()).unwrap();
            superblock.wants_check();
            superblock.growth(device);
        }
    }
}
