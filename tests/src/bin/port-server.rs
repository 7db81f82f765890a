//! What listens in the containers of the tests of published ports; prints `listening` when it does.
//!
//! | port | |
//! |---|---|
//! | 7/tcp, 7/udp | returns what it gets |
//! | 9/tcp | reads to the end, then answers with the number of bytes, and whether they were those of [`pattern`] |
//! | 19/tcp | reads one line, a number, and sends as many bytes of [`pattern`] |
//!
//! With the word `cat` it returns its standard input and ends; with `spin` it only takes processor time.

#[path = "../pattern.rs"]
mod pattern;

use pattern::Pattern;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread;

type Serve = fn(TcpStream) -> io::Result<()>;

fn main() -> io::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("cat") => return io::copy(&mut io::stdin(), &mut io::stdout()).map(drop),
        Some("spin") => loop {
            std::hint::spin_loop();
        },
        _ => {}
    }
    let (failures, failure) = mpsc::channel();
    let services: [(u16, Serve); 3] = [(7, echo), (9, check), (19, send)];
    for (port, serve) in services {
        let listener = TcpListener::bind(("0.0.0.0", port))?;
        let failures = failures.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                match client {
                    // A client that breaks off has its reasons.
                    Ok(client) => drop(thread::spawn(move || serve(client))),
                    Err(error) => drop(failures.send(error)),
                }
            }
        });
    }
    let socket = UdpSocket::bind("0.0.0.0:7")?;
    thread::spawn(move || failures.send(echo_datagrams(&socket)));
    io::stdout().write_all(b"listening\n")?;
    Err(failure
        .recv()
        .unwrap_or_else(|_| io::ErrorKind::BrokenPipe.into()))
}

fn echo(mut client: TcpStream) -> io::Result<()> {
    let mut writer = client.try_clone()?;
    io::copy(&mut client, &mut writer)?;
    Ok(())
}

fn echo_datagrams(socket: &UdpSocket) -> io::Error {
    let mut buffer = vec![0; 65_536];
    loop {
        let received = socket.recv_from(&mut buffer);
        let sent = received.and_then(|(length, client)| socket.send_to(&buffer[..length], client));
        if let Err(error) = sent {
            return error;
        }
    }
}

fn check(mut client: TcpStream) -> io::Result<()> {
    let (mut total, mut is_right) = (0, true);
    let mut pattern = Pattern::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let length = client.read(&mut buffer)?;
        if length == 0 {
            return client.write_all(format!("{total} {is_right}").as_bytes());
        }
        total += length;
        is_right = is_right && pattern.goes_on_with(&buffer[..length]);
    }
}

fn send(mut client: TcpStream) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(&mut client).read_line(&mut line)?;
    let mut left: usize = line.trim().parse().map_err(io::Error::other)?;
    let mut pattern = Pattern::new();
    while left > 0 {
        let piece = pattern.next(left);
        client.write_all(piece)?;
        left -= piece.len();
    }
    Ok(())
}
