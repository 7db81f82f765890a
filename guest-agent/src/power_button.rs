//! The ACPI power button: an input device (/dev/input/event*) that has the key KEY_POWER.

use std::{fs::File, io, os::fd::AsRawFd, path::PathBuf};

use tokio::sync::mpsc;

use crate::{
    fd::AsyncFile,
    log::Log,
    power::{Reason, Request},
};

/// Of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const KEY_BYTES: usize = 0x2ff / 8 + 1;

/// `struct input_event` of linux/input.h on 64-bit machines: two longs of time, type, code, value.
const EVENT: usize = 24;

nix::ioctl_read_buf!(
    /// The bits of the keys a device has: EVIOCGBIT(EV_KEY, …).
    key_bits, b'E', 0x21, u8
);

/// Turns presses of every power button into requests.
pub fn watch(power: &mpsc::Sender<Request>, log: &Log) {
    let buttons = match find() {
        Ok(buttons) => buttons,
        Err(error) => return log.warn(format!("cannot look for a power button in /dev/input: {error}")),
    };
    if buttons.is_empty() {
        log.warn("this machine has no power button: only the supervisor can ask for an orderly power-off");
    }
    for (path, file) in buttons {
        match AsyncFile::new(file.into()) {
            Ok(file) => drop(tokio::spawn(follow(file, power.clone()))),
            Err(error) => log.warn(format!(
                "cannot watch the power button {}: {error}",
                path.display()
            )),
        }
    }
}

fn find() -> io::Result<Vec<(PathBuf, File)>> {
    let folder = match std::fs::read_dir("/dev/input") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        folder => folder?,
    };
    let mut buttons = vec![];
    for entry in folder {
        let path = entry?.path();
        let is_event = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("event"));
        if is_event
            && let Ok(file) = File::open(&path)
            && has_power_key(&file)
        {
            buttons.push((path, file));
        }
    }
    Ok(buttons)
}

fn has_power_key(device: &File) -> bool {
    let mut bits = [0; KEY_BYTES];
    // SAFETY: the kernel writes at most the slice's length.
    let answered = unsafe { key_bits(device.as_raw_fd(), &mut bits) };
    let key = usize::from(KEY_POWER);
    answered.is_ok() && bits[key / 8] & (1 << (key % 8)) != 0
}

async fn follow(device: AsyncFile, power: mpsc::Sender<Request>) {
    let mut events = [0; EVENT * 16];
    while let Ok(length) = device.read(&mut events).await {
        if length == 0 {
            return;
        }
        if events[..length].chunks_exact(EVENT).any(is_press) {
            // Full only when a shutdown is under way.
            let _ = power.try_send(Request::from(Reason::PowerButton));
        }
    }
}

fn is_press(event: &[u8]) -> bool {
    let kind = u16::from_ne_bytes([event[16], event[17]]);
    let code = u16::from_ne_bytes([event[18], event[19]]);
    let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
    kind == EV_KEY && code == KEY_POWER && value == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut event = vec![0xaa; 16];
        event.extend(kind.to_ne_bytes());
        event.extend(code.to_ne_bytes());
        event.extend(value.to_ne_bytes());
        event
    }

    #[test]
    fn an_event_has_the_kernels_size() {
        assert_eq!(EVENT, size_of::<libc::input_event>());
    }

    #[test]
    fn only_the_press_of_the_power_key_counts() {
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 30, 1)));
        assert!(!is_press(&event(0, 0, 1)));
    }
}
