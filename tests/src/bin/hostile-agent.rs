//! A program of a hostile guest: speaks to every port that the host has for its guests, and says nothing that it should. Prints `done`
//! when it has.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{FromRawFd, RawFd};

/// Those of the agent, of names and of published ports; that of commands and the engine, which are none of the host's; and one of nobody's.
const PORTS: [u32; 6] = [1024, 53, 1026, 1025, 2375, 9];

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const HOST: u32 = 2;

/// `struct sockaddr_vm`, vsock(7).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> RawFd;
    fn connect(socket: RawFd, address: *const Address, length: u32) -> i32;
}

fn connected(port: u32) -> io::Result<File> {
    let address = Address {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid: HOST,
        zero: [0; 4],
    };
    // SAFETY: the address is valid for reading, of that length; the descriptor is new, and given to the file alone.
    unsafe {
        let fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = File::from_raw_fd(fd);
        match connect(fd, &address, size_of::<Address>() as u32) {
            0 => Ok(file),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A frame of the agent's protocol.
fn frame(text: &str) -> Vec<u8> {
    let length = (text.len() as u32).to_be_bytes();
    [&length[..], &[0], text.as_bytes()].concat()
}

const HELLO: &str = r#"{"type":"hello","protocol":1,"version":"\u001b]0;x"}"#;

/// What is sent, and how often.
fn speeches() -> Vec<(Vec<u8>, usize)> {
    let deep = "[".repeat(100_000);
    let long = format!(r#"{{"type":"log","text":"{}"}}"#, "x".repeat(1_000_000));
    vec![
        (vec![], 1),
        (vec![0], 1),
        (vec![0xff; 5], 1),
        (vec![0, 0x10, 0, 0, 0], 1),
        (vec![b'a'; 1 << 16], 40),
        (vec![0; 1 << 16], 40),
        (frame(&deep), 4),
        (frame(&long), 4),
        (frame(r#"{"type":"nothing"}"#).repeat(100), 10),
        (frame(r#"{"type":"hello","protocol":77,"version":"old"}"#), 2),
        (frame(HELLO), 100),
        (b"CONNECT 1\n".repeat(1000), 10),
    ]
}

fn main() -> io::Result<()> {
    let mut held = vec![];
    let mut refused = 0;
    for port in PORTS {
        for (speech, times) in speeches() {
            // Whoever hangs up on us has understood us well.
            let Ok(mut client) = connected(port) else {
                refused += 1;
                continue;
            };
            let _ = (0..times).try_for_each(|_| client.write_all(&speech));
        }
        // Beginnings of messages, all at once, of which none goes on.
        for _ in 0..100 {
            let Ok(mut client) = connected(port) else {
                refused += 1;
                break;
            };
            let _ = client.write_all(&[0, 0x0f, 0xff, 0xff, 0]);
            let _ = client.write_all(&[b' '; 60_000]);
            held.push(client);
        }
    }
    // Questions, to whose answers nobody listens: at some point the host takes no more of them, and that is for us to bear.
    let mut client = connected(PORTS[0])?;
    let questions = [
        frame(r#"{"type":"time-request","id":7}"#),
        frame(r#"{"type":"file-watches","changes":[],"round":9}"#),
    ];
    let many = questions.concat().repeat(1000);
    let (asked, over) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = client.write_all(&frame(HELLO));
        let _ = (0..200).try_for_each(|_| client.write_all(&many));
        let _ = asked.send(client);
    });
    let answered = over.recv_timeout(std::time::Duration::from_secs(5)).is_ok();
    writeln!(
        io::stdout(),
        "{} held, {refused} refused, all questions taken: {answered}\ndone",
        held.len()
    )?;
    Ok(())
}
