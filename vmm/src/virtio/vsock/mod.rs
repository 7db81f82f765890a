//! The vsock device.
