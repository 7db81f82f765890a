//! What `lighter bench net` does between two programs: a client that measures, and a server for it, on any two machines.
//!
//! A client sends requests of nine bytes, a kind and an amount, on any of its connections, one after another.

use crate::work::{Work, since};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Bytes moved by one read or write.
const PIECE: usize = 128 << 10;

/// The longest silence of the other end: it hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Connections that the server serves at once; the other end may be a hostile guest.
const MAX_CLIENTS: usize = 64;

/// A byte comes back for each byte sent.
const ECHO: u8 = 0;

/// The client sends; a byte comes back for all of it.
const UPLOAD: u8 = 1;

/// The server sends.
const DOWNLOAD: u8 = 2;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Where the server is.
    pub server: SocketAddr,
    /// Bytes back and forth, one by one, on one connection.
    pub round_trips: u32,
    /// Connections one after another, each for a byte back and forth.
    pub connections: u32,
    /// Clients that make connections at once, each as many.
    pub clients: u32,
    /// MiB sent, and received.
    pub mib: u32,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// A byte back and forth on one connection, nanoseconds each.
    pub round_trip_ns: Vec<u64>,
    /// A connection made, and a byte back and forth, nanoseconds each.
    pub connection_ns: Vec<u64>,
    /// Such connections by several clients at once.
    pub concurrent: Work,
    /// Bytes to the server.
    pub upload: Work,
    /// Bytes from the server.
    pub download: Work,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers.
    #[error("cannot connect to {0}")]
    Connect(SocketAddr, #[source] io::Error),
    /// The connection broke.
    #[error("cannot {what} {server}")]
    Exchange {
        /// What was being done.
        what: &'static str,
        /// With whom.
        server: SocketAddr,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// For one of several clients.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// For a server.
    #[error("cannot listen on {0}")]
    Listen(SocketAddr, #[source] io::Error),
}

/// Measures by `plan`, with a server that [`serve`]s.
///
/// # Errors
/// When a connection fails.
pub fn measure(plan: &Plan) -> Result<Samples, Error> {
    let mut one = Client::connect(plan.server)?;
    let mut round_trip = || {
        let began = Instant::now();
        one.round_trip()?;
        Ok::<_, Error>(since(began))
    };
    // What is set up for the first is not to be measured.
    round_trip()?;
    let round_trip_ns = (0..plan.round_trips)
        .map(|_| round_trip())
        .collect::<Result<_, _>>()?;
    let connection = || {
        let began = Instant::now();
        Client::connect(plan.server)?.round_trip()?;
        Ok::<_, Error>(since(began))
    };
    let connection_ns = (0..plan.connections)
        .map(|_| connection())
        .collect::<Result<_, _>>()?;
    let bytes = u64::from(plan.mib) << 20;
    Ok(Samples {
        round_trip_ns,
        connection_ns,
        concurrent: concurrent(plan, &connection)?,
        upload: one.upload(bytes)?,
        download: one.download(bytes)?,
    })
}

fn concurrent(plan: &Plan, connection: &(impl Fn() -> Result<u64, Error> + Sync)) -> Result<Work, Error> {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let client = || (0..plan.connections).try_for_each(|_| connection().map(drop));
        let threads = (0..plan.clients)
            .map(|_| std::thread::Builder::new().spawn_scoped(scope, client))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::Thread)?;
        for thread in threads {
            match thread.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok::<_, Error>(())
    })?;
    Ok(Work {
        amount: u64::from(plan.clients) * u64::from(plan.connections),
        ns: since(began),
    })
}

/// One connection of the client's.
struct Client {
    server: SocketAddr,
    stream: TcpStream,
}

impl Client {
    fn connect(server: SocketAddr) -> Result<Self, Error> {
        TcpStream::connect_timeout(&server, PATIENCE)
            .and_then(|stream| prepared(&stream).map(|()| Self { server, stream }))
            .map_err(|error| Error::Connect(server, error))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let server = self.server;
        move |source| Error::Exchange { what, server, source }
    }

    fn round_trip(&mut self) -> Result<(), Error> {
        let mut message = request(ECHO, 1).to_vec();
        message.push(0);
        let stream = &mut self.stream;
        let exchanged = stream
            .write_all(&message)
            .and_then(|()| stream.read_exact(&mut [0]));
        exchanged.map_err(self.failed("exchange a byte with"))
    }

