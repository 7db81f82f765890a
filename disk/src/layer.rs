//! One layer's file.
//!
//! ```text
//!   0     8 bytes  "LGHTLAYR"
//!   8     4        version of this format
//!   12    4        bytes of a cluster: 65,536
//!   16    8        bytes of the disk
//!   24    8        XXH3 of what is before
//!   4096           the map, one byte for each cluster:
//!                  0: look below; 1: it is here; 2: it is zeros
//!   …              to a multiple of the cluster
//!   …              the disk's own bytes, each cluster at its place; those that are not here are holes
//! ```
//!
//! All numbers are little-endian. Nothing is allocated: where the disk's byte is, is a sum.

use crate::sparse::{extents, read_padded};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use xxhash_rust::xxh3::xxh3_64;

/// What is copied at once when it is first written, bytes.
pub const CLUSTER: u64 = 64 << 10;

/// The most that a disk can have, bytes: as much as ext4 can use.
const MOST_BYTES: u64 = 16 << 40;

/// What is written of a map at once, bytes.
pub(crate) const PAGE: usize = 4096;

/// Where the map begins.
pub(crate) const MAP: u64 = 4096;

const MAGIC: [u8; 8] = *b"LGHTLAYR";
const VERSION: u32 = 1;
const HEADER: usize = 32;

/// Entries of a map.
pub(crate) mod entry {
    /// Look below.
    pub(crate) const BELOW: u8 = 0;
    /// It is here.
    pub(crate) const HERE: u8 = 1;
    /// It is zeros, whatever is below.
    pub(crate) const ZEROS: u8 = 2;
}

/// Why a file cannot be part of a disk.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// As the system says.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// As the system says.
    #[error("it cannot be written")]
    Write(#[source] io::Error),
    /// Something else.
    #[error("it is no layer of a disk")]
    Magic,
    /// Of another Lighter.
    #[error("it is a layer of format {0}, and this Lighter knows format {VERSION}")]
    Version(u32),
    /// Damaged.
    #[error("its header is damaged")]
    Header,
    /// No disk has that.
    #[error("a disk of {0} bytes cannot have layers: it is empty, too large, or not made of sectors")]
    Size(u64),
    /// Cut off, or longer.
    #[error("it has {actual} bytes and should have {wanted}")]
    Length {
        /// What its header says.
        wanted: u64,
        /// In fact.
        actual: u64,
    },
    /// Damaged.
    #[error("its map has {value} for cluster {cluster}, which means nothing")]
    Entry {
        /// Which.
        cluster: u64,
        /// What there is.
        value: u8,
    },
    /// They are not of one disk, or in another order.
    #[error("it is of a disk of {size} bytes, and what is below of one of {below}: a disk never shrinks")]
    Order {
        /// Its own.
        size: u64,
        /// That below.
        below: u64,
    },
    /// None, or too many to be right.
    #[error("a disk has 1 to {most} layers above its base, not {0}", most = crate::MOST_FILES - 1)]
    Count(usize),
}

/// How many clusters a disk of `size` has.
pub(crate) fn clusters(size: u64) -> u64 {
    size.div_ceil(CLUSTER)
}

/// Where the disk's bytes begin in a layer's file.
pub(crate) fn start(size: u64) -> u64 {
    (MAP + clusters(size)).next_multiple_of(CLUSTER)
}

/// Makes the empty `file` a layer of which all is to be looked up below, of a disk of `size` bytes. Nothing is synced.
///
/// # Errors
/// When it cannot be written.
pub fn create(file: &File, size: u64) -> Result<(), LayerError> {
    check_size(size)?;
    let length = start(size) + clusters(size) * CLUSTER;
    file.set_len(length).map_err(LayerError::Write)?;
    file.write_all_at(&header(size), 0).map_err(LayerError::Write)
}

