//! What the monitor gets: its description of the machine, and the open files and sockets that it names.

use super::network::Device;
use super::ports::policy::Policy;
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::logs::Source;
use crate::mounts::Mount;
use crate::paths::Paths;
use crate::snapshots::base::Base;
use crate::snapshots::booted;
use crate::vm::Vm;
use command_fds::FdMapping;
use lighter_protocol::monitor::{
    Console, Disk, HostPort, Kernel, Machine, Net, Share, Snapshot, Start, Vsock,
};
use lighter_protocol::network::GuestNetwork;
use lighter_protocol::ports::{GUEST_CID, HOST_CONTROL, HOST_NAMES, HOST_PUBLISH};
use lighter_protocol::publish::RandomPorts;
use lighter_protocol::shares::{self, GuestShare};
use lighter_protocol::supervisor::UsedFile;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The serial console's log, bytes.
const CONSOLE_BYTES: u64 = 4 << 20;

/// The data disk, as the monitor knows it.
pub const DATA_DISK: &str = "data";

/// The first descriptor after the standard streams.
const FIRST_FD: RawFd = 3;

/// A machine that is ready to be started, and the supervisor's ends of its connections.
#[derive(Debug)]
pub struct Prepared {
    /// For the monitor's standard input.
    pub machine: Machine,
    /// The descriptors that the machine names.
    pub inherited: Vec<FdMapping>,
    /// Where the monitor's events arrive.
    pub events: OwnedFd,
    /// Where the agent's connections arrive.
    pub agent: OwnedFd,
    /// Where the guest's questions about names arrive.
    pub names: OwnedFd,
    /// Where those of the proxies of published ports do.
    pub proxies: OwnedFd,
    /// Which addresses those get.
    pub policy: Policy,
    /// The kernel and the image that are booted.
    pub booted_from: [UsedFile; 2],
    /// The shared folders.
    pub mounts: Vec<Mount>,
}

/// What the guest's kernel is told by whatever monitor. `no-kvmapf`: asynchronous page faults hang guests on emulated
/// CPUs. `initcall_blacklist`: a random generator that lives on the jitter of the processor tests
/// itself for half of the kernel's start, and the kernel does without where the monitor gives random numbers; a folder of
/// files for each kind of kernel memory is made, which nobody reads (/sys/kernel/slab). `rcu_expedited`: who waits until no
/// processor reads any more what was replaced (mounts, network namespaces, packet filters: containers do that all the time) would
/// wait for ticks of the clock otherwise. `noreplace-smp`: with one processor the kernel would take away thousands of lock
/// prefixes, one after another, which cost next to nothing where they are.
pub const COMMON_COMMAND_LINE: &str = "console=ttyS0 quiet loglevel=4 root=/dev/vda rootfstype=erofs ro init=/sbin/init \
    no-kvmapf initcall_blacklist=jent_mod_init,slab_late_init rcupdate.rcu_expedited=1 noreplace-smp";

/// What it is told where there is no PCI: not to scan it, nor to tell on the console that it has no way to do so.
pub const NO_PCI: &str = "pci=off initcall_blacklist=pci_arch_init";

/// The longest command line that a kernel takes, bytes.
const COMMAND_LINE_BYTES: usize = 2047;

/// What the kernel's command line says of this VM alone: a guest that goes on from a snapshot has that of another.
pub fn words_of_vm(random_ports: Option<&RandomPorts>, socket: &Path) -> String {
    let socket = shares::socket_word(socket);
    match random_ports {
        Some(ports) => format!("{ports} {socket}"),
        None => socket,
    }
}

/// The kernel's command line.
fn kernel_command_line(
    announce: bool,
    network: Option<&GuestNetwork>,
    random_ports: Option<&RandomPorts>,
    shares: &[GuestShare],
    socket: &Path,
) -> Result<String> {
    // A panic ends the VM at once.
    let mut line = format!("{COMMON_COMMAND_LINE} {NO_PCI} panic=-1 reboot=t");
    if announce {
        line.extend([" ", lighter_protocol::announce::WORD]);
    }
    if let Some(network) = network {
        line += &format!(" {network}");
    }
    line += &format!(" {}", words_of_vm(random_ports, socket));
    for share in shares {
        line += &format!(" {share}");
    }
    if line.len() > COMMAND_LINE_BYTES {
        let error = format!(
            "the paths of the shared folders are too long together: they make a kernel command line of {} bytes, and it \
             has room for {COMMAND_LINE_BYTES}",
            line.len()
        );
        return Err(Error::failure(error).hint("share a folder that holds several of them, or fewer folders"));
    }
    Ok(line)
}

