//! The host's name servers, for what its resolver has no call for.

use lighter_protocol::names::{HEADER, framed};
use resolv_conf::{Config, ScopedIp};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// Whom the host's programs ask.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The most of them that are asked, as in resolv.conf(5).
const MAX_SERVERS: usize = 3;

/// How long one of them may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often each of them is asked.
const ROUNDS: usize = 2;

/// The host's name servers as of now.
pub fn servers() -> Vec<SocketAddr> {
    servers_of(Path::new(RESOLV_CONF))
}

fn servers_of(path: &Path) -> Vec<SocketAddr> {
    let text = std::fs::read(path).unwrap_or_default();
    let (config, _) = Config::parse_with_errors(&text);
    let address = |server: &ScopedIp| match server {
        ScopedIp::V4(address) => Some(SocketAddr::from((*address, 53))),
        ScopedIp::V6(address, None) => Some(SocketAddr::from((*address, 53))),
        // Nothing but an interface's own name or number can follow.
        ScopedIp::V6(address, Some(scope)) => {
            let index = scope.parse().ok().or_else(|| {
                let socket = rustix::net::socket(
                    rustix::net::AddressFamily::INET,
                    rustix::net::SocketType::DGRAM,
                    None,
                )
                .ok()?;
                rustix::net::netdevice::name_to_index(socket, scope).ok()
            })?;
            Some(std::net::SocketAddrV6::new(*address, 53, 0, index).into())
        }
    };
    let mut servers: Vec<_> = config.nameservers.iter().filter_map(address).collect();
    servers.truncate(MAX_SERVERS);
    if servers.is_empty() {
        // As resolv.conf(5) has it.
        servers.push(SocketAddr::from((Ipv4Addr::LOCALHOST, 53)));
    }
    servers
}

/// Asks `servers` in turn; the first answer that is one, or the last that any of them gave.
pub async fn ask(question: &[u8], servers: &[SocketAddr]) -> Option<Vec<u8>> {
    let mut refusal = None;
    for server in servers.iter().cycle().take(servers.len() * ROUNDS) {
        match timeout(PATIENCE, exchange(question, *server)).await {
            Ok(Ok(answer)) if is_answer(&answer) => return Some(answer),
            Ok(Ok(answer)) => refusal = Some(answer),
            Ok(Err(_)) | Err(_) => {}
        }
    }
    refusal
}

/// Whether the server knows, be it that there is nothing: its code is no error, or "no such name".
fn is_answer(message: &[u8]) -> bool {
    matches!(message[3] & 0xf, 0 | 3)
}

/// Asks one server, under a number of our own: the guest's own choice may be known to others.
async fn exchange(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut asked = question.to_vec();
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
    asked
        .get_mut(..2)
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(&id);
    let mut answer = by_datagram(&asked, server).await?;
    // The server had more to say than fits.
    if answer[2] & 0x02 != 0 {
        answer = by_connection(&asked, server).await?;
    }
    answer[..2].copy_from_slice(&question[..2]);
    Ok(answer)
}

async fn by_datagram(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; u16::MAX.into()];
    loop {
        let length = socket.recv(&mut answer).await?;
        if answers(&answer[..length], question) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn by_connection(question: &[u8], server: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream
        .write_all(&framed(question).ok_or(io::ErrorKind::InvalidInput)?)
        .await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    match answers(&answer, question) {
        true => Ok(answer),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Whether `message` answers `question`: it is an answer, and bears its number.
fn answers(message: &[u8], question: &[u8]) -> bool {
    message.len() >= HEADER && message[..2] == question[..2] && message[2] & 0x80 != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tokio::net::TcpListener;

    const QUESTION: [u8; HEADER] = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];

    #[test]
    fn servers_are_read_as_programs_do() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let none = servers_of(file.path());
        assert_eq!(none, ["127.0.0.1:53".parse().unwrap()]);
        write!(
            file,
            "# a comment\nsearch test\nnameserver 127.0.0.53\nnameserver 2001:db8::1\nnonsense\nnameserver fe80::1%lo\n\
             nameserver 192.0.2.1\n"
        )
        .unwrap();
        let servers = servers_of(file.path());
        assert_eq!(servers.len(), MAX_SERVERS);
        assert_eq!(servers[0], "127.0.0.53:53".parse().unwrap());
        assert_eq!(servers[1], "[2001:db8::1]:53".parse().unwrap());
        assert_eq!(servers[2], "[fe80::1%1]:53".parse().unwrap());
    }

    /// Answers every datagram and connection by `answer`, given the question.
    async fn server(answer: impl Fn(&[u8]) -> Vec<u8> + Send + Copy + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let socket = UdpSocket::bind(address).await.unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
                let mut answer = answer(&buffer[..length]);
                // One that is not meant.
                socket.send_to(&[0; HEADER], client).await.unwrap();
                if answer.len() > 512 {
                    answer.truncate(HEADER);
                    answer[2] |= 0x02;
                }
                socket.send_to(&answer, client).await.unwrap();
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut question = vec![0; stream.read_u16().await.unwrap().into()];
                stream.read_exact(&mut question).await.unwrap();
                stream
                    .write_all(&framed(&answer(&question)).unwrap())
                    .await
                    .unwrap();
            }
        });
        address
    }

    fn reply(question: &[u8], code: u8) -> Vec<u8> {
        let mut reply = question.to_vec();
        reply[2] |= 0x80;
        reply[3] = code;
        reply
    }

    #[tokio::test]
    async fn the_answer_bears_the_guests_number_and_a_long_one_comes_whole() {
        let short = server(|question| reply(question, 3)).await;
        let answer = ask(&QUESTION, &[short]).await.unwrap();
        assert_eq!((&answer[..2], answer[3]), (&QUESTION[..2], 3));
        let long = server(|question| [reply(question, 0), vec![9; 2000]].concat()).await;
        let answer = ask(&QUESTION, &[long]).await.unwrap();
        assert_eq!(answer.len(), HEADER + 2000);
        assert_eq!(answer[2] & 0x02, 0);
    }

    #[tokio::test]
    async fn a_server_that_refuses_or_is_not_there_is_passed_over() {
        let nobody = {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.local_addr().unwrap()
        };
        let refusing = server(|question| reply(question, 5)).await;
        let good = server(|question| reply(question, 0)).await;
        let answer = ask(&QUESTION, &[nobody, refusing, good]).await.unwrap();
        assert_eq!(answer[3], 0);
        assert_eq!(ask(&QUESTION, &[nobody, refusing]).await.unwrap()[3], 5);
        assert_eq!(ask(&QUESTION, &[nobody]).await, None);
    }
}
