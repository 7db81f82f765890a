//! A guest that speaks FUSE (linux/fuse.h) over real queues.

mod files;
mod hostile;
mod owners;

use super::*;
use crate::virtio::testing::{DriverQueue, Guest, Layout};
use std::path::PathBuf;
use tempfile::TempDir;
use virtiofsd::fuse::{Attr, EntryOut, Opcode};
use virtiofsd_memory::ByteValued;

const ROOT: u64 = 1;
const HEADER: usize = 40;

/// As much as an answer of these tests takes.
const ROOM: usize = 8192;

struct Bench {
    guest: Guest,
    hiprio: DriverQueue,
    requests: DriverQueue,
    device: Fs,
    folder: TempDir,
    unique: u64,
    /// On whose behalf requests are made.
    uid: u32,
    gid: u32,
}

/// A folder where the programs are built: its file system keeps extended attributes, which not every /tmp does.
fn new_folder() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

fn device(folder: &TempDir, read_only: bool, descriptors: u64) -> Fs {
    let config = FsConfig {
        tag: "share0".into(),
        path: folder.path().display().to_string(),
        folder: File::open(folder.path()).unwrap().into(),
        read_only,
        descriptors,
    };
    Fs::new(config).unwrap()
}

fn bench(read_only: bool) -> Bench {
    let folder = new_folder();
    let device = device(&folder, read_only, 1000);
    bench_of(folder, device)
}

/// The device's thread, in its folder.
fn thread_of(device: &mut Fs) -> DeviceThread {
    let (thread, prepared) = DeviceThread::start("fs", device.prepare().unwrap()).unwrap();
    prepared.recv().unwrap().unwrap();
    thread
}

fn bench_of(folder: TempDir, mut device: Fs) -> Bench {
    let mut guest = Guest::new(16);
    guest.thread = thread_of(&mut device);
    let hiprio = DriverQueue::new(&mut guest, 8, true);
    let requests = DriverQueue::new(&mut guest, 32, true);
    let mut bench = Bench {
        guest,
        hiprio,
        requests,
        device,
        folder,
        unique: 1,
        uid: 0,
        gid: 0,
    };
    bench.activate();
    bench.init();
    bench
}

/// What a request is made of, behind its header.
fn body(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn name(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// The object at the front of an answer; the rest.
fn take<T: ByteValued + Default>(bytes: &[u8]) -> (T, &[u8]) {
    let (object, rest) = bytes.split_at(size_of::<T>());
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(object);
    (value, rest)
}

impl Bench {
    fn activate(&mut self) {
        let activation = self.guest.activation(&[&self.hiprio, &self.requests], 0);
        self.device.activate(activation).unwrap();
    }

    fn init(&mut self) {
        // Every feature that a kernel could have.
        let init = u32s(&[
            7,
            38,
            1 << 17,
            u32::MAX,
            u32::MAX,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        self.ask(Opcode::Init, 0, &init).unwrap();
    }

    fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut bytes = u32s(&[length, opcode]);
        bytes.extend(u64s(&[self.unique, node]));
        bytes.extend(u32s(&[self.uid, self.gid, 77, 0]));
        bytes.extend(body);
        bytes
    }

    /// Sends bytes, and returns what was written into `room` bytes of buffers.
    fn send(&mut self, bytes: &[u8], room: usize) -> Vec<u8> {
        self.guest.free_all_but_queue(&self.requests);
        let mut buffers = vec![self.guest.readable(bytes)];
        if room > 0 {
            buffers.push(self.guest.writable(room));
        }
        let used = self.requests.round_trip(&self.guest, &buffers, Layout::Direct);
        let mut answer = buffers
            .get(1)
            .map(|&buffer| self.guest.bytes(buffer))
            .unwrap_or_default();
        answer.truncate(used.length as usize);
        answer
    }

    /// Asks, and returns what comes behind the answer's header, or the error number.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let request = self.request(opcode as u32, node, body);
        let answer = self.send(&request, ROOM);
        let (length, rest) = take::<u32>(&answer);
        let (error, rest) = take::<u32>(rest);
        let (unique, rest) = take::<u64>(rest);
        assert_eq!(
            (length as usize, unique),
            (answer.len(), self.unique),
            "{opcode:?}"
        );
        match error.cast_signed() {
            0 => Ok(rest.to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, file: &str) -> Result<EntryOut, i32> {
        let answer = self.ask(Opcode::Lookup, parent, &name(file))?;
        Ok(take(&answer).0)
    }

    fn attributes(&mut self, node: u64) -> Attr {
        let answer = self.ask(Opcode::Getattr, node, &u64s(&[0, 0])).unwrap();
        take(&answer[16..]).0
    }

    /// Makes a file and opens it for writing: its node and its handle.
    fn create(&mut self, file: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT).cast_unsigned();
        let create = body(&[&u32s(&[flags, libc::S_IFREG | mode, 0, 0]), &name(file)]);
        let answer = self.ask(Opcode::Create, ROOT, &create)?;
        let (entry, rest) = take::<EntryOut>(&answer);
        Ok((entry.nodeid, take::<u64>(rest).0))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let answer = self.ask(Opcode::Open, node, &u32s(&[flags.cast_unsigned(), 0]))?;
        Ok(take(&answer).0)
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, bytes: &[u8]) -> Result<u32, i32> {
        let length = u32::try_from(bytes.len()).unwrap();
        let write = [
            &u64s(&[handle, offset])[..],
            &u32s(&[length, 0]),
            &u64s(&[0]),
            &u32s(&[0, 0]),
            bytes,
        ];
        let answer = self.ask(Opcode::Write, node, &body(&write))?;
        Ok(take(&answer).0)
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, length: u32) -> Result<Vec<u8>, i32> {
        let read = [
            &u64s(&[handle, offset])[..],
            &u32s(&[length, 0]),
            &u64s(&[0]),
            &u32s(&[0, 0]),
        ];
        self.ask(Opcode::Read, node, &body(&read))
    }

    /// Changes the attributes that `valid` (FATTR_…) says.
    fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Attr, i32> {
        let setattr = [
            &u32s(&[valid, 0])[..],
            &u64s(&[0, size, 0, 0, 0, 0]),
            &u32s(&[0, 0, 0, mode, 0, owner.0, owner.1, 0]),
        ];
        let answer = self.ask(Opcode::Setattr, node, &body(&setattr))?;
        Ok(take(&answer[16..]).0)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }
}
