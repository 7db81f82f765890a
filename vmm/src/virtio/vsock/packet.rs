//! The header that starts every packet of the socket device (section 5.10.6), as plain values.
//!
//! Nothing here judges what a guest sent: any 44 bytes are a header.

/// Length of a header in a queue's buffers.
pub const HEADER_LEN: usize = 44;

/// The host's context identifier, the same on every machine.
pub const HOST_CID: u64 = 2;

/// Socket types.
pub mod kind {
    /// A byte stream, the only type there is here.
    pub const STREAM: u16 = 1;
}

/// What a packet says.
pub mod op {
    /// Wants a connection.
    pub const REQUEST: u16 = 1;
    /// Has accepted a connection.
    pub const RESPONSE: u16 = 2;
    /// There is no (more a) connection.
    pub const RST: u16 = 3;
    /// Will not send, or not receive, any more: see [`super::shutdown`].
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Carries nothing but the credit that every packet carries.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a packet with credit.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of [`op::SHUTDOWN`], from the sender's view. Once said they stay said.
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// The two ports that identify a connection of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// The host's port.
    pub local: u32,
    /// The guest's port.
    pub peer: u32,
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of data behind the header.
    pub len: u32,
    /// Socket type, see [`kind`].
    pub kind: u16,
    /// See [`op`].
    pub op: u16,
    /// See [`shutdown`].
    pub flags: u32,
    /// Size of the sender's receive buffer, bytes.
    pub buf_alloc: u32,
    /// Bytes that have left the sender's receive buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            src_cid: u64::from_le_bytes(field(bytes, 0)),
            dst_cid: u64::from_le_bytes(field(bytes, 8)),
            src_port: u32::from_le_bytes(field(bytes, 16)),
            dst_port: u32::from_le_bytes(field(bytes, 20)),
            len: u32::from_le_bytes(field(bytes, 24)),
            kind: u16::from_le_bytes(field(bytes, 28)),
            op: u16::from_le_bytes(field(bytes, 30)),
            flags: u32::from_le_bytes(field(bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(bytes, 40)),
        }
    }

    /// Writes a header.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The connection that a packet from the guest is about.
    pub fn ports(&self) -> Ports {
        Ports {
            local: self.dst_port,
            peer: self.src_port,
        }
    }

    /// The answer to a packet that no connection wants, of the same socket type.
    pub fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// `N` bytes of a header; `at` is a constant of the caller, so that it is always in range.
fn field<const N: usize>(bytes: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let header = Header {
            src_cid: 0x0807_0605_0403_0201,
            dst_cid: 0x100f_0e0d_0c0b_0a09,
            src_port: 0x1413_1211,
            dst_port: 0x1817_1615,
            len: 0x1c1b_1a19,
            kind: 0x1e1d,
            op: 0x201f,
            flags: 0x2423_2221,
            buf_alloc: 0x2827_2625,
            fwd_cnt: 0x2c2b_2a29,
        };
        let bytes: [u8; HEADER_LEN] = std::array::from_fn(|index| u8::try_from(index + 1).unwrap());
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(Header::from_bytes(&bytes), header);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_header(bytes in any::<[[u8; 11]; 4]>()) {
            let bytes: [u8; HEADER_LEN] = bytes.concat().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }

        #[test]
        fn a_refusal_goes_back_to_where_the_packet_came_from(src in any::<u32>(), dst in any::<u32>(), kind in any::<u16>()) {
            let packet = Header { src_cid: 3, dst_cid: 2, src_port: src, dst_port: dst, kind, op: op::REQUEST, len: 9, ..Header::default() };
            let refusal = packet.refusal();
            prop_assert_eq!((refusal.src_cid, refusal.dst_cid, refusal.src_port, refusal.dst_port), (2, 3, dst, src));
            prop_assert_eq!((refusal.kind, refusal.op, refusal.len), (kind, op::RST, 0));
        }
    }
}
