//! Files, as they are for an honest guest.

use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

#[test]
fn the_guest_reads_what_the_host_wrote_and_the_other_way_round() {
    let mut bench = bench(false);
    fs::write(bench.path("from-host"), "cargo").unwrap();
    let entry = bench.lookup(ROOT, "from-host").unwrap();
    assert_eq!(entry.attr.size, 5);
    let handle = bench.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(bench.read(entry.nodeid, handle, 1, 100).unwrap(), b"argo");
    let (node, handle) = bench.create("from-guest", 0o640).unwrap();
    assert_eq!(bench.write(node, handle, 0, b"hello").unwrap(), 5);
    // Beyond 4 GiB, leaving a hole.
    assert_eq!(bench.write(node, handle, 5 << 30, b"far").unwrap(), 3);
    let metadata = fs::metadata(bench.path("from-guest")).unwrap();
    assert_eq!(metadata.len(), (5 << 30) + 3);
    assert!(metadata.blocks() * 512 < 1 << 20, "the file is sparse");
    assert_eq!(
        metadata.permissions().mode() & 0o7777,
        0o640,
        "no umask but the guest's"
    );
    assert_eq!(bench.read(node, handle, 5 << 30, 10).unwrap(), b"far");
}

#[test]
fn folders_links_and_names_work() {
    let mut bench = bench(false);
    let made = body(&[&u32s(&[0o755, 0]), &name("deep")]);
    let answer = bench.ask(Opcode::Mkdir, ROOT, &made).unwrap();
    let deep = take::<EntryOut>(&answer).0.nodeid;
    let (node, _) = bench.create("file", 0o644).unwrap();
    let link = body(&[&u64s(&[node]), &name("hard")]);
    let answer = bench.ask(Opcode::Link, deep, &link).unwrap();
    assert_eq!(take::<EntryOut>(&answer).0.attr.nlink, 2);
    let soft = body(&[&name("soft"), &name("/etc/passwd")]);
    let answer = bench.ask(Opcode::Symlink, ROOT, &soft).unwrap();
    let soft = take::<EntryOut>(&answer).0.nodeid;
    // The guest resolves it, in its own tree.
    assert_eq!(bench.ask(Opcode::Readlink, soft, &[]).unwrap(), b"/etc/passwd");
    let rename = body(&[&u64s(&[deep]), &u32s(&[0, 0]), &name("file"), &name("moved")]);
    bench.ask(Opcode::Rename2, ROOT, &rename).unwrap();
    assert!(bench.path("deep/moved").exists() && !bench.path("file").exists());
    let answer = bench.ask(Opcode::Opendir, ROOT, &u32s(&[0, 0])).unwrap();
    let handle = take::<u64>(&answer).0;
    let list = [
        &u64s(&[handle, 0])[..],
        &u32s(&[4096, 0]),
        &u64s(&[0]),
        &u32s(&[0, 0]),
    ];
    let listed = bench.ask(Opcode::Readdirplus, ROOT, &body(&list)).unwrap();
    for expected in ["deep", "soft"] {
        let found = listed
            .windows(expected.len())
            .any(|part| part == expected.as_bytes());
        assert!(found, "{expected} is listed");
    }
}

