//! Bytes that both ends of a transfer know, so that each can check them as they come.

/// Bytes without a shorter period.
const PERIOD: usize = 1 << 20;

/// An endless stream of known bytes.
pub struct Pattern {
    bytes: Vec<u8>,
    at: usize,
}

impl Pattern {
    /// From its beginning.
    pub fn new() -> Self {
        let mut state = 1u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        Self {
            bytes: (0..PERIOD).map(next).collect(),
            at: 0,
        }
    }

    /// The next bytes, at least one and at most `most`.
    pub fn next(&mut self, most: usize) -> &[u8] {
        let begin = self.at % PERIOD;
        let length = most.min(PERIOD - begin);
        self.at += length;
        &self.bytes[begin..begin + length]
    }

    /// Whether `bytes` are the next ones.
    pub fn goes_on_with(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let expected = self.next(bytes.len());
            let (first, rest) = bytes.split_at(expected.len());
            if first != expected {
                return false;
            }
            bytes = rest;
        }
        true
    }
}

impl Default for Pattern {
    fn default() -> Self {
        Self::new()
    }
}
