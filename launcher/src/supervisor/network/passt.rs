//! passt, a program of the host's that turns Ethernet frames into ordinary sockets of the user who runs it. It ends with the monitor,
//! whose end of the frames' socket it holds the other of.

use super::routes::DefaultRoutes;
use crate::die_with_parent::die_with_parent;
use crate::doctor::find_program;
use crate::error::{Context, Result, say};
use crate::logs::printable;
use crate::supervisor::lines::Lines;
use command_fds::{CommandFdExt, FdMapping};
use lighter_protocol::network::{GATEWAY, GuestNetwork};
use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Signal;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};

/// A locally administered address; each guest is alone on its network.
pub const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x02];

/// The largest packet, bytes. passt takes large ones, which are cheaper than many.
pub const MTU: u16 = 65_520;

/// The socket's number in passt.
pub const FD: i32 = 3;

/// What passt may send ahead of the guest, bytes.
const SEND_BUFFER: usize = 4 << 20;

/// The longest line of passt's that is kept whole, bytes.
const MAX_LINE: usize = 8 << 10;

/// What passt is started with.
#[derive(Debug)]
pub struct Passt {
    program: PathBuf,
    socket: OwnedFd,
    host_access: bool,
}

impl Passt {
    /// Waits until the guest has sent something, which stays in the socket. So it does when the guest's end is closed.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub async fn wanted(&self) -> Result<()> {
        let failed = || "cannot watch the socket of the network".to_owned();
        // SAFETY: the descriptor is borrowed, and so stays open and the same until the registration is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(self.socket.as_fd(), Interest::READABLE) };
        let socket = socket.map_err(io::Error::from).context(failed)?;
        socket.readable().await.map(drop).context(failed)
    }
}

/// Why a VM goes without a network: no fault, but to be told.
type Absence = &'static str;

/// The monitor's end of the network, and the passt that is to have the other; or why the VM has to do without. With `host_access`
/// the guest reaches the services that listen on the host's loopback interface.
///
/// # Errors
/// When there is no socket to give.
pub fn prepare(host_access: bool) -> Result<std::result::Result<(OwnedFd, Passt), Absence>> {
    let program = match program() {
        Ok(program) => program,
        Err(absence) => return Ok(Err(absence)),
    };
    let (stream, socket) = sockets()?;
    let passt = Passt {
        program,
        socket,
        host_access,
    };
    Ok(Ok((stream, passt)))
}

/// The program, on a host with a network.
///
/// # Errors
/// What is missing.
pub fn program() -> std::result::Result<PathBuf, Absence> {
    let program = find_program("passt")
        .ok_or("passt is not installed (Debian, Ubuntu, Fedora: package passt); the guest has no network")?;
    match DefaultRoutes::of_host().any() {
        true => Ok(program),
        false => Err("this host has no default route; the guest has no network"),
    }
}

/// The two ends of a socket that passt can have one of.
///
/// # Errors
/// When there are none.
pub fn sockets() -> Result<(OwnedFd, OwnedFd)> {
    let kind = SocketType::STREAM;
    let (stream, socket) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .context(|| "cannot make a socket pair for the network".into())?;
    // What does not fit is lost, and passt notices that late. The host's limit (net.core.wmem_max) may be lower.
    let _ = set_socket_send_buffer_size(&socket, SEND_BUFFER);
    Ok((stream, socket))
}

/// Starts passt. The guest needs it long after the monitor, so it is the second to be started. Call it from the main thread, as
/// `monitor::start`.
///
/// # Errors
/// When the program cannot be started.
pub fn start(passt: Passt) -> Result<Child> {
    let Passt {
        program,
        socket,
        host_access,
    } = passt;
    let failed = || format!("cannot start {}", program.display());
    let mut command = std::process::Command::new(&program);
    command
        // Published ports are the supervisor's business.
        .args(arguments(host_access, "none"))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mapping = FdMapping {
        parent_fd: socket,
        child_fd: FD,
    };
    command.fd_mappings(vec![mapping]).context(failed)?;
    die_with_parent(&mut command);
    Command::from(command).kill_on_drop(true).spawn().context(failed)
}

/// What passt is told. `tcp_ports` are the host's ports that it passes on to the guest, as it takes them.
pub fn arguments(host_access: bool, tcp_ports: &str) -> Vec<String> {
    let mut arguments: Vec<String> = ["--foreground", "--quiet", "--no-dhcp", "--no-dhcpv6"]
        .map(Into::into)
        .into();
    // Unless told so, it takes what is sent to the gateway for the host's.
    if !host_access {
        arguments.push("--no-map-gw".into());
    }
    for address in GuestNetwork::of_passt().addresses {
        arguments.extend(["--address".into(), address.ip.to_string()]);
        arguments.extend(["--netmask".into(), address.prefix.to_string()]);
    }
    for (name, value) in [
        ("--fd", FD.to_string()),
        ("--gateway", GATEWAY.to_string()),
        ("--mtu", MTU.to_string()),
        ("--tcp-ports", tcp_ports.into()),
        ("--udp-ports", "none".into()),
    ] {
        arguments.extend([name.into(), value]);
    }
    arguments
}

/// Waits for the end of passt, passing on its words; says how it ended.
pub async fn watch(mut child: Child) -> String {
    let mut last = None;
    if let Some(stderr) = child.stderr.take() {
        let mut lines = Lines::new(stderr, MAX_LINE);
        while let Ok(Some(line)) = lines.next().await {
            let line = printable(&line);
            say(format_args!("lighter: passt: {line}"));
            last = Some(line);
        }
    }
    let end = match child.wait().await {
        // It had no time to say why.
        Ok(status) if status.signal() == Some(Signal::KILL.as_raw()) => {
            return "passt was killed (SIGKILL)".into();
        }
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    match last {
        Some(line) => format!("passt ended ({end}): {line}"),
        None => format!("passt ended ({end})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn it_is_wanted_when_the_guest_has_sent_something() {
        let (stream, socket) = sockets().unwrap();
        let passt = Passt {
            program: "passt".into(),
            socket,
            host_access: false,
        };
        let wanted = passt.wanted();
        tokio::pin!(wanted);
        assert!(timeout(Duration::from_millis(50), &mut wanted).await.is_err());
        UnixStream::from(stream).write_all(b"a frame").unwrap();
        wanted.await.unwrap();
        assert_eq!(
            rustix::io::ioctl_fionread(&passt.socket).unwrap(),
            7,
            "it stays there"
        );
    }
}
