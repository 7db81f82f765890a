//! Reading and writing through all files of a disk.

use crate::layer::{self, CLUSTER, LayerError, MAP, PAGE, entry, read_map, start};
use crate::sparse::{extents, is_zero, punch, read_padded};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A part of the disk as it lies in one of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which of [`Chain::files`].
    pub file: usize,
    /// Where in that.
    pub at: u64,
    /// Bytes.
    pub length: u64,
}

/// Parts of the map that have changed, as they were at one moment.
#[derive(Debug)]
pub struct Changes {
    pages: Vec<(usize, Vec<u8>)>,
}

/// A disk of a base and at least one layer.
#[derive(Debug)]
pub struct Chain {
    /// The base first, the top last.
    files: Vec<Arc<File>>,
    /// Where the disk's first byte is in each.
    starts: Vec<u64>,
    size: u64,
    base_length: u64,
    /// Which file each cluster is read from. Zeros are in the top: there are holes in their places.
    source: Vec<u8>,
    /// The top's map.
    map: Vec<u8>,
    /// Pages of it that are not in the file yet.
    changed: BTreeSet<usize>,
    buffer: Vec<u8>,
}

impl Chain {
    /// Looks at the files of a disk. Nothing is written.
    ///
    /// The base may be longer than its first layer says: a merge of layers into it has made room for those of a disk that had grown,
    /// and was cut short. What it has there is read from them still.
    ///
    /// # Errors
    /// Which of the layers cannot be one, by its number from 0, and why.
    pub fn open(base: Arc<File>, layers: Vec<Arc<File>>) -> Result<Self, (usize, LayerError)> {
        let count = layers.len();
        if count == 0 || count >= crate::MOST_FILES {
            return Err((0, LayerError::Count(count)));
        }
        let read = |error| (0, LayerError::Read(error));
        let base_length = length(&base).map_err(read)?;
        let (mut starts, mut sizes, mut files) = (vec![0], vec![], vec![base]);
        let mut maps = vec![];
        for (number, file) in layers.into_iter().enumerate() {
            let named = |error| (number, error);
            let size = layer::size(&file).map_err(named)?;
            if let Some(&below) = sizes.last().filter(|below| size < **below) {
                return Err((number, LayerError::Order { size, below }));
            }
            maps.push(read_map(&file, size).map_err(named)?);
            starts.push(start(size));
            sizes.push(size);
            files.push(file);
        }
        let mut chain = Self {
            files,
            starts,
            size: *sizes.last().unwrap_or(&0),
            base_length: base_length.min(sizes[0]),
            source: vec![],
            map: maps.pop().unwrap_or_default(),
            changed: BTreeSet::new(),
            buffer: vec![0; CLUSTER as usize],
        };
        chain.find_sources(&maps);
        Ok(chain)
    }

    /// Says where each cluster is read from; `between` are the maps of the layers between the base and the top.
    fn find_sources(&mut self, between: &[Vec<u8>]) {
        let top = self.top() as u8;
        // The base is number 0.
        self.source = vec![0; self.map.len()];
        self.source[layer::clusters(self.base_length) as usize..].fill(top);
        for (number, map) in (1..).zip(between.iter().chain([&self.map])) {
            for (page, entries) in map
                .chunks(PAGE)
                .enumerate()
                .filter(|(_, entries)| !is_zero(entries))
            {
                for (source, entry) in self.source[page * PAGE..].iter_mut().zip(entries) {
                    match *entry {
                        entry::HERE => *source = number,
                        entry::ZEROS => *source = top,
                        _ => {}
                    }
                }
            }
        }
    }

