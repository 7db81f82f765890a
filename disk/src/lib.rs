//! A disk as a chain of files: a raw one, the base, and layers above it. Only the last is written, and the others never change.
//!
//! So a second disk that begins as this one is now is made of nothing but names: the files that there are, frozen from then on,
//! and a new empty layer above them for each of the two. How much the disk holds makes no difference.
//!
//! - [`layer`]: the format of one layer's file
//! - [`chain`]: reading and writing through all of them
//! - [`merge`]: several layers to one, or into the base, so that chains stay short
//!
//! # What survives a crash
//!
//! A write is promised to last when a flush that began after it has ended. A flush syncs the data, then writes those parts of the
//! map that had changed when it *began*, then syncs again ([`Chain::take_changes`]). So an entry of the map that is on the disk
//! speaks of data that was on the disk before. Each entry is a byte, and says what is true by itself: a page of the map of which
//! only a part was written is as good as any, for entries that are still the old ones speak of what no flush has promised yet.
//!
//! The first write to a cluster copies all of it from below before the map says that it is here, even what is about
//! to be overwritten. So whatever of a write that is under way gets to the disk, each sector has its old content or its new one, as on
//! a real disk; and nobody has to remember which writes are under way.
//!
//! What is in a layer's file at the place of a cluster that the map does not have is of no meaning after a crash. It is
//! removed before the layer is written again ([`Chain::make_writable`]); from then on those places are holes, or become
//! so before the map says that there are zeros. That is why zeros are read from the top, too, and no reader knows of them.

pub mod chain;
pub mod layer;
pub mod merge;
mod sparse;

pub use chain::{Chain, Changes, Run};
pub use layer::{CLUSTER, LayerError, create, size};
pub use merge::{commit, merge};
pub use sparse::extents;

/// No disk has more files.
pub const MOST_FILES: usize = 64;