/// Opens the shared folders: for the monitor, and for the guest.
fn open_shares(mounts: &[Mount], inherited: &mut Inherited) -> Result<(Vec<Share>, Vec<GuestShare>)> {
    let mut both = (vec![], vec![]);
    for (number, mount) in mounts.iter().enumerate() {
        let tag = format!("share{number}");
        both.0.push(Share {
            tag: tag.clone(),
            path: mount.path.display().to_string(),
            folder: inherited.add(mount.open()?),
            read_only: mount.read_only,
        });
        both.1.push(GuestShare {
            tag,
            path: mount.path.clone(),
            read_only: mount.read_only,
        });
    }
    Ok(both)
}

/// Collects descriptors and numbers them.
#[derive(Default)]
pub struct Inherited(Vec<FdMapping>);

impl Inherited {
    /// Adds one, and returns its number in the monitor.
    pub fn add(&mut self, descriptor: impl Into<OwnedFd>) -> RawFd {
        let child_fd = FIRST_FD + RawFd::try_from(self.0.len()).expect("there are a dozen descriptors");
        self.0.push(FdMapping {
            parent_fd: descriptor.into(),
            child_fd,
        });
        child_fd
    }

    /// For the monitor's start.
    pub fn into_mappings(self) -> Vec<FdMapping> {
        self.0
    }
}

/// Opens everything that the monitor of `vm` needs, to boot it or to go on from `base`. `network` is its network device,
/// `random_ports` are the guest's.
///
/// # Errors
/// What cannot be opened, with what to do.
pub fn prepare(
    paths: &Paths,
    vm: &Vm,
    base: Option<&Base>,
    network: Option<Device>,
    random_ports: Option<&RandomPorts>,
) -> Result<Prepared> {
    let config = Config::load(&paths.config_file)?;
    // First: a host without it needs no kernel.
    let kvm = open_kvm()?;
    let [mut kernel, mut image] = artifacts(paths, &vm.settings.kernel, &vm.settings.image, &config);
    if let Some(base) = base {
        [kernel.path, image.path] = base.booted(paths, &config)?;
    }
    let [kernel_file, image_file] = [kernel.open()?, image.open()?];
    let booted_from = [
        booted::used(&kernel.path, &kernel_file).context(|| kernel.path.display().to_string())?,
        booted::used(&image.path, &image_file).context(|| image.path.display().to_string())?,
    ];
    let mut inherited = Inherited::default();
    let (events, events_of_monitor) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .context(|| "cannot make a pipe for the monitor's events".into())?;
    let mut host_ports = vec![];
    let mut host_port = |port| -> Result<OwnedFd> {
        let (ours, monitors) = connections()?;
        host_ports.push(HostPort {
            port,
            connections: inherited.add(monitors),
        });
        Ok(ours)
    };
    let agent = host_port(HOST_CONTROL)?;
    let names = host_port(HOST_NAMES)?;
    let proxies = host_port(HOST_PUBLISH)?;
    let mounts = vm.settings.mounts();
    let (shares, guest_shares) = open_shares(&mounts, &mut inherited)?;
    let start = match base {
        None => Start::Kernel(Kernel {
            image: inherited.add(kernel_file),
            command_line: kernel_command_line(
                vm.settings.announce,
                network.as_ref().map(|device| &device.guest),
                random_ports,
                &guest_shares,
                &vm.paths.docker_socket(),
            )?,
        }),
        Some(base) => {
            let [state, memory] = base.open()?;
            Start::Snapshot(Snapshot {
                state: inherited.add(state),
                memory: inherited.add(memory),
                working_set: base.working_set().map(|noted| inherited.add(noted)),
            })
        }
    };
    vm.disk()?.sweep();
    let mut disk = vm.open_disk()?.into_iter().map(|file| inherited.add(file));
    let data = Disk {
        id: DATA_DISK.into(),
        file: disk.next().unwrap_or(-1),
        layers: disk.collect(),
        read_only: false,
    };
    let machine = Machine {
        name: vm.name.to_string(),
        cpus: vm.settings.cpus,
        memory_mib: vm.settings.memory.mib(),
        kvm: inherited.add(kvm),
        start,
        disks: vec![
            Disk {
                id: "image".into(),
                file: inherited.add(image_file),
                layers: vec![],
                read_only: true,
            },
            data,
        ],
        net: network.map(|device| Net {
            mac: device.mac,
            mtu: device.mtu,
            kind: device.kind,
            plug: device.plug.map(|plug| inherited.add(plug)),
        }),
        shares,
        vsock: Vsock {
            guest_cid: GUEST_CID,
            muxer: inherited.add(listen(&vm.paths.vsock_socket())?),
            host_ports,
        },
        console: Some(Console {
            log: inherited.add(open_console(&vm.paths.log(Source::Console))?),
            max_bytes: CONSOLE_BYTES,
        }),
        control: inherited.add(listen(&vm.paths.monitor_socket())?),
        events: inherited.add(events_of_monitor),
        strict: vm.settings.strict,
    };
    Ok(Prepared {
        machine,
        inherited: inherited.into_mappings(),
        events,
        agent,
        names,
        proxies,
        policy: Policy {
            default_address: vm.settings.ports.default_address.or(config.ports.default_address),
        },
        booted_from,
        mounts,
    })
}