    fn upload(&mut self, bytes: u64) -> Result<Work, Error> {
        let began = Instant::now();
        let stream = &mut self.stream;
        let sent = stream
            .write_all(&request(UPLOAD, bytes))
            .and_then(|()| send(stream, bytes))
            .and_then(|()| stream.read_exact(&mut [0]));
        sent.map_err(self.failed("send to"))?;
        Ok(Work {
            amount: bytes,
            ns: since(began),
        })
    }

    fn download(&mut self, bytes: u64) -> Result<Work, Error> {
        let began = Instant::now();
        let stream = &mut self.stream;
        let received = stream
            .write_all(&request(DOWNLOAD, bytes))
            .and_then(|()| receive(stream, bytes));
        received.map_err(self.failed("receive from"))?;
        Ok(Work {
            amount: bytes,
            ns: since(began),
        })
    }
}

fn request(kind: u8, amount: u64) -> [u8; 9] {
    let mut request = [kind; 9];
    request[1..].copy_from_slice(&amount.to_le_bytes());
    request
}

fn prepared(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn send(stream: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let piece = vec![0x5a; PIECE];
    while left > 0 {
        let length = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
        stream.write_all(&piece[..length])?;
        left -= length as u64;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, mut left: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let length = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
        match stream.read(&mut piece[..length])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => left -= count as u64,
        }
    }
    Ok(())
}

/// Listens at `address` for [`serve`].
///
/// # Errors
/// When it is taken.
pub fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).map_err(|error| Error::Listen(address, error))
}

/// Serves every client of `listener`, each in a thread of its own; more than [`MAX_CLIENTS`] at once are turned away. Returns
/// when the listener is of no use any more.
pub fn serve(listener: &TcpListener) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            // Of one client that is gone already.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(_) => return,
        };
        if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
            clients.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let place = Place(clients.clone());
        // Without a thread the client sees the end of its connection.
        let _ = std::thread::Builder::new().spawn(move || {
            let _place = place;
            answer(stream)
        });
    }
}

/// One of the clients that are served.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers requests until the client has ended, or sends nonsense.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    prepared(&stream)?;
    let mut request = [0; 9];
    loop {
        stream.read_exact(&mut request)?;
        let [kind, amount @ ..] = request;
        let amount = u64::from_le_bytes(amount);
        match kind {
            ECHO => {
                for _ in 0..amount {
                    let mut byte = [0];
                    stream.read_exact(&mut byte)?;
                    stream.write_all(&byte)?;
                }
            }
            UPLOAD => {
                receive(&mut stream, amount)?;
                stream.write_all(&[0])?;
            }
            DOWNLOAD => send(&mut stream, amount)?,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> SocketAddr {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        // Ends with the process.
        std::thread::spawn(move || serve(&listener));
        address
    }

    #[test]
    fn everything_that_was_planned_is_measured() {
        let plan = Plan {
            server: server(),
            round_trips: 5,
            connections: 4,
            clients: 3,
            mib: 3,
        };
        let samples = measure(&plan).unwrap();
        assert_eq!((samples.round_trip_ns.len(), samples.connection_ns.len()), (5, 4));
        assert_eq!(samples.concurrent.amount, 12);
        assert!(
            [samples.upload, samples.download]
                .iter()
                .all(|work| work.amount == 3 << 20 && work.ns > 0)
        );
    }

    #[test]
    fn nonsense_ends_the_connection_and_nothing_else() {
        let address = server();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&request(9, 1)).unwrap();
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
        Client::connect(address).unwrap().round_trip().unwrap();
    }

    #[test]
    fn clients_beyond_the_limit_are_turned_away_and_others_served_afterwards() {
        let address = server();
        let mut clients: Vec<Client> = (0..MAX_CLIENTS)
            .map(|_| Client::connect(address).unwrap())
            .collect();
        for client in &mut clients {
            client.round_trip().unwrap();
        }
        assert!(Client::connect(address).unwrap().round_trip().is_err());
        drop(clients);
        let began = Instant::now();
        while Client::connect(address).unwrap().round_trip().is_err() {
            assert!(began.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
    }

    #[test]
    fn who_does_not_answer_is_named() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let plan = Plan {
            server: nobody,
            round_trips: 1,
            connections: 1,
            clients: 1,
            mib: 1,
        };
        let error = measure(&plan).unwrap_err();
        assert!(error.to_string().contains(&nobody.to_string()), "{error}");
    }
}
