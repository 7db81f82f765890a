//! The line with which a client of the host says which port of the guest it wants: `CONNECT <port>\n`.
//!
//! A client may send the line in pieces, and data of the connection right behind it. So bytes are only looked at until the
//! line is whole, and those behind it stay in the socket.

/// Longest line, with its end; `CONNECT 4294967295\n` has 19 bytes.
pub const MAX_LINE: usize = 32;

/// What a client sent is not a [`ConnectLine`]. It is not told; the connection is closed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client did not send `CONNECT <port>`")]
pub struct NotConnect;

/// A line of which some bytes may have come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectLine {
    bytes: [u8; MAX_LINE],
    len: usize,
}

/// What more bytes did to a [`ConnectLine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All bytes belong to the line, which goes on.
    Partial,
    /// The line is whole.
    Complete {
        /// The guest's port.
        port: u32,
        /// How many of the bytes belong to the line.
        taken: usize,
    },
}

impl ConnectLine {
    /// How many bytes the line may still have, never 0 before an error.
    pub fn missing(&self) -> usize {
        MAX_LINE - self.len
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When the line is too long or says something else; the client is of no use then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Progress, NotConnect> {
        let end = bytes.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        let whole = self.len + taken;
        self.bytes
            .get_mut(self.len..whole)
            .ok_or(NotConnect)?
            .copy_from_slice(&bytes[..taken]);
        self.len = whole;
        if end.is_none() {
            return if whole == MAX_LINE {
                Err(NotConnect)
            } else {
                Ok(Progress::Partial)
            };
        }
        let port = parse(&self.bytes[..whole - 1]).ok_or(NotConnect)?;
        Ok(Progress::Complete { port, taken })
    }
}

/// The answer once the guest has accepted; `port` is the host's.
pub fn ok_line(port: u32) -> String {
    format!("OK {port}\n")
}

fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    // `parse` would take a sign.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(line: &[u8]) -> Result<Progress, NotConnect> {
        ConnectLine::default().push(line)
    }

    #[test]
    fn a_line_names_a_port() {
        let taken = 15;
        assert_eq!(
            whole(b"CONNECT 002375\nGET"),
            Ok(Progress::Complete { port: 2375, taken })
        );
        let (port, taken) = (u32::MAX, 19);
        assert_eq!(
            whole(b"CONNECT 4294967295\n\n"),
            Ok(Progress::Complete { port, taken })
        );
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT  1\n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 1 \n",
            "CONNECT 1\r\n",
            "CONNECT 4294967296\n",
            "connect 1\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT 0000000000000000000000000000000000000000001\n",
            "CONNECT 000000000000000000000000",
        ] {
            assert_eq!(whole(line.as_bytes()), Err(NotConnect), "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn a_line_may_come_in_pieces(port: u32, cuts in prop::collection::vec(1usize..8, 0..20), behind in "[a-z\n]{0,40}") {
            let text = format!("CONNECT {port}\n{behind}");
            let mut line = ConnectLine::default();
            let mut rest = text.as_bytes();
            let mut cuts = cuts.into_iter();
            let answer = loop {
                let cut = cuts.next().unwrap_or(line.missing()).min(line.missing()).min(rest.len());
                match line.push(&rest[..cut]).unwrap() {
                    Progress::Partial => rest = &rest[cut..],
                    Progress::Complete { port, taken } => break (port, &rest[taken..]),
                }
            };
            prop_assert_eq!(answer, (port, behind.as_bytes()));
        }

        #[test]
        fn no_bytes_break_it(chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10)) {
            let mut line = ConnectLine::default();
            for chunk in chunks {
                if !matches!(line.push(&chunk), Ok(Progress::Partial)) {
                    break;
                }
                prop_assert!(line.missing() > 0);
            }
        }
    }
}
