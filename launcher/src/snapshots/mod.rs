//! Snapshots on disk: `snapshots/VM/SNAPSHOT/` holds a manifest, and the state, memory and data disk of a VM that ran.
//!
//! One is made in a folder that is no snapshot's name, and gets its name when it is complete and on the disk: there is no half
//! of one, whoever is killed when. Nothing in it changes afterwards, since VMs run from its memory file for as long as they live.
//!
//! - [`manifest`]: what a snapshot says of itself
//! - [`base`]: a folder to start VMs from, checked
//! - [`store`]: finding, listing and removing
//! - [`create`]: taking one
//! - [`restore`]: new VMs from one
//! - [`fork`]: new VMs from a running one
//! - [`transfer`]: to one file and back
//! - [`booted`]: the kernel and the image, which are not part of it
//! - [`copy`]: copies and checksums of large files with holes

pub mod base;
pub mod booted;
pub mod copy;
pub mod create;
pub mod error;
pub mod fork;
pub mod manifest;
pub mod restore;
pub mod store;
pub mod transfer;
