//! Snapshots of the monitor as a process, with a guest of a few instructions. They need /dev/kvm, but none that runs Linux.

use lighter_protocol::monitor::{EventKind, Request, Response, StopReason};
use lighter_tests::tiny_guest::{Kernel, Setup, Vm};
use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MONITOR: &str = env!("CARGO_BIN_EXE_lighter-vmm");

/// Prints the letters of the alphabet for ever, each on a line of its own; the letter is kept in memory, its next one in a
/// register.
fn alphabet() -> Kernel {
    const LETTER: [u8; 4] = 0x30_0000u32.to_le_bytes();
    let store = [&[0xa2][..], &LETTER].concat();
    let load = [&[0xa0][..], &LETTER].concat();
    let begin = [&[0xb0, b'a'][..], &store].concat();
    let print = [
        &load[..],
        // mov dx, 0x3f8; out dx, al; mov al, '\n'; out dx, al
        &[0x66, 0xba, 0xf8, 0x03, 0xee, 0xb0, b'\n', 0xee],
    ]
    .concat();
    // inc al; cmp al, 'z' + 1; jne over; mov al, 'a'; over:
    let next = [
        &load[..],
        &[0xfe, 0xc0, 0x3c, b'z' + 1, 0x75, 2, 0xb0, b'a'],
        &store,
    ]
    .concat();
    let body = [print, next].concat();
    let back = -(i32::try_from(body.len()).unwrap() + 5);
    Kernel::Pvh([&begin[..], &body, &[0xe9], &back.to_le_bytes()].concat())
}

fn setup() -> Setup {
    Setup::new(MONITOR, alphabet())
}

/// Waits until the guest has printed `count` letters, and returns all of them.
fn letters(vm: &Vm, count: usize) -> Vec<u8> {
    loop {
        let console = vm.console();
        if console.len() >= 2 * count {
            return console.bytes().filter(u8::is_ascii_lowercase).collect();
        }
        std::thread::yield_now();
    }
}

fn following(letter: u8) -> u8 {
    if letter == b'z' { b'a' } else { letter + 1 }
}

fn assert_in_order(letters: &[u8]) {
    for pair in letters.windows(2) {
        assert_eq!(pair[1], following(pair[0]));
    }
}

/// A copy goes on behind the letter `last`, or behind the next: that may have been printed without the end of its line, which
/// the source's console waited for.
fn assert_goes_on(copy: &Vm, last: u8) {
    let printed = letters(copy, 60);
    let before = match copy.console().starts_with('\n') {
        true => following(last),
        false => last,
    };
    assert_in_order(&[&[before][..], &printed].concat());
}

/// Takes a snapshot of a guest that has printed something; returns the letter that it printed last.
fn take(vm: &mut Vm, folder: &Path) -> ([File; 2], u8) {
    letters(vm, 30);
    vm.request(&Request::Pause);
    let last = *letters(vm, 30).last().unwrap();
    let files = vm.save(folder);
    (files, last)
}

fn reread(mut file: File) -> File {
    file.rewind().unwrap();
    file
}

fn reopen(folder: &Path) -> [File; 2] {
    ["state", "memory"].map(|name| File::open(folder.join(name)).unwrap())
}

#[test]
fn the_source_and_every_copy_go_on_with_the_next_instruction() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = setup().start();
    let (files, last) = take(&mut source, folder.path());
    drop(files);
    source.request(&Request::Resume);
    source.wait_for(&EventKind::Saved);
    let mut copies: Vec<Vm> = (0..3)
        .map(|_| {
            let mut setup = setup();
            setup.snapshot = Some(reopen(folder.path()));
            setup.start()
        })
        .collect();
    // The files are needed for nothing but their content.
    drop(folder);
    for copy in &mut copies {
        copy.wait_for(&EventKind::GuestEntered);
        assert_goes_on(copy, last);
    }
    drop(copies.pop());
    let noted = tempfile::tempfile().unwrap();
    let note = |vm: &mut Vm| vm.request_with(&Request::WorkingSet, &[noted.try_clone().unwrap()]);
    assert!(matches!(note(&mut source), Response::Error { message } if message.contains("was booted")));
    assert_eq!(note(&mut copies[0]), Response::Done);
    // A copy can be saved too.
    let folder = tempfile::tempdir().unwrap();
    let (files, last) = take(&mut copies[0], folder.path());
    copies[0].wait_for(&EventKind::Saved);
    copies[0].request(&Request::Stop);
    assert_eq!(copies[0].stop_reason(), StopReason::Requested);
    drop(files);
    let mut again = setup();
    again.snapshot = Some(reopen(folder.path()));
    again.working_set = Some(reread(noted));
    let mut again = again.start();
    again.wait_for(&EventKind::GuestEntered);
    assert_goes_on(&again, last);
    assert_in_order(&letters(&source, 90));
}

