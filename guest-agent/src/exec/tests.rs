use std::os::unix::fs::PermissionsExt;

use lighter_protocol::exec::{Command, ExitStatus, FailureKind, WindowSize};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

use crate::process::PATH;

use super::*;

struct Client {
    reader: FrameReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    session: JoinHandle<Result<(), Error>>,
}

/// What a command did.
#[derive(Debug, Default)]
struct Result_ {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    last: Option<ExecReply>,
}

impl Client {
    async fn start(command: Command) -> Self {
        let (client, server) = UnixStream::pair().unwrap();
        let session = tokio::spawn(serve(server));
        let (reader, writer) = client.into_split();
        let mut client = Self {
            reader: FrameReader::new(reader),
            writer,
            session,
        };
        client.request(&ExecRequest::Start(command)).await;
        client
    }

    async fn request(&mut self, request: &ExecRequest) {
        self.writer
            .write_all(&encode_message(request).unwrap())
            .await
            .unwrap();
    }

    async fn stdin(&mut self, bytes: &[u8]) {
        self.writer
            .write_all(&encode(Channel::Stdin, bytes).unwrap())
            .await
            .unwrap();
    }

    async fn started(&mut self) -> u32 {
        match self.reader.next().await.unwrap().unwrap().message().unwrap() {
            ExecReply::Started { pid } => pid,
            other => panic!("{other:?}"),
        }
    }

    /// Reads output until it contains `text`.
    async fn output_with(&mut self, text: &str) -> String {
        let mut output = String::new();
        while !output.contains(text) {
            let frame = self.reader.next().await.unwrap().unwrap();
            assert_eq!(frame.channel, Channel::Stdout, "before {text:?} in {output:?}");
            output.push_str(&String::from_utf8_lossy(&frame.payload));
        }
        output
    }

    async fn finish(mut self) -> Result_ {
        let mut result = Result_::default();
        while let Some(frame) = self.reader.next().await.unwrap() {
            assert!(
                !matches!(result.last, Some(ExecReply::Exited(_))),
                "something came after the end"
            );
            match frame.channel {
                Channel::Stdout => result.stdout.extend(frame.payload),
                Channel::Stderr => result.stderr.extend(frame.payload),
                _ => result.last = Some(frame.message().unwrap()),
            }
        }
        // As a client does once it has the last reply.
        drop(self.writer);
        self.session.await.unwrap().unwrap();
        result
    }
}

fn command(argv: &[&str]) -> Command {
    Command {
        argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
        env: vec![],
        working_dir: None,
        terminal: None,
    }
}

fn shell(script: &str) -> Command {
    command(&["sh", "-c", script])
}

fn on_terminal(script: &str) -> Command {
    Command {
        terminal: Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
        ..shell(script)
    }
}

fn exited(code: i32) -> Option<ExecReply> {
    Some(ExecReply::Exited(ExitStatus::Code(code)))
}