/// A socket pair on which the monitor passes connections of the guest: our end and its own.
fn connections() -> Result<(OwnedFd, OwnedFd)> {
    let kind = SocketType::SEQPACKET;
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)
        .context(|| "cannot make a socket pair for the guest's connections".into())
}

/// A file that the guest boots from, and who says that it is this one.
struct Artifact {
    what: &'static str,
    path: PathBuf,
    installed: bool,
}

/// The VM's own setting, else the environment, else the configuration, else the installed file.
fn artifact(
    what: &'static str,
    setting: &Option<PathBuf>,
    variable: &str,
    configured: Option<PathBuf>,
    installed: PathBuf,
) -> Artifact {
    let environment = || {
        std::env::var_os(variable)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let chosen = setting.clone().or_else(environment).or(configured);
    Artifact {
        what,
        installed: chosen.is_none(),
        path: chosen.unwrap_or(installed),
    }
}

impl Artifact {
    fn open(&self) -> Result<File> {
        let failed = |why: String| {
            let error = Error::failure(format!(
                "cannot use the guest {} {}: {why}",
                self.what,
                self.path.display()
            ));
            if self.installed {
                error.hint("run scripts/quickstart in Lighter's source, which builds and installs it")
            } else {
                error.hint(format!(
                    "give the right file with --{}, or leave it out to use the installed one",
                    self.what
                ))
            }
        };
        let file = File::open(&self.path).map_err(|error| failed(error.to_string()))?;
        let metadata = file.metadata().map_err(|error| failed(error.to_string()))?;
        if !metadata.is_file() {
            return Err(failed("it is not a regular file".into()));
        }
        if metadata.len() == 0 {
            return Err(failed("it is empty".into()));
        }
        Ok(file)
    }
}

fn artifacts(
    paths: &Paths,
    kernel: &Option<PathBuf>,
    image: &Option<PathBuf>,
    config: &Config,
) -> [Artifact; 2] {
    [
        artifact(
            "kernel",
            kernel,
            "LIGHTER_KERNEL",
            config.kernel.clone(),
            paths.kernel(),
        ),
        artifact(
            "image",
            image,
            "LIGHTER_IMAGE",
            config.image.clone(),
            paths.image(),
        ),
    ]
}

/// The kernel and the image that a VM boots from.
pub fn artifact_paths(
    paths: &Paths,
    kernel: &Option<PathBuf>,
    image: &Option<PathBuf>,
    config: &Config,
) -> [PathBuf; 2] {
    artifacts(paths, kernel, image, config).map(|artifact| artifact.path)
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// When it is not there or not for this user, with what to do.
pub fn open_kvm() -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map_err(|error| {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => {
                "this host has no KVM: turn on virtualisation in the firmware and load kvm_intel or kvm_amd"
            }
            io::ErrorKind::PermissionDenied => {
                "join the group that owns it (sudo usermod -aG kvm $USER), then log in anew"
            }
            _ => "lighter doctor looks closer",
        };
        Error::failure(format!("cannot open /dev/kvm: {error}")).hint(hint)
    })
}

/// A new log for this boot; the last boot's is kept as `.1`.
fn open_console(path: &Path) -> Result<File> {
    let mut old = path.as_os_str().to_owned();
    old.push(".1");
    match std::fs::rename(path, old) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
    .and_then(|()| {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
    })
    .context(|| format!("cannot make the console log {}", path.display()))
}

/// Listens at `path`, which only this user may connect to. The caller holds the VM's life lock, so that what is there is
/// stale.
///
/// # Errors
/// When it cannot.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let listen = || {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    listen().context(|| format!("cannot listen on {}", path.display()))
}
