//! Packets, of a guest and of the program that carries them.
#![no_main]

use lighter_fuzz::{Input, device};
use lighter_protocol::monitor::NetKind;
use lighter_vmm::virtio::net::{Net, NetConfig};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (mut outside, plug) = UnixStream::pair().expect("sockets");
    outside.set_nonblocking(true).expect("non-blocking");
    let mut net = Net::new(NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        kind: NetKind::Stream,
        plug: Some(plug.into()),
    })
    .expect("a device");
    device::drive(&mut net, &mut Input::new(bytes), |input| {
        // Whole frames, or anything.
        let frame = input.blob();
        let said = match input.byte() {
            0 => frame.to_vec(),
            _ => [&(frame.len() as u32).to_be_bytes(), frame].concat(),
        };
        // A device that has closed it takes none.
        let _ = outside.write(&said);
        let mut sent = [0; 4096];
        while outside.read(&mut sent).is_ok_and(|count| count > 0) {}
    });
});
