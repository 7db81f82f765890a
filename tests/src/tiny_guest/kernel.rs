//! Kernels of a few instructions, in the two formats that the monitor boots.

/// A kernel file to be written.
pub enum Kernel {
    /// 32-bit code behind a PVH entry in an ELF file.
    Pvh(Vec<u8>),
    /// 64-bit code behind the 64-bit entry of a bzImage.
    BzImage(Vec<u8>),
    /// Just these bytes.
    Bytes(Vec<u8>),
}

/// Where the code is loaded.
const LOAD: u64 = 0x10_0000;

impl Kernel {
    /// The file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Pvh(code) => elf(code),
            Self::BzImage(code) => bzimage(code),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// An ELF64 executable with one loaded segment and a note with the PVH entry.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let note_at = (HEADER + 2 * SEGMENT) as u64;
    let mut note = vec![];
    for word in [4u32, 8, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD.to_le_bytes());
    let code_at = note_at + note.len() as u64;

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD.to_le_bytes());
    file.extend((HEADER as u64).to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [HEADER as u16, SEGMENT as u16, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut segment = |kind: u32, at: u64, address: u64, length: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [at, address, address, length, length, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, code_at, LOAD, code.len() as u64);
    segment(4, note_at, 0, note.len() as u64);
    file.extend(note);
    file.extend(code);
    file
}

/// A bzImage: one boot sector, one setup sector, and the code at the 64-bit entry.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup sectors
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // protocol version
    put(0x211, &[1]); // loaded high
    put(0x214, &(LOAD as u32).to_le_bytes()); // code32_start
    put(0x236, &1u16.to_le_bytes()); // xloadflags: 64-bit entry
    put(0x258, &LOAD.to_le_bytes()); // preferred address
    put(0x260, &0x1000_u32.to_le_bytes()); // init_size
    file.resize(1024 + 0x200, 0xcc);
    file.extend(code);
    file
}
