//! Owners: the user's on the host, whoever the guest says in the guest.

use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use virtiofsd::soft_idmap::Id;

const FATTR_MODE: u32 = 1;
const FATTR_UID: u32 = 2;
const FATTR_GID: u32 = 4;

fn owner(attr: &Attr) -> (u32, u32) {
    (attr.uid.into_inner(), attr.gid.into_inner())
}

/// Who runs the tests.
fn user() -> (u32, u32) {
    // SAFETY: these cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

fn host_owner(path: PathBuf) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn what_root_makes_is_the_users_in_both_worlds() {
    let mut bench = bench(false);
    let (node, _) = bench.create("file", 0o644).unwrap();
    assert_eq!(owner(&bench.attributes(node)), user());
    assert_eq!(host_owner(bench.path("file")), user());
}

#[test]
fn an_owner_that_the_guest_gives_is_kept_for_guests_only() {
    let mut bench = bench(false);
    // A file that nobody may write, too, and a folder.
    for mode in [0o644, 0o400] {
        let file = format!("file-{mode:o}");
        let (node, _) = bench.create(&file, mode).unwrap();
        let changed = bench
            .setattr(node, FATTR_UID | FATTR_GID, 0, 0, (999, 998))
            .unwrap();
        assert_eq!(owner(&changed), (999, 998));
        let changed = bench.setattr(node, FATTR_GID, 0, 0, (7, 7)).unwrap();
        assert_eq!(owner(&changed), (999, 7));
        assert_eq!(host_owner(bench.path(&file)), user());
        assert_eq!(changed.mode & 0o7777, mode);
    }
    let made = body(&[&u32s(&[0o700, 0]), &name("data")]);
    let answer = bench.ask(Opcode::Mkdir, ROOT, &made).unwrap();
    let data = take::<EntryOut>(&answer).0.nodeid;
    bench
        .setattr(data, FATTR_UID | FATTR_GID, 0, 0, (999, 999))
        .unwrap();

    // Another guest, later.
    let device = device(&bench.folder, false, 1000);
    let mut later = bench_of(bench.folder, device);
    assert_eq!(owner(&later.lookup(ROOT, "file-644").unwrap().attr), (999, 7));
    let data = later.lookup(ROOT, "data").unwrap();
    assert_eq!(owner(&data.attr), (999, 999));
    // Given back, nothing is left of it.
    let back = later
        .setattr(data.nodeid, FATTR_UID | FATTR_GID, 0, 0, user())
        .unwrap();
    assert_eq!(owner(&back), user());
    assert_eq!(owner(&later.lookup(ROOT, "data").unwrap().attr), user());
}

#[test]
fn a_new_file_is_the_makers_and_has_the_group_of_a_folder_that_hands_it_on() {
    let mut bench = bench(false);
    (bench.uid, bench.gid) = (70_000, 70_001);
    let (node, _) = bench.create("theirs", 0o600).unwrap();
    assert_eq!(owner(&bench.attributes(node)), (70_000, 70_001));
    assert_eq!(
        owner(&bench.lookup(ROOT, "theirs").unwrap().attr),
        (70_000, 70_001)
    );
    assert_eq!(host_owner(bench.path("theirs")), user());

    (bench.uid, bench.gid) = (0, 0);
    let valid = FATTR_MODE | FATTR_UID | FATTR_GID;
    bench.setattr(ROOT, valid, 0, 0o2777, (500, 501)).unwrap();
    (bench.uid, bench.gid) = (70_000, 70_001);
    let made = body(&[&u32s(&[libc::S_IFREG | 0o644, 0, 0, 0]), &name("handed-on")]);
    let answer = bench.ask(Opcode::Mknod, ROOT, &made).unwrap();
    assert_eq!(owner(&take::<EntryOut>(&answer).0.attr), (70_000, 501));
}

#[test]
fn a_program_that_ran_as_its_owner_does_not_run_as_the_next() {
    let mut bench = bench(false);
    let (node, _) = bench.create("program", 0o755).unwrap();
    bench.setattr(node, FATTR_MODE, 0, 0o6755, (0, 0)).unwrap();
    let changed = bench.setattr(node, FATTR_UID, 0, 0, (999, 0)).unwrap();
    assert_eq!(changed.mode & 0o7777, 0o755);
}

#[test]
fn a_program_that_is_written_to_does_not_run_as_its_owner_any_more() {
    let mut bench = bench(false);
    let (node, handle) = bench.create("program", 0o755).unwrap();
    bench.setattr(node, FATTR_MODE, 0, 0o4755, (0, 0)).unwrap();
    // FUSE_WRITE_KILL_SUIDGID: whoever writes is not root in the guest.
    let write = [
        &u64s(&[handle, 0])[..],
        &u32s(&[1, 4]),
        &u64s(&[0]),
        &u32s(&[0, 0]),
        b"x",
    ];
    bench.ask(Opcode::Write, node, &body(&write)).unwrap();
    assert_eq!(bench.attributes(node).mode & 0o7777, 0o755);
    // The thread is as privileged as before.
    bench.write(node, handle, 1, b"y").unwrap();
}

#[test]
fn links_have_no_owner_of_their_own_and_giving_them_one_is_no_error() {
    let mut bench = bench(false);
    let soft = body(&[&name("soft"), &name("target")]);
    let answer = bench.ask(Opcode::Symlink, ROOT, &soft).unwrap();
    let node = take::<EntryOut>(&answer).0.nodeid;
    let changed = bench
        .setattr(node, FATTR_UID | FATTR_GID, 0, 0, (999, 999))
        .unwrap();
    assert_eq!(owner(&changed), user());
}

#[test]
fn the_record_of_an_owner_is_out_of_the_guests_reach() {
    let mut bench = bench(false);
    let (node, _) = bench.create("file", 0o4755).unwrap();
    bench
        .setattr(node, FATTR_UID | FATTR_GID, 0, 0, (999, 999))
        .unwrap();
    let set = |attribute: &str| body(&[&u32s(&[3, 0]), &name(attribute), b"0:0"]);
    for attribute in [
        "user.lighter.owner",
        "user.lighter.x",
        "security.capability",
        "trusted.x",
        "system.x",
    ] {
        assert_eq!(
            bench.ask(Opcode::Setxattr, node, &set(attribute)).map(drop),
            Err(libc::EOPNOTSUPP),
            "{attribute}"
        );
        let get = body(&[&u32s(&[100, 0]), &name(attribute)]);
        assert_eq!(
            bench.ask(Opcode::Getxattr, node, &get).map(drop),
            Err(libc::EOPNOTSUPP)
        );
        assert_eq!(
            bench.ask(Opcode::Removexattr, node, &name(attribute)).map(drop),
            Err(libc::EOPNOTSUPP)
        );
    }
    bench.ask(Opcode::Setxattr, node, &set("user.mine")).unwrap();
    let get = body(&[&u32s(&[100, 0]), &name("user.mine")]);
    assert_eq!(bench.ask(Opcode::Getxattr, node, &get).unwrap(), b"0:0");
    let list = |size: u32| u32s(&[size, 0]);
    assert_eq!(
        bench.ask(Opcode::Listxattr, node, &list(0)).unwrap()[..4],
        [10, 0, 0, 0]
    );
    assert_eq!(
        bench.ask(Opcode::Listxattr, node, &list(10)).unwrap(),
        b"user.mine\0"
    );
    assert_eq!(bench.ask(Opcode::Listxattr, node, &list(9)), Err(libc::ERANGE));
    assert_eq!(owner(&bench.attributes(node)), (999, 999));
}

#[test]
fn files_of_others_cannot_be_given_away() {
    // Only root can make one.
    if user().0 != 0 {
        return;
    }
    let mut bench = bench(false);
    fs::write(bench.path("theirs"), "x").unwrap();
    std::os::unix::fs::chown(bench.path("theirs"), Some(4711), Some(4711)).unwrap();
    fs::set_permissions(bench.path("theirs"), fs::Permissions::from_mode(0o644)).unwrap();
    let node = bench.lookup(ROOT, "theirs").unwrap().nodeid;
    assert_eq!(owner(&bench.attributes(node)), (4711, 4711));
    let given = bench.setattr(node, FATTR_UID, 0, 0, (0, 0));
    assert_eq!(given.map(drop), Err(libc::EPERM));
    assert_eq!(host_owner(bench.path("theirs")), (4711, 4711));
}
