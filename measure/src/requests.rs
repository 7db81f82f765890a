//! What is measured, on one engine's socket.

use crate::http::{Body, Connection, Error as HttpError};
use crate::image::{Image, NAME};
use crate::work::{Work, since};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

/// The request that costs an engine next to nothing.
const PING: &str = "GET /_ping";

/// The longest answer but a saved image, bytes.
const SHORT: u64 = 64 << 10;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// How many requests of each kind.
    pub requests: u32,
    /// Connections at once where several make requests; each makes that many.
    pub clients: u32,
    /// What is loaded and saved.
    pub image: Image,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// Requests on one connection, nanoseconds each.
    pub kept_alive_ns: Vec<u64>,
    /// Requests each on a connection of its own, from before it is made, nanoseconds each.
    pub new_connection_ns: Vec<u64>,
    /// Requests on several connections at once.
    pub concurrent: Work,
    /// Bytes of an image into the engine.
    pub load: Work,
    /// Bytes of an image out of it.
    pub save: Work,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request.
    #[error("a request failed")]
    Request(#[source] HttpError),
    /// The engine says so.
    #[error("the engine did not load the image: it said {0:?}")]
    NotLoaded(String),
    /// It cannot be the image.
    #[error("the engine saved {saved} bytes of an image whose layer has {layer}")]
    SavedTooLittle {
        /// What came.
        saved: u64,
        /// What was in it.
        layer: u64,
    },
    /// For one of several clients.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

impl From<HttpError> for Error {
    fn from(error: HttpError) -> Self {
        Self::Request(error)
    }
}

/// Makes the requests of `plan` to the engine on `socket`. The image is gone from the engine afterwards.
///
/// # Errors
/// When one fails.
pub fn measure(socket: &Path, plan: &Plan) -> Result<Samples, Error> {
    let mut connection = Connection::open(socket)?;
    let mut kept_alive = || {
        let began = Instant::now();
        ping(&mut connection)?;
        Ok::<_, HttpError>(since(began))
    };
    // The connection's way to the engine is made with its first request.
    kept_alive()?;
    let kept_alive_ns = (0..plan.requests)
        .map(|_| kept_alive())
        .collect::<Result<_, _>>()?;
    let new_connection = |_| {
        let began = Instant::now();
        ping(&mut Connection::open(socket)?)?;
        Ok::<_, HttpError>(since(began))
    };
    let new_connection_ns = (0..plan.requests).map(new_connection).collect::<Result<_, _>>()?;
    Ok(Samples {
        kept_alive_ns,
        new_connection_ns,
        concurrent: concurrent(socket, plan)?,
        load: load(&mut Connection::open(socket)?, &plan.image)?,
        save: save(socket, &plan.image)?,
    })
}

fn ping(connection: &mut Connection) -> Result<u64, HttpError> {
    connection.request(PING, None, SHORT, &mut |_| {})
}

fn concurrent(socket: &Path, plan: &Plan) -> Result<Work, Error> {
    let open = |_| {
        let mut connection = Connection::open(socket)?;
        ping(&mut connection)?;
        Ok::<_, Error>(connection)
    };
    let connections: Vec<Connection> = (0..plan.clients).map(open).collect::<Result<_, _>>()?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let client = |mut connection: Connection| {
            let work = move || (0..plan.requests).try_for_each(|_| ping(&mut connection).map(drop));
            std::thread::Builder::new().spawn_scoped(scope, work)
        };
        let threads: Vec<_> = connections
            .into_iter()
            .map(client)
            .collect::<Result<_, _>>()
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
        amount: u64::from(plan.clients) * u64::from(plan.requests),
        ns: since(began),
    })
}

