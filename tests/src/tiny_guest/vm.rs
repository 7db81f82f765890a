//! The monitor's process.

use super::kernel::Kernel;
use super::process::Process;
use command_fds::{CommandFdExt, FdMapping};
use lighter_protocol::monitor::{
    Console, Disk, Event, EventKind, HostPort, Kernel as KernelFile, Machine, Net, NetKind, Request,
    Response, Share, Snapshot, Start, StopReason, Vsock,
};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;
use tempfile::TempDir;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How much is kept of the console.
pub const CONSOLE_BYTES: u64 = 16 << 10;

/// What to start; the fields are what tests vary.
pub struct Setup {
    program: PathBuf,
    kernel: Kernel,
    folder: TempDir,
    /// vCPUs.
    pub cpus: u16,
    /// Guest memory, MiB.
    pub memory_mib: u64,
    /// Kernel command line.
    pub command_line: String,
    /// /dev/kvm, or something else that a supervisor may hand over by mistake.
    pub kvm: OwnedFd,
    /// The disk's file; one of its own by default.
    pub disk: Option<PathBuf>,
    /// Layers above the disk's file, the lowest first.
    pub layers: Vec<File>,
    /// The disk's length, bytes.
    pub disk_length: u64,
    /// What it starts from instead of the kernel: a snapshot's state and memory.
    pub snapshot: Option<[File; 2]>,
    /// What of its memory was touched by another that went on from it.
    pub working_set: Option<File>,
    /// The other end of a network device, if there is to be one.
    pub net: Option<UnixStream>,
    /// A folder to share, if one is to be.
    pub share: Option<PathBuf>,
    /// Whether all layers of the monitor's cage have to be there.
    pub strict: bool,
    /// Variables of the monitor's environment.
    pub environment: Vec<(&'static str, &'static str)>,
}

impl Setup {
    /// The monitor `program` (`lighter-vmm`) with one vCPU, 64 MiB and a disk of 1 MiB.
    pub fn new(program: &str, kernel: Kernel) -> Self {
        Self {
            program: program.into(),
            kernel,
            folder: TempDir::new().unwrap(),
            cpus: 1,
            memory_mib: 64,
            command_line: "quiet".into(),
            kvm: OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .expect("these tests need /dev/kvm")
                .into(),
            disk: None,
            layers: vec![],
            disk_length: 1 << 20,
            snapshot: None,
            working_set: None,
            net: None,
            share: None,
            strict: false,
            environment: vec![],
        }
    }

    /// The disk's file.
    pub fn disk_path(&self) -> PathBuf {
        self.disk
            .clone()
            .unwrap_or_else(|| self.folder.path().join("disk"))
    }

    /// Starts the monitor.
    pub fn start(self) -> Vm {
        let path = |name: &str| self.folder.path().join(name);
        let open = |path: PathBuf| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .unwrap()
        };
        let disk = open(self.disk_path());
        disk.set_len(self.disk_length).unwrap();
        let mut kernel = open(path("kernel"));
        kernel.write_all(&self.kernel.to_bytes()).unwrap();
        kernel.rewind().unwrap();
        let control = UnixListener::bind(path("control")).unwrap();
        let muxer = UnixListener::bind(path("vsock")).unwrap();
        let (events, events_child) = UnixStream::pair().unwrap();
        let (connections, connections_child) = UnixStream::pair().unwrap();

        let mut mappings: Vec<FdMapping> = vec![];
        let mut give = |parent_fd: OwnedFd| {
            let child_fd = 10 + mappings.len() as i32;
            mappings.push(FdMapping { parent_fd, child_fd });
            child_fd
        };
        let machine = Machine {
            name: "tiny".into(),
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            kvm: give(self.kvm),
            start: match self.snapshot {
                Some([state, memory]) => Start::Snapshot(Snapshot {
                    state: give(state.into()),
                    memory: give(memory.into()),
                    working_set: self.working_set.map(|noted| give(noted.into())),
                }),
                None => Start::Kernel(KernelFile {
                    image: give(kernel.into()),
                    command_line: self.command_line,
                }),
            },
            disks: vec![Disk {
                id: "test".into(),
                file: give(disk.into()),
                layers: self.layers.into_iter().map(|layer| give(layer.into())).collect(),
                read_only: false,
            }],
            net: self.net.map(|net| Net {
                mac: [2, 0, 0, 0, 0, 2],
                mtu: 65_520,
                kind: NetKind::Stream,
                plug: Some(give(net.into())),
            }),
            shares: self
                .share
                .into_iter()
                .map(|path| Share {
                    tag: "tiny".into(),
                    path: path.display().to_string(),
                    folder: give(File::open(path).unwrap().into()),
                    read_only: false,
                })
                .collect(),
            vsock: Vsock {
                guest_cid: 3,
                muxer: give(muxer.into()),
                host_ports: vec![HostPort {
                    port: 1024,
                    connections: give(connections_child.into()),
                }],
            },
            console: Some(Console {
                log: give(open(path("console")).into()),
                max_bytes: CONSOLE_BYTES,
            }),
            control: give(control.into()),
            events: give(events_child.into()),
            strict: self.strict,
        };
        let mut started = Command::new(&self.program)
            .arg("run")
            .envs(self.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .fd_mappings(mappings)
            .unwrap()
            .spawn()
            .unwrap();
        started
            .stdin
            .take()
            .unwrap()
            .write_all(&serde_json::to_vec(&machine).unwrap())
            .unwrap();
        Vm {
            process: Process::of(started),
            events: BufReader::new(events),
            folder: self.folder,
            connections: Some(connections),
        }
    }
}

