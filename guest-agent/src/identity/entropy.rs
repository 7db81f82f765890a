//! The kernel's random numbers (random(4)).

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
};

use libc::c_int;

const DEVICE: &str = "/dev/random";

/// Adds bytes that count as random: `_IOW('R', 3, int[2])`.
const ADD: libc::Ioctl = nix::request_code_write!(b'R', 3, size_of::<[c_int; 2]>()) as libc::Ioctl;

/// Makes the next number of what was added: `_IO('R', 7)`.
const RESEED: libc::Ioctl = nix::request_code_none!(b'R', 7) as libc::Ioctl;

/// What the first takes.
#[repr(C)]
struct Credited {
    entropy_bits: c_int,
    length: c_int,
    bytes: [u8; 32],
}

/// The guest's random numbers may be those of another.
#[derive(Debug, thiserror::Error)]
#[error("cannot seed the kernel's random numbers with the host's, which others may have the same of")]
pub struct Error(#[source] io::Error);

/// Seeds the kernel's generator with `seed`, all of which counts as random, and has it used at once.
///
/// # Errors
/// When the kernel refuses.
pub fn credit(seed: &[u8; 32]) -> Result<(), Error> {
    let device = OpenOptions::new().write(true).open(DEVICE).map_err(Error)?;
    let credited = Credited {
        entropy_bits: 256,
        length: 32,
        bytes: *seed,
    };
    // SAFETY: RNDADDENTROPY reads two numbers and as many bytes as the second says, which is what `credited` is.
    done(unsafe { libc::ioctl(device.as_raw_fd(), ADD, &raw const credited) })?;
    reseed(&device)
}

fn reseed(device: &File) -> Result<(), Error> {
    // SAFETY: RNDRESEEDCRNG has no argument.
    done(unsafe { libc::ioctl(device.as_raw_fd(), RESEED) })
}

fn done(result: c_int) -> Result<(), Error> {
    match result {
        0 => Ok(()),
        _ => Err(Error(io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        // include/uapi/linux/random.h, as strace shows them.
        assert_eq!((ADD, RESEED), (0x4008_5203, 0x5207));
        assert_eq!(size_of::<Credited>(), 40);
    }
}
