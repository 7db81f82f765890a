//! Bytes that a fuzzer made up, read one after another. Behind their end are zeros.

/// The bytes that are left.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of them.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next ones, up to `most`.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, left) = self.0.split_at(most.min(self.0.len()));
        self.0 = left;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.take(N);
        std::array::from_fn(|at| taken.get(at).copied().unwrap_or(0))
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Less than `end`, which is no more than 256.
    pub fn below(&mut self, end: u16) -> u16 {
        u16::from(self.byte()) % end
    }

    /// The next two.
    pub fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// The next four.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight.
    pub fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// As many as the next two say.
    pub fn blob(&mut self) -> &'a [u8] {
        let length = self.half();
        self.take(length.into())
    }
}