async fn failure(command: Command) -> (FailureKind, String) {
    match Client::start(command).await.finish().await.last {
        Some(ExecReply::Failed { kind, message }) => (kind, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn input_comes_back_whole_and_ends_when_told() {
    let mut client = Client::start(command(&["cat"])).await;
    client.started().await;
    let bytes: Vec<u8> = (0..200_000u32).flat_map(u32::to_be_bytes).collect();
    let (reader, writer) = (&mut client.reader, &mut client.writer);
    let sending = async {
        for piece in bytes.chunks(50_000) {
            writer
                .write_all(&encode(Channel::Stdin, piece).unwrap())
                .await
                .unwrap();
        }
        writer
            .write_all(&encode(Channel::Stdin, b"").unwrap())
            .await
            .unwrap();
    };
    let receiving = async {
        let mut got = vec![];
        while got.len() < bytes.len() {
            got.extend(reader.next().await.unwrap().unwrap().payload);
        }
        got
    };
    let ((), got) = tokio::join!(sending, receiving);
    assert!(got == bytes);
    assert_eq!(client.finish().await.last, exited(0));
}

#[tokio::test]
async fn stdout_stderr_and_the_exit_status_are_told_apart() {
    let mut client = Client::start(shell("echo out; echo err >&2; exit 42")).await;
    client.started().await;
    let result = client.finish().await;
    assert_eq!(
        (result.stdout.as_slice(), result.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(result.last, exited(42));
}

#[tokio::test]
async fn environment_and_folder_are_as_asked() {
    let request = Command {
        env: vec![("COLOUR".into(), "blue".into())],
        working_dir: Some("/proc".into()),
        ..shell("pwd; echo $COLOUR $HOME $PATH")
    };
    let mut client = Client::start(request).await;
    client.started().await;
    let result = client.finish().await;
    assert_eq!(
        String::from_utf8(result.stdout).unwrap(),
        format!("/proc\nblue /root {PATH}\n")
    );
}

#[tokio::test]
async fn a_command_that_cannot_be_started_is_told_by_kind() {
    let (kind, message) = failure(command(&["no-such-program"])).await;
    assert_eq!(kind, FailureKind::NotFound);
    assert!(message.contains("no-such-program"), "{message}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(
        failure(command(&[file.path().to_str().unwrap()])).await.0,
        FailureKind::NotExecutable
    );
    assert_eq!(failure(command(&["/tmp"])).await.0, FailureKind::NotExecutable);
    let in_nowhere = Command {
        working_dir: Some("/no/such/folder".into()),
        ..command(&["true"])
    };
    let (kind, message) = failure(in_nowhere).await;
    assert_eq!(kind, FailureKind::Other);
    assert!(message.contains("/no/such/folder"), "{message}");
    assert_eq!(failure(command(&[])).await.0, FailureKind::Other);
    assert_eq!(failure(command(&["a\0b"])).await.0, FailureKind::Other);
    let bad = Command {
        env: vec![("A=B".into(), String::new())],
        ..command(&["true"])
    };
    assert_eq!(failure(bad).await.0, FailureKind::Other);
}

#[tokio::test]
async fn signals_reach_the_command() {
    let mut client = Client::start(command(&["sleep", "1000"])).await;
    client.started().await;
    for number in [0, -9, 65, i32::MAX, libc::SIGTERM] {
        client.request(&ExecRequest::Signal { number }).await;
    }
    assert_eq!(
        client.finish().await.last,
        Some(ExecReply::Exited(ExitStatus::Signal(libc::SIGTERM)))
    );
}

#[tokio::test]
async fn a_process_left_behind_does_not_hold_the_session() {
    let mut client = Client::start(shell("sleep 1000 & echo $!")).await;
    client.started().await;
    let result = client.finish().await;
    assert_eq!(result.last, exited(0));
    let pid: i32 = String::from_utf8(result.stdout).unwrap().trim().parse().unwrap();
    // Still there: it was left alone.
    kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn a_process_left_behind_that_writes_for_ever_does_not_hold_the_session() {
    let mut client = Client::start(shell("yes & sleep 0.1")).await;
    client.started().await;
    assert_eq!(client.finish().await.last, exited(0));
}

#[tokio::test]
async fn a_terminal_has_its_size_and_follows_resizes() {
    let script = "stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut client = Client::start(on_terminal(script)).await;
    client.started().await;
    assert!(client.output_with("ready").await.contains("24 80"));
    client
        .request(&ExecRequest::Resize(WindowSize {
            rows: 50,
            columns: 132,
        }))
        .await;
    client.output_with("50 132").await;
    assert_eq!(client.finish().await.last, exited(5));
}

#[tokio::test]
async fn a_terminal_turns_control_c_into_a_signal() {
    let mut client = Client::start(on_terminal("tty; exec sleep 1000")).await;
    client.started().await;
    client.output_with("/dev/pts/").await;
    client.stdin(b"\x03").await;
    assert_eq!(
        client.finish().await.last,
        Some(ExecReply::Exited(ExitStatus::Signal(libc::SIGINT)))
    );
}

#[tokio::test]
async fn the_end_of_input_reaches_a_program_on_a_terminal() {
    let mut client = Client::start(on_terminal("cat; echo done")).await;
    client.started().await;
    client.stdin(b"").await;
    client.output_with("done").await;
    assert_eq!(client.finish().await.last, exited(0));
}

#[tokio::test]
async fn all_of_a_terminals_output_comes_before_the_end() {
    let mut client = Client::start(on_terminal("seq 20000")).await;
    client.started().await;
    let result = client.finish().await;
    assert!(result.stdout.ends_with(b"\r\n20000\r\n"));
    assert_eq!(result.last, exited(0));
}

#[tokio::test]
async fn a_client_that_goes_away_hangs_up() {
    for terminal in [
        None,
        Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        // The mark is written by the shell's handler of SIGHUP. Its stderr is gone by then, and a shell
        // that told there of its killed child would die of SIGPIPE.
        let script = format!(
            "exec 2>/dev/null; trap 'echo bye > {}; exit' HUP; echo set; while :; do sleep 0.05; done",
            mark.display()
        );
        let mut client = Client::start(Command {
            terminal,
            ..shell(&script)
        })
        .await;
        client.started().await;
        client.output_with("set").await;
        let Client {
            reader,
            writer,
            session,
        } = client;
        drop((reader, writer));
        session.await.unwrap().unwrap();
        while !std::fs::read_to_string(&mark).is_ok_and(|text| text == "bye\n") {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn what_is_not_the_protocol_ends_the_session_and_the_command() {
    let (client, server) = UnixStream::pair().unwrap();
    let session = tokio::spawn(serve(server));
    let (_reader, mut writer) = client.into_split();
    writer.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(matches!(session.await.unwrap(), Err(Error::Read(_))));

    let mut client = Client::start(command(&["sleep", "1000"])).await;
    let pid = client.started().await;
    client.request(&ExecRequest::Start(command(&["true"]))).await;
    assert!(matches!(client.session.await.unwrap(), Err(Error::NotStarted)));
    let pid = Pid::from_raw(pid.try_into().unwrap());
    while kill(pid, None).is_ok() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn input_to_a_command_that_does_not_read_is_dropped_when_it_ends() {
    let mut client = Client::start(command(&["true"])).await;
    client.started().await;
    // Written while the command is ending; neither side may hang or fail.
    drop(
        client
            .writer
            .write_all(&encode(Channel::Stdin, &[0; 100_000]).unwrap())
            .await,
    );
    assert_eq!(client.finish().await.last, exited(0));
}
