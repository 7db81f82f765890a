//! A socket of the guest, which keeps to its credit.

use super::guest::{CID, Guest, Packet};
use crate::virtio::vsock::packet::{HOST_CID, Header, Ports, kind, op, shutdown};

/// A socket of the guest.
pub struct Socket {
    pub ports: Ports,
    /// Size of the guest's receive buffer.
    pub buffer: u32,
    /// Bytes received, and taken from the buffer at once unless [`Self::hoards`].
    pub forwarded: u32,
    pub hoards: bool,
    sent: u32,
    their_buffer: u32,
    their_forwarded: u32,
}

impl Socket {
    pub fn new(ports: Ports) -> Self {
        Self {
            ports,
            buffer: 64 * 1024,
            forwarded: 0,
            hoards: false,
            sent: 0,
            their_buffer: 0,
            their_forwarded: 0,
        }
    }

    pub fn learn(&mut self, header: &Header) {
        self.their_buffer = header.buf_alloc;
        self.their_forwarded = header.fwd_cnt;
    }

    /// How many bytes the device lets us send.
    pub fn room(&self) -> usize {
        (self.their_buffer - self.sent.wrapping_sub(self.their_forwarded)) as usize
    }

    pub fn header(&self, op: u16, flags: u32, length: usize) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.ports.peer,
            dst_port: self.ports.local,
            len: length as u32,
            kind: kind::STREAM,
            op,
            flags,
            buf_alloc: self.buffer,
            fwd_cnt: self.forwarded,
        }
    }

    pub fn send(&mut self, guest: &mut Guest, op: u16, flags: u32, data: &[u8]) {
        self.sent = self.sent.wrapping_add(data.len() as u32);
        guest.send(&self.header(op, flags, data.len()), data);
    }

    /// The next packet of this connection.
    pub fn receive(&mut self, guest: &mut Guest) -> Packet {
        let packet = guest.receive_of(self.ports);
        self.learn(&packet.header);
        if !self.hoards {
            self.forwarded = self.forwarded.wrapping_add(packet.header.len);
        }
        packet
    }

    /// Sends all of `data`, as fast as the device lets us. Returns what came meanwhile.
    pub fn send_all(&mut self, guest: &mut Guest, mut data: &[u8]) -> Vec<Packet> {
        let mut came = vec![];
        while !data.is_empty() {
            let length = self.room().min(data.len()).min(64 * 1024);
            if length == 0 {
                came.push(self.receive(guest));
                continue;
            }
            self.send(guest, op::RW, 0, &data[..length]);
            data = &data[length..];
        }
        came
    }

    /// Receives `length` bytes, giving credit for them.
    pub fn receive_bytes(&mut self, guest: &mut Guest, length: usize) -> Vec<u8> {
        let mut data = vec![];
        while data.len() < length {
            let packet = self.receive(guest);
            match packet.header.op {
                op::RW => data.extend(packet.data),
                op::CREDIT_UPDATE => continue,
                op::CREDIT_REQUEST => {}
                other => panic!("op {other} after {} bytes", data.len()),
            }
            self.send(guest, op::CREDIT_UPDATE, 0, &[]);
        }
        assert_eq!(data.len(), length);
        data
    }

    /// Receives a packet that says `op` with `flags`, after any with credit.
    pub fn expect(&mut self, guest: &mut Guest, op: u16, flags: u32) {
        loop {
            let header = self.receive(guest).header;
            if header.op != op::CREDIT_UPDATE && header.op != op::CREDIT_REQUEST {
                assert_eq!((header.op, header.flags), (op, flags));
                return;
            }
        }
    }

    /// Receives the end of both directions: at once, or one by one when the device saw them so.
    pub fn expect_close(&mut self, guest: &mut Guest) {
        let mut said = 0;
        while said != shutdown::BOTH {
            let header = self.receive(guest).header;
            assert!([op::SHUTDOWN, op::CREDIT_UPDATE].contains(&header.op));
            assert_eq!(header.flags & said, said);
            said = header.flags;
        }
    }
}
