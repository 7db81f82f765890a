//! Lighter's monitor: one process runs one microVM on KVM.
//!
//! The way from a description to a running guest:
//! [`machine`] builds guest [`memory`], loads a kernel ([`boot`]), describes the hardware to it ([`acpi`]), attaches
//! devices ([`virtio`], [`serial`]) to the [`bus`], and starts one thread per [`vcpu`]. [`control`] answers the supervisor.

pub mod memory;
pub mod probe;
pub mod virtio;
