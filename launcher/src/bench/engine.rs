//! What `docker run` of a static program does, by the Engine's API.

use crate::clock::monotonic_ns;
use crate::error::{Code, Error, Result};
use crate::logs::printable;
use lighter_measure::http::{self, Body, Connection};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Instant;

/// The longest answer that is read, bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// An engine that answers, until a deadline.
#[derive(Clone, Copy, Debug)]
pub struct Engine<'a> {
    /// Its socket.
    pub socket: &'a Path,
    /// When it has to have answered.
    pub deadline: Instant,
}

/// A container that runs, and has said what was expected.
#[derive(Debug)]
pub struct Started {
    /// Its id.
    pub id: String,
    /// Its image is in the engine, CLOCK_MONOTONIC, nanoseconds.
    pub image_loaded_ns: u64,
    /// Its first byte is here.
    pub first_byte_ns: u64,
}

impl Engine<'_> {
    /// Imports `archive` as `image`, then creates, attaches to and starts a container of it by `config`, and waits until it has
    /// written `says`.
    ///
    /// # Errors
    /// When the engine refuses, or the time is over.
    pub fn run(&self, image: &str, archive: &[u8], config: Value, says: &[u8]) -> Result<Started> {
        let import = format!("POST /images/create?fromSrc=-&repo={image}&tag=latest");
        self.ask(&import, "application/x-tar", archive)?;
        let image_loaded_ns = monotonic_ns();
        let mut wanted = config;
        wanted["Image"] = json!(image);
        let created = self.ask(
            "POST /containers/create",
            "application/json",
            wanted.to_string().as_bytes(),
        )?;
        let id = match &created["Id"] {
            Value::String(id) if id.bytes().all(|byte| byte.is_ascii_alphanumeric()) => id.clone(),
            _ => {
                return Err(Error::failure(
                    "the engine created a container and does not tell its id",
                ));
            }
        };
        let attach = format!("POST /containers/{id}/attach?stream=1&stdout=1&stderr=1");
        let attached = self.connect().and_then(|connection| connection.upgrade(&attach));
        let mut output = attached.map_err(|error| self.failed(error))?;
        self.ask(&format!("POST /containers/{id}/start"), "application/json", b"")?;
        // A header of eight bytes comes before what the container writes.
        let mut first = vec![0; 8 + says.len()];
        let read = output.read_exact(&mut first);
        let first_byte_ns = monotonic_ns();
        read.map_err(|error| self.failed(http::Error::Receive(attach, error)))?;
        if first[8..] != *says {
            let said = printable(&String::from_utf8_lossy(&first[8..]));
            let says = printable(&String::from_utf8_lossy(says));
            return Err(Error::failure(format!(
                "the container of {image} wrote {said:?} and not {says:?}"
            )));
        }
        Ok(Started {
            id,
            image_loaded_ns,
            first_byte_ns,
        })
    }

    fn connect(&self) -> std::result::Result<Connection, http::Error> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(http::Error::Connect(
                self.socket.into(),
                io::ErrorKind::TimedOut.into(),
            ));
        }
        Connection::open_for(self.socket, left)
    }

    fn failed(&self, error: http::Error) -> Error {
        use http::Error::{Connect, Receive, Send};
        let is_late =
            |error: &io::Error| matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        let code = match &error {
            Connect(_, error) | Send(_, error) | Receive(_, error) if is_late(error) => Code::Timeout,
            _ => Code::Failure,
        };
        let error = Error::of(code, &error);
        Error {
            message: format!(
                "cannot run a container at {}: {}",
                self.socket.display(),
                error.message
            ),
            ..error
        }
    }

    /// Asks, and returns the answer, [`Value::Null`] when it is not JSON.
    ///
    /// # Errors
    /// When the engine refuses, or the time is over.
    pub fn ask(&self, request: &str, kind: &str, body: &[u8]) -> Result<Value> {
        let write = |out: &mut dyn Write| out.write_all(body);
        let length = body.len() as u64;
        let mut said = vec![];
        let mut keep = |bytes: &[u8]| said.extend_from_slice(bytes);
        let asked = self.connect().and_then(|mut connection| {
            let body = Body {
                kind,
                length,
                write: &write,
            };
            connection.request(request, Some(body), MAX_ANSWER, &mut keep)
        });
        asked.map_err(|error| self.failed(error))?;
        let text = String::from_utf8_lossy(&said);
        // A failed import is told in the last of several lines, with a status that was good.
        let last = text.lines().last().unwrap_or_default();
        let value: Value = serde_json::from_str(last).unwrap_or_default();
        match value["error"].as_str() {
            Some(error) => Err(Error::failure(format!(
                "the engine refused {request}: {}",
                printable(error)
            ))),
            None => Ok(value),
        }
    }
}