fn load(connection: &mut Connection, image: &Image) -> Result<Work, Error> {
    let write = |out: &mut dyn Write| image.write(out);
    let body = Body {
        kind: "application/x-tar",
        length: image.length(),
        write: &write,
    };
    let mut said = vec![];
    let began = Instant::now();
    connection.request("POST /images/load?quiet=1", Some(body), SHORT, &mut |bytes| {
        said.extend_from_slice(bytes);
    })?;
    let ns = since(began);
    // Failures come after the status, as messages.
    let said = String::from_utf8_lossy(&said);
    match said.contains("Loaded image") && !said.contains("errorDetail") {
        true => Ok(Work {
            amount: image.length(),
            ns,
        }),
        false => Err(Error::NotLoaded(said.trim().into())),
    }
}

fn save(socket: &Path, image: &Image) -> Result<Work, Error> {
    let mut connection = Connection::open(socket)?;
    let began = Instant::now();
    let request = format!("GET /images/{NAME}/get");
    let layer = u64::from(image.mib) << 20;
    // The engine may write names and configurations in more ways than were loaded.
    let saved = connection.request(&request, None, image.length() + (1 << 20), &mut |_| {})?;
    let ns = since(began);
    connection.request(&format!("DELETE /images/{NAME}"), None, SHORT, &mut |_| {})?;
    match saved >= layer {
        true => Ok(Work { amount: saved, ns }),
        false => Err(Error::SavedTooLittle { saved, layer }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::net::{UnixListener, UnixStream};

    /// Answers each request with what `answer` makes of its first line.
    fn serve(stream: UnixStream, answer: fn(&str) -> String) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        loop {
            let (mut first, mut length) = (String::new(), 0);
            if reader.read_line(&mut first)? == 0 {
                return Ok(());
            }
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                if let Some(value) = line.strip_prefix("Content-Length: ") {
                    length = value.trim().parse().map_err(io::Error::other)?;
                }
                if line == "\r\n" {
                    break;
                }
            }
            io::copy(&mut (&mut reader).take(length), &mut io::sink())?;
            let body = answer(first.trim_end());
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            reader.get_mut().write_all((head + &body).as_bytes())?;
        }
    }

    fn measure_with(answer: fn(&str) -> String) -> Result<Samples, Error> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("docker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        // Ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                std::thread::spawn(move || serve(stream, answer));
            }
        });
        let plan = Plan {
            requests: 3,
            clients: 2,
            image: Image {
                mib: 1,
                layer_sha256: "cafe".into(),
            },
        };
        measure(&socket, &plan)
    }

    fn good(request: &str) -> String {
        match request {
            "GET /_ping HTTP/1.1" => "OK".into(),
            "POST /images/load?quiet=1 HTTP/1.1" => r#"{"stream":"Loaded image: x"}"#.into(),
            "GET /images/lighter-bench:api/get HTTP/1.1" => "x".repeat(1 << 20),
            "DELETE /images/lighter-bench:api HTTP/1.1" => "[]".into(),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn everything_that_was_planned_is_measured() {
        let samples = measure_with(good).unwrap();
        assert_eq!(
            (samples.kept_alive_ns.len(), samples.new_connection_ns.len()),
            (3, 3)
        );
        assert_eq!((samples.concurrent.amount, samples.save.amount), (6, 1 << 20));
        assert!(samples.load.amount > 1 << 20);
        assert!(
            [samples.concurrent, samples.load, samples.save]
                .iter()
                .all(|work| work.ns > 0)
        );
    }

    #[test]
    fn an_image_that_was_not_loaded_or_not_saved_is_an_error() {
        let not_loaded = measure_with(|request| match request.starts_with("POST") {
            true => r#"{"errorDetail":{"message":"invalid diffID"}}"#.into(),
            false => good(request),
        });
        assert!(matches!(&not_loaded, Err(Error::NotLoaded(said)) if said.contains("invalid diffID")));
        let not_saved = measure_with(|request| match request.contains("/get") {
            true => "x".into(),
            false => good(request),
        });
        assert!(matches!(not_saved, Err(Error::SavedTooLittle { saved: 1, .. })));
    }
}
