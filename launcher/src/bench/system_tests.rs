use super::*;
use std::os::unix::fs::MetadataExt;
use tokio::net::UnixListener;

fn system(disk: &Path) -> System {
    System {
        disk: disk.into(),
        kernel: "/nonexistent/vmlinux".into(),
        cpus: 1,
        memory: Size(1 << 30),
        folder: disk.parent().unwrap().into(),
    }
}

#[test]
fn a_disk_is_copied_as_it_is_and_takes_no_room_for_zeros() {
    let mut disk = tempfile::tempfile().unwrap();
    disk.set_len((5 << 20) + 512).unwrap();
    for at in [1 << 20, (5 << 20) + 500] {
        disk.write_all_at(b"data", at).unwrap();
    }
    let mut copy = tempfile::tempfile().unwrap();
    copy_sparsely(&mut disk, &mut copy).unwrap();
    let metadata = copy.metadata().unwrap();
    assert_eq!(metadata.len(), (5 << 20) + 512);
    assert!(metadata.blocks() * 512 < 4 << 20, "{}", metadata.blocks());
    for at in [1 << 20, (5 << 20) + 500] {
        let mut bytes = [0; 4];
        copy.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(&bytes, b"data");
    }
}

#[test]
fn the_kernel_is_told_of_a_root_that_is_written_to() {
    let line = system(Path::new("/disks/a")).command_line();
    assert!(
        line.contains("root=/dev/vda rw ") && !line.contains("erofs"),
        "{line}"
    );
}

#[test]
fn what_cannot_be_booted_is_told_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    for path in [&missing, &folder.path().to_path_buf()] {
        let error = system(path).check().unwrap_err();
        assert!(error.message.contains(path.to_str().unwrap()), "{error}");
    }
    std::fs::write(&missing, "a disk").unwrap();
    system(&missing).check().unwrap();
}

/// A monitor whose guest gives each connection the next answer. `None` is a port that nobody listens on.
fn muxer(answers: &'static [Option<&'static str>]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        for answer in answers {
            let (mut client, _) = listener.accept().await.unwrap();
            let Some(answer) = answer else { continue };
            client.write_all(b"OK 1\n").await.unwrap();
            client.write_all(answer.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            // The request is read, so that the client's writing does not fail.
            let _ = client.read_to_end(&mut vec![]).await;
        }
    });
    (folder, path)
}

#[tokio::test]
async fn an_engine_is_asked_until_it_answers() {
    let (_folder, path) = muxer(&[None, Some(""), None, Some("HTTP/1.1 200 OK\r\n\r\nOK")]);
    answer(&path, BETWEEN_LOOKS).await.unwrap();
    let (_folder, path) = muxer(&[Some("HTTP/1.1 500 no\r\n\r\n")]);
    let error = answer(&path, BETWEEN_LOOKS).await.unwrap_err();
    assert!(error.message.contains("500 no"), "{error}");
}

#[tokio::test]
async fn what_the_guest_says_is_made_printable_and_may_be_missing() {
    let (_folder, path) = muxer(&[Some("docker.service +26s\n\x1b[2J\n"), None]);
    assert_eq!(times(&path).await, ["docker.service +26s", "\\u{1b}[2J"]);
    assert_eq!(times(&path).await, <[String; 0]>::default());
}

#[tokio::test]
async fn the_first_instruction_is_found_among_the_events() {
    let (mut sender, events) = pipe::pipe().unwrap();
    for (monotonic_ns, kind) in [(5, EventKind::ProcessStarted), (7, EventKind::GuestEntered)] {
        let mut line = serde_json::to_vec(&Event { monotonic_ns, kind }).unwrap();
        line.push(b'\n');
        sender.write_all(&line).await.unwrap();
    }
    assert_eq!(guest_entered_ns(events).await.unwrap(), 7);
    let (sender, events) = pipe::pipe().unwrap();
    drop(sender);
    assert!(guest_entered_ns(events).await.is_err());
}
