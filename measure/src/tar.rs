//! Tar archives, as the engine reads them.

/// Tar counts in these, bytes.
pub(crate) const RECORD: usize = 512;

/// Zeroes at the end of an archive.
pub(crate) const END: [u8; 2 * RECORD] = [0; 2 * RECORD];

/// A header of POSIX.1-1988 (ustar) for a file of root's, with a mode of three octal digits.
pub(crate) fn header(name: &str, mode: &str, length: u64) -> [u8; RECORD] {
    let mut header = [0; RECORD];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, format!("{mode:0>7}\0").as_bytes());
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, format!("{length:011o}\0").as_bytes());
    put(136, b"00000000000\0");
    // The checksum counts itself as spaces.
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

/// An archive of one file of root's, with a mode of three octal digits.
pub fn archive(name: &str, mode: &str, content: &[u8]) -> Vec<u8> {
    let mut archive = header(name, mode, content.len() as u64).to_vec();
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(RECORD), 0);
    archive.extend(END);
    archive
}
