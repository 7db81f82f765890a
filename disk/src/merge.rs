//! Several layers to one.

use crate::layer::{self, CLUSTER, LayerError, MAP, entry, read_map, start};
use crate::sparse::extents;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

/// Makes the empty `into` a layer that is to what is below as `layers` are, the lowest first; they must not change any more.
/// Nothing is synced.
///
/// # Errors
/// When one of them is damaged, or `into` cannot be written.
pub fn merge(layers: &[File], into: &File) -> Result<(), LayerError> {
    let top = layers.last().ok_or(LayerError::Count(0))?;
    let size = layer::size(top)?;
    layer::create(into, size)?;
    let mut map = vec![entry::BELOW; layer::clusters(size) as usize];
    let mut source = vec![0usize; map.len()];
    let mut starts = vec![];
    for (number, file) in layers.iter().enumerate() {
        let its_size = layer::size(file)?;
        if its_size > size {
            return Err(LayerError::Order {
                size,
                below: its_size,
            });
        }
        starts.push(start(its_size));
        for (cluster, value) in read_map(file, its_size)?.into_iter().enumerate() {
            if value != entry::BELOW {
                (map[cluster], source[cluster]) = (value, number);
            }
        }
    }
    let mut first = 0;
    while first < map.len() {
        let alike = |cluster: &usize| (map[*cluster], source[*cluster]) == (map[first], source[first]);
        let end = (first..map.len())
            .find(|cluster| !alike(cluster))
            .unwrap_or(map.len());
        if map[first] == entry::HERE {
            let from = starts[source[first]];
            let [begin, end] = [first, end].map(|cluster| cluster as u64 * CLUSTER);
            for extent in
                extents(&layers[source[first]], from + begin..from + end).map_err(LayerError::Read)?
            {
                let to = extent.start - from + start(size);
                copy(
                    &layers[source[first]],
                    extent.start,
                    into,
                    to,
                    extent.end - extent.start,
                )
                .map_err(LayerError::Write)?;
            }
        }
        first = end;
    }
    into.write_all_at(&map, MAP).map_err(LayerError::Write)
}

/// Inside of the kernel where it can, which shares blocks where the file system can.
fn copy(mut from: &File, at: u64, mut to: &File, to_at: u64, length: u64) -> io::Result<()> {
    from.seek(SeekFrom::Start(at))?;
    to.seek(SeekFrom::Start(to_at))?;
    match io::copy(&mut from.take(length), &mut to)? == length {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
