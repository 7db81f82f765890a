//! Several layers to one, or into the base.

use crate::layer::{self, CLUSTER, LayerError, MAP, entry, read_map, start};
use crate::sparse::{extents, punch};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Makes the empty `into` a layer that is to what is below as `layers` are, the lowest first; they must not change any more.
/// Nothing is synced.
///
/// # Errors
/// When one of them is damaged, or `into` cannot be written.
pub fn merge(layers: &[File], into: &File) -> Result<(), LayerError> {
    let together = Together::of(layers)?;
    layer::create(into, together.size)?;
    for (range, source) in together.runs() {
        if let Some(number) = source {
            together.copy(number, range, into, start(together.size))?;
        }
    }
    into.write_all_at(&together.map, MAP).map_err(LayerError::Write)
}

/// Writes what `layers` have, the lowest first, to the base below them; they must not change any more. Whoever reads that base through
/// them sees no difference, now and if this is cut short: they have all that is changed. Nobody else may have it. Nothing is
/// synced.
///
/// # Errors
/// When one of them is damaged, or the base cannot be written.
pub fn commit(layers: &[File], base: &File) -> Result<(), LayerError> {
    let together = Together::of(layers)?;
    let length = base.metadata().map_err(LayerError::Read)?.len();
    if length < together.size {
        base.set_len(together.size).map_err(LayerError::Write)?;
    }
    for (range, source) in together.runs() {
        let range = range.start..range.end.min(together.size);
        punch(base, range.clone()).map_err(LayerError::Write)?;
        if let Some(number) = source {
            together.copy(number, range, base, 0)?;
        }
    }
    Ok(())
}

/// Layers as one.
struct Together<'a> {
    layers: &'a [File],
    /// Where the disk's first byte is in each.
    starts: Vec<u64>,
    size: u64,
    map: Vec<u8>,
    /// Which has each cluster that the map has, or says that it is zeros.
    source: Vec<usize>,
}

impl<'a> Together<'a> {
    fn of(layers: &'a [File]) -> Result<Self, LayerError> {
        let size = layer::size(layers.last().ok_or(LayerError::Count(0))?)?;
        let clusters = layer::clusters(size) as usize;
        let mut together = Self {
            layers,
            starts: vec![],
            size,
            map: vec![entry::BELOW; clusters],
            source: vec![0; clusters],
        };
        for (number, file) in layers.iter().enumerate() {
            let below = layer::size(file)?;
            if below > size {
                return Err(LayerError::Order { size, below });
            }
            together.starts.push(start(below));
            for (cluster, value) in read_map(file, below)?.into_iter().enumerate() {
                if value != entry::BELOW {
                    (together.map[cluster], together.source[cluster]) = (value, number);
                }
            }
        }
        Ok(together)
    }

    /// The parts of the disk that they have, each with the number of the layer where it is; there is none for zeros.
    fn runs(&self) -> Vec<(Range<u64>, Option<usize>)> {
        let what = |cluster: usize| match self.map[cluster] {
            entry::BELOW => None,
            entry::HERE => Some(Some(self.source[cluster])),
            _ => Some(None),
        };
        let mut runs = vec![];
        let mut first = 0;
        while first < self.map.len() {
            let differs = |cluster: &usize| what(*cluster) != what(first);
            let end = (first..self.map.len()).find(differs).unwrap_or(self.map.len());
            if let Some(source) = what(first) {
                runs.push((first as u64 * CLUSTER..end as u64 * CLUSTER, source));
            }
            first = end;
        }
        runs
    }

    /// Copies the part `range` of the disk from the layer `number` to where `to` has it, whose first byte of the disk is at `start`;
    /// holes are left out.
    fn copy(&self, number: usize, range: Range<u64>, to: &File, start: u64) -> Result<(), LayerError> {
        let (from, its_start) = (&self.layers[number], self.starts[number]);
        let data = extents(from, its_start + range.start..its_start + range.end);
        for extent in data.map_err(LayerError::Read)? {
            let at = extent.start - its_start + start;
            let copied = copy(from, extent.start, to, at, extent.end - extent.start);
            copied.map_err(LayerError::Write)?;
        }
        Ok(())
    }
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
