//! What is read from and written to /dev/lighter-events, as kernel-config/host-events.patch has it.

use std::fs;

use lighter_protocol::{
    escaped::Escaped,
    file_events::{FileEvent, FileId},
};

/// A record's header, and PATH_MAX: the kernel gives nothing for less room.
pub const LONGEST_RECORD: usize = 16 + 4096;

/// What the kernel says.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// A file is watched; the path from its file system's root.
    Watched(FileId, &'a [u8]),
    /// Nobody watches it any more.
    Unwatched(FileId),
    /// Ask the host for all that has happened until now, under this number.
    Round(u64),
    /// There were more watches than it could remember.
    Lost,
}

/// What the kernel is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Something happened on the host.
    Happened(FileEvent),
    /// The host has told everything that it knew when it was asked.
    RoundOver(u64),
    /// Events of a file were lost.
    Lost(FileId),
}

impl<'a> Record<'a> {
    /// `None` for what a newer kernel says.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, path) = bytes.split_at_checked(16)?;
        let kind = u32::from_ne_bytes(header[..4].try_into().ok()?);
        let file = FileId {
            dev: u32::from_ne_bytes(header[4..8].try_into().ok()?),
            node: u64::from_ne_bytes(header[8..].try_into().ok()?),
        };
        match kind {
            1 => Some(Self::Watched(file, path)),
            2 => Some(Self::Unwatched(file)),
            3 => Some(Self::Round(file.node)),
            4 => Some(Self::Lost),
            _ => None,
        }
    }
}

impl Told {
    /// What is to be written at once.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (kind, file, mask, cookie, name) = match self {
            Self::Happened(event) => (1u32, event.file, event.mask, event.cookie, event.name.as_ref()),
            Self::RoundOver(round) => (2, FileId { dev: 0, node: *round }, 0, 0, None),
            Self::Lost(file) => (3, *file, 0, 0, None),
        };
        let mut bytes = vec![];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(file.dev.to_ne_bytes());
        bytes.extend(file.node.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(cookie.to_ne_bytes());
        bytes.extend(name.map_or(&[][..], |name| name.0.as_slice()));
        bytes
    }
}

/// Where file systems of the host are mounted.
#[derive(Debug, Default)]
pub struct Mounts(Vec<(u32, Vec<u8>)>);

impl Mounts {
    /// The whole path of one from its file system's root.
    pub fn whole(&mut self, dev: u32, path: &[u8]) -> Option<Escaped> {
        if !self.0.iter().any(|(known, _)| *known == dev) {
            // Those that the host has mounted in a shared folder come when they are first looked at.
            let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
            self.0 = mounts.split(|byte| *byte == b'\n').filter_map(parse).collect();
        }
        let (_, point) = self.0.iter().find(|(known, _)| *known == dev)?;
        let mut whole = point.clone();
        if path != b"/" {
            whole.extend(path);
        }
        Some(Escaped(whole))
    }
}

/// The device number, as the kernel's device has it, and the mount point, of a line for the whole of a virtiofs.
fn parse(line: &[u8]) -> Option<(u32, Vec<u8>)> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(words.nth(2)?).ok()?;
    let (root, point) = (words.next()?, words.next()?);
    let kind = words.skip_while(|word| *word != b"-").nth(1)?;
    if root != b"/" || kind != b"virtiofs" {
        return None;
    }
    let (major, minor) = device.split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    // As new_encode_dev() of the kernel.
    let dev = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
    Some((dev, unescape(point)))
}

/// Spaces and the like are a backslash and three octal digits in mountinfo.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = vec![];
    let mut rest = text;
    while let [first, behind @ ..] = rest {
        let digits = behind
            .first_chunk::<3>()
            .filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match digits {
            Some([a, b, c]) if *first == b'\\' => {
                let value = 64 * u32::from(a - b'0') + 8 * u32::from(b - b'0') + u32::from(c - b'0');
                bytes.push(value as u8);
                rest = &behind[3..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_records_are_read() {
        let record = |kind: u32, path: &[u8]| {
            let mut bytes = kind.to_ne_bytes().to_vec();
            bytes.extend(38u32.to_ne_bytes());
            bytes.extend(9u64.to_ne_bytes());
            bytes.extend(path);
            bytes
        };
        let file = FileId { dev: 38, node: 9 };
        assert_eq!(
            Record::parse(&record(1, b"/a")),
            Some(Record::Watched(file, b"/a"))
        );
        assert_eq!(Record::parse(&record(2, b"")), Some(Record::Unwatched(file)));
        assert_eq!(Record::parse(&record(3, b"")), Some(Record::Round(9)));
        assert_eq!(Record::parse(&record(4, b"")), Some(Record::Lost));
        assert_eq!(Record::parse(&record(5, b"")), None);
        assert_eq!(Record::parse(b"short"), None);
    }

    #[test]
    fn the_kernel_is_told_in_its_own_layout() {
        let event = FileEvent {
            file: FileId { dev: 38, node: 9 },
            mask: 0x100,
            cookie: 5,
            name: Some(Escaped(b"name".to_vec())),
        };
        let bytes = Told::Happened(event).to_bytes();
        assert_eq!(bytes.len(), 24 + 4);
        assert_eq!(bytes[..4], 1u32.to_ne_bytes());
        assert_eq!(bytes[8..16], 9u64.to_ne_bytes());
        assert_eq!(bytes[16..20], 0x100u32.to_ne_bytes());
        assert_eq!(&bytes[24..], b"name");
        assert_eq!(Told::RoundOver(3).to_bytes().len(), 24);
    }

    #[test]
    fn mounts_of_the_hosts_are_found_among_others() {
        let line = br"41 30 0:38 / /home/a\040user rw,nodev,relatime shared:5 - virtiofs share0 rw";
        assert_eq!(parse(line), Some((38, b"/home/a user".to_vec())));
        for other in [
            &br"41 30 0:38 /sub /mnt rw - virtiofs share0 rw"[..],
            br"41 30 0:38 / /mnt rw - tmpfs tmpfs rw",
            b"",
            b"nonsense",
        ] {
            assert_eq!(parse(other), None);
        }
        assert_eq!(
            parse(b"1 1 2:300 / /x rw - virtiofs t rw").map(|(dev, _)| dev),
            Some(0x10022c)
        );
    }
}
