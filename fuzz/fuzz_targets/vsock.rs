//! Packets of the guest's sockets, and programs of the host that connect, speak and go.
#![no_main]

use lighter_fuzz::{Input, device};
use lighter_vmm::virtio::vsock::{Vsock, VsockConfig};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let name = format!("lighter-fuzz-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name).expect("a name");
    let muxer = UnixListener::bind_addr(&address).expect("a socket");
    let (listener, connections) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
    .expect("sockets");
    let mut vsock = Vsock::new(VsockConfig {
        guest_cid: 3,
        muxer,
        host_ports: vec![(1024, connections)],
    })
    .expect("a device");
    let mut clients: Vec<UnixStream> = vec![];
    device::drive(&mut vsock, &mut Input::new(bytes), |input| {
        for _ in 0..input.below(4) {
            let action = input.byte();
            if action & 3 == 0 {
                let client = UnixStream::connect_addr(&address).expect("connect");
                client.set_nonblocking(true).expect("non-blocking");
                clients.push(client);
            }
            let number = usize::from(action >> 4) % clients.len().max(1);
            let Some(client) = clients.get_mut(number) else {
                continue;
            };
            // What has gone takes and says nothing.
            match action >> 2 & 3 {
                0 => drop(client.write(format!("CONNECT {}\n", input.half()).as_bytes())),
                1 => drop(client.write(input.blob())),
                2 => drop(client.read(&mut [0; 4096])),
                _ if action & 2 == 0 => drop(client.shutdown(Shutdown::Write)),
                _ => drop(clients.swap_remove(number)),
            }
        }
    });
    drop(listener);
});
