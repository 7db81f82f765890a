//! The receiving end of sd_notify(3): a daemon tells by a datagram that it is ready.

use std::{io, os::unix::fs::PermissionsExt, path::Path};

use tokio::net::UnixDatagram;

/// A notification of interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// The daemon serves.
    Ready,
    /// It has begun to shut down.
    Stopping,
    /// What it is doing, in its words.
    Status(String),
}

/// The notifications in one datagram: lines of `NAME=value`, of which there are more names than are of interest.
pub fn parse(datagram: &[u8]) -> Vec<Notification> {
    let text = String::from_utf8_lossy(datagram);
    text.lines()
        .filter_map(|line| match line.split_once('=')? {
            ("READY", "1") => Some(Notification::Ready),
            ("STOPPING", "1") => Some(Notification::Stopping),
            ("STATUS", status) => Some(Notification::Status(status.to_owned())),
            _ => None,
        })
        .collect()
}

/// One daemon's socket.
#[derive(Debug)]
pub struct Socket(UnixDatagram);

impl Socket {
    /// Binds at `path`, in place of a former one; only root can write to it.
    ///
    /// # Errors
    /// From the system.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = UnixDatagram::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self(socket))
    }

    /// The notifications of the next datagram.
    ///
    /// # Errors
    /// From the system.
    pub async fn next(&self) -> io::Result<Vec<Notification>> {
        // Longer ones are cut by the kernel; nothing of interest is that long.
        let mut datagram = [0; 4096];
        let length = self.0.recv(&mut datagram).await?;
        Ok(parse(&datagram[..length]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_read_and_others_skipped() {
        assert_eq!(
            parse(b"STATUS=loading\nMAINPID=4\nREADY=1\nREADY=0\n\n=\nSTOPPING=1"),
            [
                Notification::Status("loading".into()),
                Notification::Ready,
                Notification::Stopping
            ]
        );
        assert_eq!(parse(b"\xff\xfe"), []);
    }

    #[tokio::test]
    async fn a_daemons_notification_arrives_and_the_socket_can_be_bound_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        drop(Socket::bind(&path).unwrap());
        let socket = Socket::bind(&path).unwrap();
        let daemon = UnixDatagram::unbound().unwrap();
        daemon.send_to(b"READY=1", &path).await.unwrap();
        assert_eq!(socket.next().await.unwrap(), [Notification::Ready]);
    }
}
