//! Guests that want out of the folder, or the thread to stand still.

use super::*;
use crate::virtio::testing::{Buffer, NEXT, WRITE};
use std::fs;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let outer = new_folder();
    fs::write(outer.path().join("secret"), "x").unwrap();
    let folder = tempfile::tempdir_in(outer.path()).unwrap();
    let device = device(&folder, false, 1000);
    let mut bench = bench_of(folder, device);
    let (node, _) = bench.create("file", 0o644).unwrap();
    for bad in ["..", ".", "../secret", "/etc/passwd", "a/b", "file/", ""] {
        let refused = Err(libc::EINVAL);
        let requests: [(Opcode, Vec<u8>); 9] = [
            (Opcode::Lookup, name(bad)),
            (Opcode::Mkdir, body(&[&u32s(&[0o755, 0]), &name(bad)])),
            (
                Opcode::Mknod,
                body(&[&u32s(&[libc::S_IFREG, 0, 0, 0]), &name(bad)]),
            ),
            (Opcode::Unlink, name(bad)),
            (Opcode::Rmdir, name(bad)),
            (Opcode::Symlink, body(&[&name(bad), &name("to")])),
            (Opcode::Link, body(&[&u64s(&[node]), &name(bad)])),
            (
                Opcode::Rename2,
                body(&[&u64s(&[ROOT]), &u32s(&[0, 0]), &name("file"), &name(bad)]),
            ),
            (
                Opcode::Rename2,
                body(&[&u64s(&[ROOT]), &u32s(&[0, 0]), &name(bad), &name("new")]),
            ),
        ];
        for (opcode, body) in requests {
            assert_eq!(
                bench.ask(opcode, ROOT, &body).map(drop),
                refused,
                "{opcode:?} {bad:?}"
            );
        }
        assert_eq!(bench.create(bad, 0o644).map(drop), refused, "create {bad:?}");
    }
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"x");
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
}

#[test]
fn a_pipe_does_not_make_the_thread_wait_and_devices_are_not_made() {
    let mut bench = bench(false);
    let pipe = body(&[&u32s(&[libc::S_IFIFO | 0o666, 0, 0, 0]), &name("pipe")]);
    let answer = bench.ask(Opcode::Mknod, ROOT, &pipe).unwrap();
    let node = take::<EntryOut>(&answer).0.nodeid;
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(bench.open(node, flags), Err(libc::ENXIO));
    }
    assert_eq!(bench.create("pipe", 0o644), Err(libc::ENXIO));
    assert_eq!(bench.setattr(node, 8, 0, 0, (0, 0)).map(drop), Err(libc::ENXIO));
    assert_eq!(
        bench.ask(Opcode::Syncfs, node, &u64s(&[0])).map(drop),
        Err(libc::ENXIO)
    );
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFDIR, 0] {
        let device = body(&[&u32s(&[kind | 0o666, 0x103, 0, 0]), &name("device")]);
        assert_eq!(
            bench.ask(Opcode::Mknod, ROOT, &device).map(drop),
            Err(libc::EPERM)
        );
    }
    assert_eq!(bench.device.deactivate().len(), QUEUES);
}

#[test]
fn a_guest_gets_as_many_files_as_it_may_have() {
    let folder = new_folder();
    let device = device(&folder, false, 10);
    let mut bench = bench_of(folder, device);
    let made = (0..20)
        .filter(|n| bench.create(&format!("f{n}"), 0o644).is_ok())
        .count();
    // Each takes two: one for the file, one for it being open; and there is the folder.
    assert_eq!(made, 4);
    assert_eq!(bench.create("more", 0o644), Err(libc::ENFILE));
    // Forgotten files make room.
    let node = bench.lookup(ROOT, "f0").unwrap().nodeid;
    bench.ask(Opcode::Release, node, &u64s(&[0, 0, 0])).unwrap();
    let forget = bench.request(Opcode::Forget as u32, node, &u64s(&[2]));
    assert!(bench.send(&forget, 0).is_empty());
    assert!(bench.create("more", 0o644).is_ok());
}

#[test]
fn a_guest_that_knows_nearly_as_many_files_as_it_may_is_answered_when_it_has_forgotten_some() {
    let folder = new_folder();
    for n in 0..12 {
        fs::write(folder.path().join(n.to_string()), "").unwrap();
    }
    let device = device(&folder, false, 16);
    let mut bench = bench_of(folder, device);
    let nodes: Vec<u64> = (0..12)
        .map(|n| bench.lookup(ROOT, &n.to_string()).unwrap().nodeid)
        .collect();
    let statfs = bench.request(Opcode::Statfs as u32, ROOT, &[]);
    let buffers = [bench.guest.readable(&statfs), bench.guest.writable(ROOM)];
    bench.requests.add(&buffers, Layout::Direct);
    bench.requests.kick();
    let mut forget = |node: u64| {
        let request = bench.request(Opcode::Forget as u32, node, &u64s(&[1]));
        let buffer = bench.guest.readable(&request);
        bench.hiprio.round_trip(&bench.guest, &[buffer], Layout::Direct);
        bench.requests.next_used().is_some()
    };
    // When the second of them is answered the device has looked at its other queue.
    assert!(!forget(1000) && !forget(1000));
    let answered = nodes.into_iter().any(&mut forget);
    if !answered {
        bench.requests.wait(&bench.guest);
    }
    assert!(bench.attributes(ROOT).ino != 0);
}

