//! The block device.
