//! File system device (section 5.11): a folder of the host's, as the FUSE protocol over virtqueues.
//!
//! The FUSE server is `virtiofsd`'s, used as a library in a thread of this process: a daemon of its own could not see guest
//! memory that is private to this one. What that daemon does for itself is done here instead: the thread has its own
//! working directory and umask, and Landlock keeps it inside the folder ([`crate::cage`]); the server runs as the user who started the VM,
//! without any privilege, whoever asks in the guest.
//!
//! - `device`: the queues and the thread
//! - `translate`: a descriptor chain as the library takes it
//! - `checked`: names, flags and attributes of a guest's
//! - `folder`: what of FUSE a guest may ask for
//! - `known`: how many files the guest remembers
//! - `owner`: who owns a file in the guest's eyes
//!
//! The server outlives its thread, so that a pause leaves the guest's open files open; and it can be saved, by the paths of
//! what the guest knows.

mod checked;
mod device;
mod folder;
mod known;
mod owner;
#[cfg(test)]
mod tests;
mod translate;

use super::activity::Activity;
use super::queue::VirtQueue;
use super::worker::{DeviceThread, Prepare};
use super::{ActivateError, Activation, VirtioDevice, device_type, read_config_bytes};
use crate::cage::reach;
use device::{FsHandler, Share};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use translate::Translator;

/// Entries of the queue for FORGET and INTERRUPT.
const HIPRIO_SIZE: u16 = 128;
/// Entries of the queue for all other requests: one of 1 MiB takes some 260.
const REQUESTS_SIZE: u16 = 1024;
const QUEUES: usize = 2;
/// Their indexes.
const HIPRIO: usize = 0;
const REQUESTS: usize = 1;

/// Longest tag, bytes.
pub const MAX_TAG: usize = 36;

/// What a file system device is made of.
#[derive(Debug)]
pub struct FsConfig {
    /// What the guest mounts it by, 1 to [`MAX_TAG`] bytes.
    pub tag: String,
    /// The folder's path, for messages.
    pub path: String,
    /// The folder.
    pub folder: OwnedFd,
    /// Whether changes are refused.
    pub read_only: bool,
    /// How many files and folders the guest may hold open or remember, each of which takes a descriptor of this process.
    pub descriptors: u64,
}

/// Why there can be no file system device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Too long, or none.
    #[error("{0:?} is no tag of a file system; use 1 to {MAX_TAG} bytes, none of them zero")]
    Tag(String),
    /// The descriptor is something else.
    #[error("it is not a folder")]
    NotAFolder,
    /// The descriptor is not open.
    #[error("cannot look at it")]
    Folder(#[source] io::Error),
    /// No /proc.
    #[error("cannot open /proc/self/fd, by which its files are opened again")]
    Proc(#[source] io::Error),
}

/// The file system device.
#[derive(Debug)]
pub struct Fs {
    name: String,
    config: [u8; MAX_TAG + 4],
    folder: File,
    read_only: bool,
    activity: Activity<Share, FsHandler>,
}

impl Fs {
    /// A device that no driver uses yet; nothing in the folder is opened before one does.
    ///
    /// # Errors
    /// When the tag or the descriptor cannot be used.
    pub fn new(config: FsConfig) -> Result<Self, FsError> {
        let tag = config.tag.as_bytes();
        if !(1..=MAX_TAG).contains(&tag.len()) || tag.contains(&0) {
            return Err(FsError::Tag(config.tag));
        }
        // struct virtio_fs_config: the tag, padded with zeroes, and the number of request queues.
        let mut bytes = [0; MAX_TAG + 4];
        bytes[..tag.len()].copy_from_slice(tag);
        bytes[MAX_TAG..].copy_from_slice(&1u32.to_le_bytes());
        let folder = File::from(config.folder);
        if !folder.metadata().map_err(FsError::Folder)?.is_dir() {
            return Err(FsError::NotAFolder);
        }
        let name = format!("fs {}", config.path);
        let descriptors = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/proc/self/fd");
        let descriptors = descriptors.map_err(FsError::Proc)?;
        let share = Share::new(&name, descriptors, config.read_only, config.descriptors);
        Ok(Self {
            name,
            config: bytes,
            folder,
            read_only: config.read_only,
            activity: Activity::Idle(share.into()),
        })
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        device_type::FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &[HIPRIO_SIZE, REQUESTS_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn prepare(&mut self) -> io::Result<Prepare> {
        let (folder, read_only) = (self.folder.try_clone()?, self.read_only);
        Ok(Box::new(move || reach::folder(&folder, read_only)))
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues: [VirtQueue; QUEUES] = activation.take_queues()?;
        let Activation {
            memory,
            interrupt,
            thread,
            ..
        } = activation;
        let translator = Translator::new(&memory).map_err(ActivateError::Worker)?;
        let handler = |share| FsHandler::new(share, memory, translator, queues, interrupt.clone());
        self.activity.start(&thread, interrupt.clone(), handler)
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.activity.stop(FsHandler::into_parts)
    }

    /// What the driver has open and knows. Fails when a file that is open cannot be found by a path in the folder.
    fn save(&mut self, thread: &DeviceThread) -> io::Result<Vec<u8>> {
        match std::mem::replace(&mut self.activity, Activity::Lost) {
            Activity::Idle(share) => {
                let (share, saved) = thread.run(move || {
                    let saved = share.save();
                    (share, saved)
                })?;
                self.activity = Activity::Idle(share);
                saved
            }
            other => {
                self.activity = other;
                Err(io::Error::other("the device is active"))
            }
        }
    }

    /// Whether it is still there shows when the device is activated.
    fn restore(&mut self, own: &[u8]) -> io::Result<()> {
        match &mut self.activity {
            Activity::Idle(share) => share.restore(own),
            _ => Err(io::Error::other("the device is active")),
        }
    }

    fn reset(&mut self) {
        if let Activity::Idle(share) = &mut self.activity {
            share.forget_driver();
        }
    }
}