#[test]
fn what_is_open_stays_open_over_a_pause_and_is_closed_by_a_reset() {
    let mut bench = bench(false);
    let (node, handle) = bench.create("kept", 0o644).unwrap();
    let queues = bench.device.deactivate();
    assert_eq!(queues.len(), QUEUES);
    let activation = bench.guest.activation_with(queues, 0);
    bench.device.activate(activation).unwrap();
    assert_eq!(bench.write(node, handle, 0, b"on").unwrap(), 2);
    assert_eq!(fs::read(bench.path("kept")).unwrap(), b"on");
    // A new umask on each thread.
    bench.create("open-to-all", 0o666).unwrap();
    let mode = fs::metadata(bench.path("open-to-all"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o666);

    bench.device.deactivate();
    bench.device.reset();
    bench.hiprio = DriverQueue::new(&mut bench.guest, 8, true);
    bench.requests = DriverQueue::new(&mut bench.guest, 32, true);
    bench.activate();
    bench.init();
    assert_eq!(bench.write(node, handle, 0, b"x"), Err(libc::EBADF));
    assert!(bench.lookup(ROOT, "kept").is_ok());
}

#[test]
fn what_is_open_can_be_saved_and_opened_again_elsewhere() {
    let mut first = bench(false);
    assert!(first.device.save(&first.guest.thread).is_err(), "it is active");
    let made = body(&[&u32s(&[0o755, 0]), &name("deep")]);
    let answer = first.ask(Opcode::Mkdir, ROOT, &made).unwrap();
    let deep = take::<EntryOut>(&answer).0.nodeid;
    let (node, handle) = first.create("file", 0o644).unwrap();
    first.write(node, handle, 0, b"before").unwrap();
    first.device.deactivate();
    let state = first.device.save(&first.guest.thread).unwrap();

    // Another monitor, which goes on where the first one stopped.
    let mut device = device(&first.folder, false, 1000);
    device.restore(&state).unwrap();
    let mut second = Bench { device, ..first };
    second.activate();
    second.write(node, handle, 6, b" and after").unwrap();
    assert_eq!(fs::read(second.path("file")).unwrap(), b"before and after");
    fs::write(second.path("deep/new"), "x").unwrap();
    assert!(second.lookup(deep, "new").is_ok());

    // One whose files are gone.
    let mut third = device_of_nothing();
    third.restore(&state).unwrap();
    second.device.deactivate();
    second.guest.thread = thread_of(&mut third);
    third
        .activate(second.guest.activation(&[&second.hiprio, &second.requests], 0))
        .unwrap();
    second.guest.wait_until_failed();
}

/// The library panicked.
#[test]
fn a_place_that_no_file_has_is_refused() {
    let mut bench = bench(false);
    let (node, handle) = bench.create("file", 0o644).unwrap();
    for offset in [1 << 63, u64::MAX] {
        assert_eq!(bench.read(node, handle, offset, 4096), Err(libc::EINVAL));
        assert_eq!(bench.write(node, handle, offset, b"x"), Err(libc::EINVAL));
    }
    assert_eq!(
        bench.read(node, handle, (1 << 63) - 1, 4096).unwrap_or_default(),
        b""
    );
    assert_eq!(bench.write(node, handle, 0, b"x"), Ok(1));
}

fn device_of_nothing() -> Fs {
    device(&new_folder(), false, 1000)
}

#[test]
fn a_read_only_folder_cannot_be_changed() {
    let mut bench = bench(true);
    fs::write(bench.path("file"), "x").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap().nodeid;
    let readonly = Err(libc::EROFS);
    assert_eq!(bench.create("new", 0o644).map(drop), readonly);
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(bench.open(node, flags).map(drop), readonly);
    }
    let valid = [1, 2, 8]; // FATTR_MODE, FATTR_UID, FATTR_SIZE
    for valid in valid {
        assert_eq!(bench.setattr(node, valid, 0, 0o777, (7, 7)).map(drop), readonly);
    }
    let changes: [(Opcode, Vec<u8>); 8] = [
        (Opcode::Mkdir, body(&[&u32s(&[0o755, 0]), &name("d")])),
        (
            Opcode::Mknod,
            body(&[&u32s(&[libc::S_IFREG | 0o644, 0, 0, 0]), &name("n")]),
        ),
        (Opcode::Unlink, name("file")),
        (Opcode::Rmdir, name("d")),
        (Opcode::Symlink, body(&[&name("s"), &name("to")])),
        (Opcode::Link, body(&[&u64s(&[node]), &name("l")])),
        (
            Opcode::Rename2,
            body(&[&u64s(&[ROOT]), &u32s(&[0, 0]), &name("file"), &name("g")]),
        ),
        (Opcode::Setxattr, body(&[&u32s(&[1, 0]), &name("user.x"), b"v"])),
    ];
    for (opcode, body) in changes {
        assert_eq!(bench.ask(opcode, ROOT, &body).map(drop), readonly, "{opcode:?}");
    }
    let handle = bench.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(bench.write(node, handle, 0, b"y").map(drop), readonly);
    assert_eq!(bench.read(node, handle, 0, 9).unwrap(), b"x");
    assert_eq!(fs::read(bench.path("file")).unwrap(), b"x");
}

#[test]
fn the_configuration_names_the_tag_and_one_queue() {
    let folder = new_folder();
    let device = device(&folder, false, 10);
    let mut config = [9; MAX_TAG + 8];
    device.read_config(0, &mut config);
    assert_eq!(&config[..7], b"share0\0");
    assert_eq!(config[MAX_TAG..], [1, 0, 0, 0, 9, 9, 9, 9]);
    for tag in ["", &"x".repeat(37), "a\0b"] {
        let config = FsConfig {
            tag: tag.into(),
            path: "/x".into(),
            folder: File::open(folder.path()).unwrap().into(),
            read_only: false,
            descriptors: 1,
        };
        assert!(matches!(Fs::new(config), Err(FsError::Tag(_))), "{tag:?}");
    }
    let config = FsConfig {
        tag: "t".into(),
        path: "/x".into(),
        folder: tempfile::tempfile().unwrap().into(),
        read_only: false,
        descriptors: 1,
    };
    assert!(matches!(Fs::new(config), Err(FsError::NotAFolder)));
}
