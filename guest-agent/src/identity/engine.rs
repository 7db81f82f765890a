//! What the engine has written down of itself: its ID, and the swarm that it is a member of.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use lighter_measure::http::{self, Connection};

use crate::{docker_port::ENGINE_SOCKET, random_id};

/// dockerd reads its ID when it starts.
const ID: &str = "/var/lib/docker/engine-id";

/// There for as long as the engine is a member of a swarm.
const SWARM: &str = "/var/lib/docker/swarm/docker-state.json";

/// How long the engine may be silent while it leaves a swarm.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is read of its answer, bytes.
const MAX_ANSWER: u64 = 4096;

/// Why the engine is who it was.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No new ID.
    #[error(transparent)]
    Random(#[from] random_id::Error),
    /// A file.
    #[error("cannot write the engine's ID to {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
    /// It left, which is to be told.
    #[error(
        "the engine was a member of a swarm, which it and the VM that it is a copy of cannot both be: it has left the swarm, \
         and what the swarm ran on it is gone"
    )]
    LeftSwarm,
    /// It did not.
    #[error(
        "the engine is a member of a swarm, as is the VM that it is a copy of, and cannot leave it: run docker swarm leave \
         --force before anything else"
    )]
    Swarm(#[source] http::Error),
}

/// Writes a new ID for the next dockerd. One that runs keeps its own.
///
/// # Errors
/// When it cannot be written.
pub fn renew_id() -> Result<(), Error> {
    renew_id_at(Path::new(ID))
}

fn renew_id_at(path: &Path) -> Result<(), Error> {
    // An engine that has not got so far makes one when it starts.
    if !path.exists() {
        return Ok(());
    }
    random_id::write_over(path, &random_id::uuid()?).map_err(|error| Error::Write(path.into(), error))
}

/// Has the engine leave its swarm, if it is in one.
///
/// # Errors
/// Whether it could or not: either is to be told.
pub fn leave_swarm() -> Result<(), Error> {
    leave_swarm_at(Path::new(SWARM), Path::new(ENGINE_SOCKET))
}

fn leave_swarm_at(state: &Path, socket: &Path) -> Result<(), Error> {
    if !state.exists() {
        return Ok(());
    }
    let left = Connection::open_for(socket, PATIENCE).and_then(|mut engine| {
        engine.request(
            "POST /swarm/leave?force=true",
            None,
            MAX_ANSWER,
            &mut |_: &[u8]| {},
        )
    });
    match left {
        Ok(_) => Err(Error::LeftSwarm),
        Err(error) => Err(Error::Swarm(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read, Write},
        os::unix::net::UnixListener,
    };

    use super::*;

    #[test]
    fn an_engine_that_has_an_id_gets_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("engine-id");
        renew_id_at(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "old").unwrap();
        renew_id_at(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().len(), 36);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_member_of_a_swarm_leaves_and_that_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (state, socket) = (folder.path().join("state"), folder.path().join("docker.sock"));
        leave_swarm_at(&state, &socket).unwrap();
        fs::write(&state, "{}").unwrap();
        assert!(matches!(leave_swarm_at(&state, &socket), Err(Error::Swarm(_))));
        let listener = UnixListener::bind(&socket).unwrap();
        let engine = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut request = [0; 28];
            client.read_exact(&mut request).unwrap();
            client
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                .unwrap();
            request
        });
        assert!(matches!(leave_swarm_at(&state, &socket), Err(Error::LeftSwarm)));
        assert_eq!(&engine.join().unwrap(), b"POST /swarm/leave?force=true");
    }
}