    /// Removes from the top what a crash has left there, before it is written: see the crate.
    ///
    /// # Errors
    /// When the top cannot be written.
    pub fn make_writable(&mut self) -> io::Result<()> {
        let top = self.files[self.top()].clone();
        let first = self.start();
        for extent in extents(&top, first..first + self.map.len() as u64 * CLUSTER)? {
            let [mut cluster, end] = [
                (extent.start - first) / CLUSTER,
                (extent.end - first).div_ceil(CLUSTER),
            ];
            while cluster < end {
                let here = self.map[cluster as usize] == entry::HERE;
                let same = |cluster: &u64| (self.map[*cluster as usize] == entry::HERE) == here;
                let next = (cluster..end).find(|cluster| !same(cluster)).unwrap_or(end);
                if !here {
                    punch(&top, first + cluster * CLUSTER..first + next * CLUSTER)?;
                }
                cluster = next;
            }
        }
        // A disk that grew: behind the base's end, in its last cluster, are zeros that the base has no place for.
        if self.base_length < self.size && !self.base_length.is_multiple_of(CLUSTER) {
            let last = (self.base_length / CLUSTER) as usize;
            if self.source[last] == 0 {
                self.own(last)?;
            }
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All files, the base first.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// The number of the file that is written.
    pub fn top(&self) -> usize {
        self.files.len() - 1
    }

    /// Where the disk's first byte is in that file.
    pub fn start(&self) -> u64 {
        self.starts[self.top()]
    }

    /// Where the `length` bytes from `at` on are, in their order. They have to lie on the disk.
    pub fn runs(&self, at: u64, length: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = vec![];
        let (mut at, end) = (at, at + length);
        while at < end {
            let cluster = at / CLUSTER;
            let file = usize::from(self.source[cluster as usize]);
            let length = ((cluster + 1) * CLUSTER).min(end) - at;
            match runs.last_mut() {
                Some(run) if run.file == file => run.length += length,
                _ => runs.push(Run {
                    file,
                    at: self.starts[file] + at,
                    length,
                }),
            }
            at += length;
        }
        runs
    }

    /// Sees to it that the `length` bytes from `at` on can be written to the top, at their place there: what is in their
    /// clusters is there when this returns.
    ///
    /// # Errors
    /// When it cannot be copied; what the disk holds is the same then.
    pub fn prepare_write(&mut self, at: u64, length: u64) -> io::Result<()> {
        let clusters = (at / CLUSTER) as usize..(at + length).div_ceil(CLUSTER) as usize;
        clusters.into_iter().try_for_each(|cluster| self.own(cluster))
    }

    fn own(&mut self, cluster: usize) -> io::Result<()> {
        let (source, top) = (usize::from(self.source[cluster]), self.top());
        if source != top {
            let at = cluster as u64 * CLUSTER;
            read_padded(&self.files[source], &mut self.buffer, self.starts[source] + at)?;
            // A hole stays one.
            if !is_zero(&self.buffer) {
                self.files[top].write_all_at(&self.buffer, self.starts[top] + at)?;
            }
        }
        self.set(cluster, entry::HERE);
        Ok(())
    }

    fn set(&mut self, cluster: usize, value: u8) {
        self.source[cluster] = self.top() as u8;
        if self.map[cluster] != value {
            self.map[cluster] = value;
            self.changed.insert(cluster / PAGE);
        }
    }

    /// Sees to it that the `length` bytes from `at` on can be emptied in the top, at their place there. Returns the clusters that
    /// are in them as a whole: for [`Self::emptied`], when that is done.
    ///
    /// # Errors
    /// As [`Self::prepare_write`].
    pub fn prepare_empty(&mut self, at: u64, length: u64) -> io::Result<Range<usize>> {
        let end = at + length;
        let whole = at.div_ceil(CLUSTER) as usize..(end / CLUSTER) as usize;
        let touched = (at / CLUSTER) as usize..end.div_ceil(CLUSTER) as usize;
        for cluster in [touched.start, touched.end - 1] {
            // Those in which there is nothing have nothing to lose.
            if !whole.contains(&cluster) && usize::from(self.source[cluster]) != self.top() {
                self.own(cluster)?;
            }
        }
        // Nothing, and not less than that.
        Ok(whole.start..whole.end.max(whole.start))
    }

    /// Notes that the places of `clusters` in the top are empty. With `kept` their space is kept for them.
    pub fn emptied(&mut self, clusters: Range<usize>, kept: bool) {
        for cluster in clusters {
            let nothing_below =
                usize::from(self.source[cluster]) == self.top() && self.map[cluster] == entry::BELOW;
            match (kept, nothing_below) {
                (true, _) => self.set(cluster, entry::HERE),
                (false, false) => self.set(cluster, entry::ZEROS),
                (false, true) => {}
            }
        }
    }

    /// What has changed of the map, for [`Self::write_changes`] when the data that it speaks of is synced; `None` when nothing
    /// has. No other changes may be taken before these are written or given back.
    pub fn take_changes(&mut self) -> Option<Changes> {
        let page = |number: usize| {
            let first = number * PAGE;
            let end = (first + PAGE).min(self.map.len());
            (number, self.map[first..end].to_vec())
        };
        let pages: Vec<_> = std::mem::take(&mut self.changed).into_iter().map(page).collect();
        (!pages.is_empty()).then_some(Changes { pages })
    }

    /// Writes them to the file. They last when that is synced.
    ///
    /// # Errors
    /// When it cannot be written: they are to be given back then.
    pub fn write_changes(&self, changes: &Changes) -> io::Result<()> {
        let mut pages = changes.pages.iter();
        pages.try_for_each(|(number, page)| {
            self.files[self.top()].write_all_at(page, MAP + (number * PAGE) as u64)
        })
    }

    /// Takes changes back that did not get to the disk: they are of the next that are taken.
    pub fn give_back(&mut self, changes: Changes) {
        self.changed
            .extend(changes.pages.into_iter().map(|(number, _)| number));
    }

    /// Makes all of it last.
    ///
    /// # Errors
    /// When it does not.
    pub fn flush(&mut self) -> io::Result<()> {
        let changes = self.take_changes();
        let top = &self.files[self.top()];
        let mut written = top.sync_data();
        if let (Ok(()), Some(changes)) = (&written, &changes) {
            written = self.write_changes(changes).and_then(|()| top.sync_data());
        }
        if let (Err(_), Some(changes)) = (&written, changes) {
            self.give_back(changes);
        }
        written
    }

    /// Whether the map in the file is the one here.
    pub fn is_written(&self) -> bool {
        self.changed.is_empty()
    }

    /// Freezes the top, of which all has to be flushed, and writes to the empty `layer` from here on. `merged`, if there is one, takes
    /// the place of all layers between the base and that top; if those were committed to the base it is empty.
    ///
    /// # Errors
    /// When one of them cannot be what it is to be; then all is as it was.
    pub fn push(&mut self, layer: Arc<File>, merged: Option<Arc<File>>) -> Result<(), LayerError> {
        if merged.is_none() && self.files.len() >= crate::MOST_FILES {
            return Err(LayerError::Count(self.files.len()));
        }
        let size = layer::size(&layer)?;
        let map = read_map(&layer, size)?;
        if size != self.size || !is_zero(&map) {
            return Err(LayerError::Order {
                size,
                below: self.size,
            });
        }
        if let Some(merged) = merged {
            let its_size = layer::size(&merged)?;
            // It is longer than it was if layers were merged into it.
            let base_length = length(&self.files[0]).map_err(LayerError::Read)?;
            if its_size > self.size || its_size < base_length {
                return Err(LayerError::Order {
                    size: self.size,
                    below: its_size,
                });
            }
            let between = read_map(&merged, its_size)?;
            let top = self.top();
            self.base_length = base_length;
            self.files = vec![self.files[0].clone(), merged, self.files[top].clone()];
            self.starts = vec![0, start(its_size), self.starts[top]];
            self.find_sources(&[between]);
        }
        // What is read from the top that was is read from it still: zeros, too.
        self.files.push(layer);
        self.starts.push(start(size));
        self.map = map;
        Ok(())
    }

    /// Fills `buffer` from the byte `at` on, which has to lie on the disk as far as that.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn read_at(&self, mut buffer: &mut [u8], at: u64) -> io::Result<()> {
        for run in self.runs(at, buffer.len() as u64) {
            // No longer than the buffer.
            let (part, rest) = buffer.split_at_mut(run.length as usize);
            read_padded(&self.files[run.file], part, run.at)?;
            buffer = rest;
        }
        Ok(())
    }

    /// Which parts of the disk may have something else than zeros, in their order.
    ///
    /// # Errors
    /// When a file system does not tell.
    pub fn extents(&self) -> io::Result<Vec<Range<u64>>> {
        let mut found = vec![];
        let mut at = 0;
        for run in self.runs(0, self.size) {
            let extents = extents(&self.files[run.file], run.at..run.at + run.length)?;
            let moved = |extent: Range<u64>| extent.start - run.at + at..extent.end - run.at + at;
            found.extend(extents.into_iter().map(moved));
            at += run.length;
        }
        Ok(found)
    }
}

/// Of a file or a block device.
fn length(mut file: &File) -> io::Result<u64> {
    use std::io::Seek;
    file.seek(io::SeekFrom::End(0))
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
