//! The rng device.