/// A started monitor; killed when dropped.
pub struct Vm {
    process: Process,
    events: BufReader<UnixStream>,
    folder: TempDir,
    connections: Option<UnixStream>,
}

impl Vm {
    /// The next event, or `None` when the monitor has closed its end.
    fn event(&mut self) -> Option<Event> {
        let mut line = String::new();
        self.events.read_line(&mut line).unwrap();
        (!line.is_empty()).then(|| serde_json::from_str(&line).unwrap())
    }

    /// Everything that happens until the monitor has ended.
    pub fn events_to_the_end(&mut self) -> Vec<EventKind> {
        std::iter::from_fn(|| self.event())
            .map(|event| event.kind)
            .collect()
    }

    /// Waits for an event; returns its time.
    pub fn wait_for(&mut self, wanted: &EventKind) -> u64 {
        let mut last = None;
        loop {
            let event = self.event();
            let event = event.unwrap_or_else(|| {
                panic!("the monitor ended before {wanted:?}, its last event was {last:?}")
            });
            if event.kind == *wanted {
                return event.monotonic_ns;
            }
            last = Some(event.kind);
        }
    }

    /// Waits for the end, and why.
    pub fn stop_reason(&mut self) -> StopReason {
        match self.events_to_the_end().pop() {
            Some(EventKind::Stopped { reason }) => reason,
            other => panic!("the last event is {other:?}"),
        }
    }

    /// Kills the monitor, and waits until nobody holds its end of the events any more: neither it nor a process of its own.
    pub fn kill(&mut self) {
        self.process.kill();
        while self.event().is_some() {}
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where the guest's connections to the host's port come; once.
    pub fn connections(&mut self) -> UnixStream {
        self.connections.take().unwrap()
    }

    /// Connects to a port of the guest's.
    pub fn connect_guest(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("vsock")).unwrap()
    }

    /// Reads events from here on where nobody waits for them: the end of the thread is the monitor's, and it returns all of them.
    pub fn collect_events(&mut self) -> JoinHandle<Vec<EventKind>> {
        let events = BufReader::new(self.events.get_ref().try_clone().unwrap());
        std::thread::spawn(move || {
            let lines = events.lines().map_while(Result::ok);
            lines
                .map(|line| serde_json::from_str::<Event>(&line).unwrap().kind)
                .collect()
        })
    }

    /// Waits for the end of the process.
    pub fn exit_code(&mut self) -> i32 {
        self.process
            .wait()
            .code()
            .expect("the monitor was ended by a signal")
    }

    /// What the guest has written to its console.
    pub fn console(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("console")).unwrap()
    }

    /// A connection to the control socket.
    pub fn connect_control(&self) -> UnixStream {
        self.try_connect_control().unwrap()
    }

    fn try_connect_control(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.folder.path().join("control"))
    }

    /// Saves the paused VM into new files in `folder`, `state` and `memory`; returns them, opened for reading. The end is
    /// an event.
    pub fn save(&mut self, folder: &Path) -> [File; 2] {
        let paths = ["state", "memory"].map(|name| folder.join(name));
        let files = paths.each_ref().map(|path| File::create_new(path).unwrap());
        let response = self.request_with(&Request::Save, &files);
        assert_eq!(response, Response::Done);
        paths.map(|path| File::open(path).unwrap())
    }

    /// Asks on the control socket, with `files`.
    pub fn request_with(&mut self, request: &Request, files: &[File]) -> Response {
        let stream = self.connect_control();
        let line = [serde_json::to_vec(request).unwrap(), b"\n".to_vec()].concat();
        let numbers: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        stream.send_with_fds(&[&line[..]], &numbers).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    /// Asks on the control socket.
    pub fn request(&mut self, request: &Request) -> Response {
        self.try_request(request).unwrap()
    }

    /// Asks on the control socket of a monitor that may end at any time.
    ///
    /// # Errors
    /// When the monitor has ended.
    pub fn try_request(&mut self, request: &Request) -> std::io::Result<Response> {
        let mut stream = self.try_connect_control()?;
        stream.write_all(&[serde_json::to_vec(request)?, b"\n".to_vec()].concat())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// Lines from a stream.
pub struct Lines(BufReader<UnixStream>);

impl Lines {
    /// Reads from `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// The next line, with its end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }
}

/// A monitor with `text` as its description, run to its end.
pub fn run_with_stdin(program: &Path, text: &str) -> Output {
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    Command::new(program).arg("run").stdin(file).output().unwrap()
}
