//! Lighter's monitor: one process runs one microVM on KVM.
//!
//! The way from a description to a running guest: [`machine`] builds guest [`memory`], loads a kernel ([`boot`]), describes
//! the hardware to it ([`acpi`]), attaches devices ([`virtio`], [`serial`]) to the [`bus`], and starts a thread for each
//! [`vcpu`]. [`control`] then answers the supervisor until the VM is over. [`layout`] has every fixed address.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cage;
pub mod control;
pub mod descriptors;
pub mod events;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod serial;
pub mod snapshot;
pub mod threads;
pub mod vcpu;
pub mod virtio;
