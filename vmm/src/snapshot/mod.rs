//! A VM on the disk: what its monitor keeps of it, in a file that says what it is, and its memory beside.
//!
//! The state file (all numbers little-endian):
//!
//! ```text
//!   8 bytes  "LGHTSNAP"
//!   4        version of the format
//!   8        length of what follows the checksum
//!  32        SHA-256 of that
//!   …        [`MachineState`], as postcard
//! ```
//!
//! The memory file is guest memory from its first byte to its last, without the hole below 4 GiB; pages of zeros are holes.

pub mod memory;
pub mod working_set;

use crate::serial::SerialState;
use crate::vcpu::state::VcpuState;
use crate::virtio::mmio::TransportState;
use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Write};

const MAGIC: [u8; 8] = *b"LGHTSNAP";

/// Changes with everything that changes [`MachineState`], or what any part of it means.
pub const VERSION: u32 = 1;

/// No VM's state is longer: 64 vCPUs have some 20 KiB each, a shared folder with very many open files a few MiB.
const MOST_BYTES: u64 = 256 << 20;

/// Length of what precedes the state.
const HEADER: usize = 8 + 4 + 8 + 32;

/// Why a file is no snapshot's state, or none that this monitor understands.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Reading.
    #[error("cannot read the snapshot's state")]
    Read(#[source] io::Error),
    /// Writing.
    #[error("cannot write the snapshot's state")]
    Write(#[source] io::Error),
    /// It begins otherwise.
    #[error("the file is not the state of a snapshot")]
    Magic,
    /// Of an older or newer Lighter.
    #[error("the snapshot has format {0}, and this monitor reads format {VERSION}: take it anew")]
    Version(u32),
    /// It ends early, or goes on behind its end.
    #[error("the snapshot's state is {actual} bytes long where it says {said}: the file is damaged")]
    Length {
        /// In its header.
        said: u64,
        /// In fact.
        actual: u64,
    },
    /// A byte is another.
    #[error("the snapshot's state does not have the checksum that it says: the file is damaged")]
    Checksum,
    /// The checksum is right and the content wrong.
    #[error("the snapshot's state is not understood")]
    Content(#[source] postcard::Error),
}

/// Everything of a VM but its memory and its disks.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// In the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// The two old interrupt controllers and the I/O interrupt controller.
    pub irqchips: [kvm_irqchip; 3],
    /// KVM's clock.
    pub clock: kvm_clock_data,
    /// In the order of their windows.
    pub devices: Vec<DeviceState>,
    /// The console.
    pub serial: SerialState,
}

/// A virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Such as `block data`: a snapshot's device is restored into one of the same name.
    pub name: String,
    /// Its registers and rings.
    pub transport: TransportState,
    /// What the device knows besides, in its own form.
    pub own: Vec<u8>,
}

/// Writes `state` into the empty `file`.
///
/// # Errors
/// When the file cannot be written.
pub fn write(state: &MachineState, file: &mut File) -> Result<(), SnapshotError> {
    let body = postcard::to_allocvec(state).map_err(SnapshotError::Content)?;
    let length = (body.len() as u64).to_le_bytes();
    let header = [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &length,
        &Sha256::digest(&body),
    ]
    .concat();
    file.write_all(&header)
        .and_then(|()| file.write_all(&body))
        .map_err(SnapshotError::Write)
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// When it is anything else.
pub fn read(file: &mut File) -> Result<MachineState, SnapshotError> {
    let mut bytes = vec![];
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(SnapshotError::Read)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<MachineState, SnapshotError> {
    let (header, body) = bytes.split_at_checked(HEADER).ok_or(SnapshotError::Magic)?;
    let (magic, header) = header.split_at(8);
    let (version, header) = header.split_at(4);
    let (length, checksum) = header.split_at(8);
    if magic != MAGIC {
        return Err(SnapshotError::Magic);
    }
    let version = version
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u32::from(*byte));
    if version != VERSION {
        return Err(SnapshotError::Version(version));
    }
    let said = length
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte));
    let actual = body.len() as u64;
    if said != actual || actual > MOST_BYTES {
        return Err(SnapshotError::Length { said, actual });
    }
    if Sha256::digest(body).as_slice() != checksum {
        return Err(SnapshotError::Checksum);
    }
    postcard::from_bytes(body).map_err(SnapshotError::Content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Seek;

    fn file() -> Vec<u8> {
        let state = MachineState {
            memory_mib: 64,
            vcpus: vec![],
            irqchips: Default::default(),
            clock: kvm_clock_data::default(),
            devices: vec![],
            serial: SerialState::default(),
        };
        let mut file = tempfile::tempfile().unwrap();
        write(&state, &mut file).unwrap();
        file.rewind().unwrap();
        assert_eq!(read(&mut file).unwrap().memory_mib, 64);
        let mut bytes = vec![];
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// A tiny guest's, of one CPU and 64 MiB, as version 1 wrote it. A change that makes this fail needs another [`VERSION`], and a
    /// file of that beside this one, which is refused then.
    const GOLDEN: &[u8] = include_bytes!("golden-1");

    #[test]
    fn what_this_version_has_written_is_read_as_it_was() {
        let state = parse(GOLDEN).unwrap();
        assert_eq!((state.memory_mib, state.vcpus.len()), (64, 1));
        let names: Vec<_> = state.devices.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["block test", "vsock", "rng", "balloon"]);
        assert_eq!(postcard::to_allocvec(&state).unwrap(), GOLDEN[HEADER..]);
    }

    #[test]
    fn a_damaged_file_is_refused_with_what_is_wrong() {
        let good = file();
        assert!(parse(&good).is_ok());
        assert!(matches!(parse(&good[..20]), Err(SnapshotError::Magic)));
        assert!(matches!(parse(b""), Err(SnapshotError::Magic)));
        let cut = &good[..good.len() - 1];
        assert!(matches!(parse(cut), Err(SnapshotError::Length { .. })));
        let longer = [&good[..], b"x"].concat();
        assert!(matches!(parse(&longer), Err(SnapshotError::Length { .. })));
        let mut newer = good.clone();
        newer[8] = 9;
        assert!(matches!(parse(&newer), Err(SnapshotError::Version(9))));
        let mut flipped = good;
        *flipped.last_mut().unwrap() ^= 1;
        assert!(matches!(parse(&flipped), Err(SnapshotError::Checksum)));
    }

    #[test]
    fn a_state_that_is_not_understood_is_refused() {
        let body = [0xff; 40];
        let length = (body.len() as u64).to_le_bytes();
        let sum = Sha256::digest(body);
        let bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &length, &sum, &body].concat();
        assert!(matches!(parse(&bytes), Err(SnapshotError::Content(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(change in 0usize..HEADER + 64, value: u8, end in 0usize..4096) {
            let mut bytes = file();
            if let Some(byte) = bytes.get_mut(change) {
                *byte = value;
            }
            bytes.truncate(end.max(1));
            // Anything but a panic.
            let _ = parse(&bytes);
        }
    }
}