#[test]
fn only_a_paused_vm_is_saved_and_only_into_two_files() {
    let mut vm = setup().start();
    vm.wait_for(&EventKind::GuestEntered);
    let file = || tempfile::tempfile().unwrap();
    let message = |response| match response {
        Response::Error { message } => message,
        other => panic!("{other:?}"),
    };
    let refused = message(vm.request_with(&Request::Save, &[file(), file()]));
    assert_eq!(refused, "cannot take a snapshot: the VM runs: pause it first");
    vm.request(&Request::Pause);
    let refused = message(vm.request_with(&Request::Save, &[file()]));
    assert_eq!(refused, "two descriptors have to come with the request");
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let refused = message(vm.request_with(&Request::Save, &[full(), file()]));
    assert!(refused.contains("cannot write the snapshot's state"), "{refused}");
    let refused = message(vm.request_with(&Request::Save, &[file(), full()]));
    assert!(
        refused.contains("cannot make the file for guest memory"),
        "{refused}"
    );
    vm.request(&Request::Resume);
    letters(&vm, 30);
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let mut source = setup().start();
    take(&mut source, folder.path());
    source.wait_for(&EventKind::Saved);
    drop(source);
    let refused = |change: &dyn Fn(&mut Setup)| {
        let mut setup = setup();
        setup.snapshot = Some(reopen(folder.path()));
        change(&mut setup);
        match setup.start().stop_reason() {
            StopReason::Failed { detail } => detail,
            other => panic!("{other:?}"),
        }
    };
    let detail = refused(&|setup| setup.cpus = 2);
    assert!(
        detail.contains("the snapshot is of a VM with 1 CPUs") && detail.contains("this one has 2 CPUs"),
        "{detail}"
    );
    let detail = refused(&|setup| setup.memory_mib = 32);
    assert!(detail.contains("has 67108864 bytes and not 32 MiB"), "{detail}");
    // The first byte behind the header.
    let state = std::fs::OpenOptions::new()
        .write(true)
        .open(folder.path().join("state"))
        .unwrap();
    state.write_all_at(&[0xff], 52).unwrap();
    let detail = refused(&|_| ());
    assert!(
        detail.contains("does not have the checksum that it says"),
        "{detail}"
    );
    state.set_len(100).unwrap();
    assert!(refused(&|_| ()).contains("the file is damaged"));
    state.write_all_at(b"X", 0).unwrap();
    assert!(refused(&|_| ()).contains("the file is not the state of a snapshot"));
}

#[test]
fn a_paused_vm_s_disk_gets_a_layer_and_others_may_have_what_it_was() {
    const LENGTH: u64 = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let start = |layers| {
        let mut setup = setup();
        setup.disk = Some(path.clone());
        setup.layers = layers;
        setup.start()
    };
    let layer = |length| {
        let file = tempfile::tempfile().unwrap();
        lighter_disk::create(&file, length).unwrap();
        file
    };
    let add = |vm: &mut Vm, disk: &str, merged, files: &[File]| {
        let disk = disk.into();
        match vm.request_with(&Request::AddLayer { disk, merged }, files) {
            Response::Done => String::new(),
            Response::Error { message } => message,
            other => panic!("{other:?}"),
        }
    };
    let mut vm = start(vec![]);
    vm.wait_for(&EventKind::GuestEntered);
    let refused = add(&mut vm, "test", false, &[layer(LENGTH)]);
    assert_eq!(
        refused,
        "cannot add a layer to disk test: the VM runs: pause it first"
    );
    vm.request(&Request::Pause);
    let refused = add(&mut vm, "other", false, &[layer(LENGTH)]);
    assert!(refused.ends_with("the VM has no disk other"), "{refused}");
    let refused = add(&mut vm, "test", true, &[layer(LENGTH)]);
    assert!(refused.contains("has to come with the request"), "{refused}");
    let refused = add(&mut vm, "test", false, &[layer(LENGTH + 512)]);
    assert!(
        refused.contains("layer 1: it is of a disk of 1049088 bytes"),
        "{refused}"
    );
    assert_eq!(add(&mut vm, "test", false, &[layer(LENGTH)]), "");
    assert_eq!(add(&mut vm, "test", false, &[layer(LENGTH)]), "");
    assert_eq!(add(&mut vm, "test", true, &[layer(LENGTH), layer(LENGTH)]), "");
    vm.request(&Request::Resume);
    letters(&vm, 30);
    // Nobody writes to the base any more.
    let mut other = start(vec![layer(LENGTH)]);
    other.wait_for(&EventKind::GuestEntered);
    match start(vec![]).stop_reason() {
        StopReason::Failed { detail } => assert!(detail.contains("in use"), "{detail}"),
        reason => panic!("{reason:?}"),
    }
    let damaged = layer(LENGTH);
    damaged.write_all_at(&[7], 4096).unwrap();
    match start(vec![damaged]).stop_reason() {
        StopReason::Failed { detail } => assert!(detail.contains("its map has 7 for cluster 0"), "{detail}"),
        reason => panic!("{reason:?}"),
    }
}

#[test]
fn a_monitor_that_ends_while_it_saves_leaves_no_process_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut vm = setup().start();
    take(&mut vm, folder.path());
    // Killed: whoever still holds the events' pipe is a process of it.
    vm.kill();
}
