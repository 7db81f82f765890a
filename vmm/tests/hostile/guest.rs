//! A guest that does what it is told: a loop of a few instructions over a list of commands, which is part of its kernel file.

use lighter_tests::tiny_guest::Kernel;

/// Where the kernel file is loaded, and its code begins.
const LOAD: usize = 0x10_0000;
/// Where the list is, from there.
const LIST: usize = 0x100;

/// The loop, 32-bit code. Each command is a number (1 to 7 as in [`Command`], else it ends) and three words: edi, edx, ecx.
const CODE: &[&[u8]] = &[
    &[0xbe, 0x00, 0x01, 0x10, 0x00], // 00 mov esi, LOAD + LIST
    &[0xfc],                         // 05 cld
    &[0x8b, 0x06],                   // 06 next: mov eax, [esi]
    &[0x8b, 0x7e, 0x04],             // 08 mov edi, [esi + 4]
    &[0x8b, 0x56, 0x08],             // 0b mov edx, [esi + 8]
    &[0x8b, 0x4e, 0x0c],             // 0e mov ecx, [esi + 12]
    &[0x83, 0xc6, 0x10],             // 11 add esi, 16
    &[0x48, 0x74, 0x15],             // 14 dec eax; jz write32
    &[0x48, 0x74, 0x16],             // 17 dec eax; jz write16
    &[0x48, 0x74, 0x18],             // 1a dec eax; jz write8
    &[0x48, 0x74, 0x19],             // 1d dec eax; jz read32
    &[0x48, 0x74, 0x1a],             // 20 dec eax; jz copy
    &[0x48, 0x74, 0x21],             // 23 dec eax; jz wait
    &[0x48, 0x74, 0x28],             // 26 dec eax; jz tell
    &[0xf4, 0xeb, 0xfd],             // 29 end: hlt; jmp end
    &[0x89, 0x17, 0xeb, 0xd6],       // 2c write32: mov [edi], edx; jmp next
    &[0x66, 0x89, 0x17, 0xeb, 0xd1], // 30 write16: mov [edi], dx; jmp next
    &[0x88, 0x17, 0xeb, 0xcd],       // 35 write8: mov [edi], dl; jmp next
    &[0x8b, 0x07, 0xeb, 0xc9],       // 39 read32: mov eax, [edi]; jmp next
    &[0x89, 0xf3, 0x89, 0xd6],       // 3d copy: mov ebx, esi; mov esi, edx
    &[0xf3, 0xa5],                   // 41 rep movsd
    &[0x89, 0xde, 0xeb, 0xbf],       // 43 mov esi, ebx; jmp next
    &[0x66, 0x39, 0x17, 0x74, 0xba], // 47 wait: cmp [edi], dx; je next
    &[0x49, 0x75, 0xf8, 0xeb, 0xb5], // 4c dec ecx; jnz wait; jmp next
    &[0x66, 0x39, 0x0f, 0x75, 0xb0], // 51 tell: cmp [edi], cx; jne next
    &[0x89, 0xd0],                   // 56 mov eax, edx
    &[0xba, 0xf8, 0x03, 0x00, 0x00], // 58 mov edx, 0x3f8
    &[0xee, 0xeb, 0xa6],             // 5d out dx, al; jmp next
];

/// Numbers of commands.
#[derive(Clone, Copy)]
enum Command {
    Write32 = 1,
    Write16,
    Write8,
    Read32,
    Copy,
    Wait,
    Tell,
}

/// What the guest is to do.
#[derive(Default)]
pub struct Script {
    list: Vec<[u32; 4]>,
    /// What is copied, by words.
    pool: Vec<u8>,
}

impl Script {
    fn add(&mut self, command: Command, address: u32, value: u32, count: u32) {
        self.list.push([command as u32, address, value, count]);
    }

    /// Writes 32 bits.
    pub fn write(&mut self, address: u32, value: u32) {
        self.add(Command::Write32, address, value, 0);
    }

    /// Writes 16 bits.
    pub fn write16(&mut self, address: u32, value: u16) {
        self.add(Command::Write16, address, value.into(), 0);
    }

    /// Writes 8 bits.
    pub fn write8(&mut self, address: u32, value: u8) {
        self.add(Command::Write8, address, value.into(), 0);
    }

    /// Reads 32 bits, for what that does.
    pub fn read(&mut self, address: u32) {
        self.add(Command::Read32, address, 0, 0);
    }

    /// Has `bytes` at `address`, and zeros up to the next whole word.
    pub fn place(&mut self, address: u32, bytes: &[u8]) {
        let from = u32::try_from(self.pool.len()).unwrap();
        self.pool.extend(bytes);
        self.pool.resize(self.pool.len().next_multiple_of(4), 0);
        let words = bytes.len().div_ceil(4);
        self.add(Command::Copy, address, from, words.try_into().unwrap());
    }

    /// Looks `turns` times whether the 16 bits at `address` are `value`.
    pub fn wait(&mut self, address: u32, value: u16, turns: u32) {
        self.add(Command::Wait, address, value.into(), turns);
    }

    /// Writes `letter` to the console if the 16 bits at `address` are `value`.
    pub fn tell(&mut self, letter: u8, address: u32, value: u16) {
        self.add(Command::Tell, address, letter.into(), value.into());
    }

    /// Writes `letter` to the console.
    pub fn say(&mut self, letter: u8) {
        self.tell(letter, LOAD as u32, u16::from_le_bytes([CODE[0][0], CODE[0][1]]));
    }

    /// The kernel that does it, and then nothing more.
    pub fn kernel(mut self) -> Kernel {
        self.list.push([0; 4]);
        let mut file = CODE.concat();
        file.resize(LIST, 0x90);
        let pool = u32::try_from(LOAD + LIST + self.list.len() * 16).unwrap();
        for [command, address, mut value, count] in self.list {
            if command == Command::Copy as u32 {
                value += pool;
            }
            for word in [command, address, value, count] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend(self.pool);
        Kernel::Pvh(file)
    }
}
