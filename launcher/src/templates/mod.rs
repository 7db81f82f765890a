//! Templates: snapshots of engines that nobody has used yet, for new VMs to start from.
//!
//! The first VM of a configuration boots, and leaves one behind ([`crate::supervisor::template`]): saved when its engine is
//! ready, before anybody is served. Later new VMs of that configuration go on from it, each with an identity of its own.
//!
//! - [`key`]: which VMs one template is good for
//! - [`store`]: finding, making room and removing: `templates/TEMPLATE/`, with the files of a snapshot
//! - [`fresh`]: starting a VM that has never run, from a template or not

pub mod fresh;
pub mod key;
pub mod store;