/// The bytes of the disk that `file` is a layer of.
///
/// # Errors
/// When it is none.
pub fn size(file: &File) -> Result<u64, LayerError> {
    let mut bytes = [0; HEADER];
    read_padded(file, &mut bytes, 0).map_err(LayerError::Read)?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    if bytes[..8] != MAGIC {
        return Err(LayerError::Magic);
    }
    let version = number(8) as u32;
    if version != VERSION {
        return Err(LayerError::Version(version));
    }
    let size = number(16);
    if bytes != header(size) {
        return Err(LayerError::Header);
    }
    check_size(size)?;
    let wanted = start(size) + clusters(size) * CLUSTER;
    let actual = file.metadata().map_err(LayerError::Read)?.len();
    match wanted == actual {
        true => Ok(size),
        false => Err(LayerError::Length { wanted, actual }),
    }
}

/// The map of a layer of a disk of `size` bytes, checked.
pub(crate) fn read_map(file: &File, size: u64) -> Result<Vec<u8>, LayerError> {
    // Fits: a disk's clusters are fewer than 2^32.
    let mut map = vec![0; clusters(size) as usize];
    let end = MAP + map.len() as u64;
    for extent in extents(file, MAP..end).map_err(LayerError::Read)? {
        let [from, to] = [extent.start, extent.end].map(|at| (at - MAP) as usize);
        read_padded(file, &mut map[from..to], extent.start).map_err(LayerError::Read)?;
        if let Some(wrong) = map[from..to].iter().position(|value| *value > entry::ZEROS) {
            return Err(LayerError::Entry {
                cluster: (from + wrong) as u64,
                value: map[from + wrong],
            });
        }
    }
    Ok(map)
}

fn check_size(size: u64) -> Result<(), LayerError> {
    let good = size > 0 && size <= MOST_BYTES && size.is_multiple_of(512);
    good.then_some(()).ok_or(LayerError::Size(size))
}

fn header(size: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(CLUSTER as u32).to_le_bytes());
    header[16..24].copy_from_slice(&size.to_le_bytes());
    let sum = xxh3_64(&header[..24]);
    header[24..].copy_from_slice(&sum.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        create(&file, size).unwrap();
        file
    }

    #[test]
    fn a_new_layer_says_how_long_its_disk_is_and_takes_no_space() {
        use std::os::unix::fs::MetadataExt;
        for bytes in [512, CLUSTER, CLUSTER + 512, 20 << 30, 15 << 40] {
            let file = file(bytes);
            assert_eq!(size(&file).unwrap(), bytes);
            assert!(file.metadata().unwrap().blocks() * 512 <= 2 * CLUSTER);
        }
        assert!(
            read_map(&file(20 << 30), 20 << 30)
                .unwrap()
                .iter()
                .all(|entry| *entry == 0)
        );
        for bytes in [0, 100, MOST_BYTES + 512] {
            let error = create(&tempfile::tempfile().unwrap(), bytes).unwrap_err();
            assert!(matches!(error, LayerError::Size(_)), "{error}");
        }
    }

    #[test]
    fn what_is_damaged_is_told() {
        let good = file(MIB);
        let length = good.metadata().unwrap().len();
        for (cut, wanted) in [
            (0, "no layer"),
            (20, "damaged"),
            (4096, "should have"),
            (length - 1, "should have"),
        ] {
            let file = file(MIB);
            file.set_len(cut).unwrap();
            let error = size(&file).unwrap_err().to_string();
            assert!(error.contains(wanted), "{cut}: {error}");
        }
        let file = file(MIB);
        file.write_all_at(&[9], 8).unwrap();
        assert!(matches!(size(&file), Err(LayerError::Version(9))));
        good.write_all_at(&[1, 2, 0, 3], MAP + 3).unwrap();
        let error = read_map(&good, MIB).unwrap_err();
        assert!(
            matches!(error, LayerError::Entry { cluster: 6, value: 3 }),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(change in 0usize..HEADER, value: u8, at in 0u64..16, entry: u8) {
            let file = file(MIB);
            file.write_all_at(&[value], change as u64).unwrap();
            file.write_all_at(&[entry], MAP + at).unwrap();
            if let Ok(bytes) = size(&file) {
                prop_assert_eq!(bytes, MIB);
                prop_assert_eq!(read_map(&file, bytes).is_ok(), entry <= entry::ZEROS);
            }
        }
    }
}