#[test]
fn requests_that_are_none_and_answers_without_room_do_no_harm() {
    let mut bench = bench(false);
    let (node, handle) = bench.create("file", 0o644).unwrap();
    bench.write(node, handle, 0, b"content").unwrap();
    // Every operation, with too little behind its header, with lengths that are not true, with room for nothing or for a
    // part of an answer.
    for opcode in 0..64 {
        for length in [0, 1, 8, 200] {
            for room in [0, 1, 15, 16, 17, 200] {
                for claimed in [
                    None,
                    Some(0),
                    Some(HEADER as u32 - 1),
                    Some(1 << 20),
                    Some(u32::MAX),
                ] {
                    // The end of the session has no answer, and would end it.
                    if opcode == Opcode::Destroy as u32 {
                        continue;
                    }
                    let mut request = bench.request(opcode, node, &vec![0xff; length]);
                    if let Some(claimed) = claimed {
                        request[..4].copy_from_slice(&claimed.to_le_bytes());
                    }
                    let answer = bench.send(&request, room);
                    assert!(answer.len() <= room);
                }
            }
        }
    }
    // The last INIT closed what was open.
    bench.init();
    assert!(bench.lookup(ROOT, "file").is_ok());
    assert!(!bench.guest.interrupt.needs_reset());
    // Half a header.
    assert!(bench.send(&[0; 20], 100).is_empty());
    assert!(bench.send(&[0xff; 39], 0).is_empty());
}

/// Deterministic random numbers (xorshift64*), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}

#[test]
fn random_requests_are_answered_and_stay_in_the_folder() {
    let outer = new_folder();
    fs::write(outer.path().join("secret"), "x").unwrap();
    let folder = tempfile::tempdir_in(outer.path()).unwrap();
    let device = device(&folder, false, 200);
    let mut bench = bench_of(folder, device);
    let mut random = Random(20_261_124);
    let names = ["a", "b", "..", "../secret", "c"];
    for _ in 0..20_000 {
        let opcode = random.below(52) as u32;
        let mut payload = vec![];
        for _ in 0..random.below(12) {
            match random.below(4) {
                0 => payload.extend(u32s(&[random.below(1 << 32) as u32])),
                1 => payload.extend(name(names[random.below(5) as usize])),
                _ => payload.extend(u32s(&[random.below(16) as u32])),
            }
        }
        // FALLOCATE of random lengths would fill the disk.
        if opcode == Opcode::Fallocate as u32 {
            payload.truncate(16);
        }
        bench.uid = random.below(3) as u32 * 500;
        let request = bench.request(opcode, random.below(12), &payload);
        let room = random.below(300) as usize;
        assert!(bench.send(&request, room).len() <= room);
    }
    assert!(!bench.guest.interrupt.needs_reset());
    assert_eq!(fs::read(outer.path().join("secret")).unwrap(), b"x");
    assert_eq!(fs::read_dir(outer.path()).unwrap().count(), 2);
    bench.init();
    bench.uid = 0;
    bench.lookup(ROOT, "nothing-of-this-name").unwrap_err();
}

#[test]
fn broken_chains_fail_the_device_until_it_is_reset() {
    let outside = Buffer::readable(GuestAddress(u64::MAX - 8), 64);
    let beyond = Buffer::writable(GuestAddress((16 << 20) - 8), 64);
    for bad in [outside, beyond] {
        let mut bench = bench(false);
        let header = bench.request(Opcode::Statfs as u32, ROOT, &[]);
        let header = bench.guest.readable(&header);
        bench.requests.add(&[header, bad], Layout::Direct);
        bench.requests.kick();
        bench.guest.wait_until_failed();
        assert_eq!(bench.device.deactivate().len(), QUEUES);
        bench.device.reset();
        bench.guest.interrupt.reset();
        bench.hiprio = DriverQueue::new(&mut bench.guest, 8, true);
        bench.requests = DriverQueue::new(&mut bench.guest, 32, true);
        bench.activate();
        bench.init();
    }
}

#[test]
fn a_chain_in_a_loop_fails_the_device() {
    let mut bench = bench(false);
    let buffer = bench.guest.writable(64);
    bench
        .requests
        .write_descriptor(0, Descriptor::new(buffer.address.0, 64, NEXT | WRITE, 0));
    bench.requests.make_available(0);
    bench.requests.force_kick();
    bench.guest.wait_until_failed();
    assert_eq!(bench.device.deactivate().len(), QUEUES);
}

#[test]
fn queues_that_are_not_set_up_are_named() {
    let folder = new_folder();
    let mut device = device(&folder, false, 10);
    let mut guest = Guest::new(16);
    let hiprio = DriverQueue::new(&mut guest, 8, false);
    let error = device.activate(guest.activation(&[&hiprio], 0)).unwrap_err();
    assert_eq!(error.to_string(), "the driver did not set up queue 1");
}
