//! Escapes, tried: by copies of this process, each of which goes into a cage and then asks for what it must not get.

use libtest_mimic::{Arguments, Failed, Trial};
use lighter_protocol::monitor::Layer;
use lighter_vmm::cage::Cage;
use lighter_vmm::cage::filters::{Duty, Mode, apply};
use lighter_vmm::cage::processes::{self, Parent, Split, Standing};
use lighter_vmm::cage::reach;
use lighter_vmm::virtio::device_type;
use rustix::fs::OFlags;
use rustix::process::Resource;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

const FILTERS: &str = include_str!("../src/cage/filters.json");

const DUTIES: [(&str, Duty); 8] = [
    ("main", Duty::Main),
    ("vcpu", Duty::Vcpu),
    ("block", Duty::Block),
    ("net", Duty::Net),
    ("vsock", Duty::Vsock),
    ("fs", Duty::Fs),
    ("memory", Duty::Memory),
    ("prefetch", Duty::Prefetch),
];

/// More than any kernel has.
const CALLS: i64 = 512;

/// uretprobe and uprobe: no filter sees them, and the kernel takes them from its own pages only.
const TRAMPOLINES: [i64; 2] = [335, 336];

const NOBODY: libc::uid_t = 65534;

macro_rules! calls {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

/// The system calls that the lists name.
const NUMBERS: &[(&str, i64)] = calls![
    SYS_accept4 SYS_brk SYS_capget SYS_capset SYS_clock_gettime SYS_clock_nanosleep SYS_clone SYS_clone3
    SYS_close SYS_close_range SYS_copy_file_range SYS_dup SYS_dup2 SYS_epoll_create1 SYS_epoll_ctl
    SYS_epoll_wait SYS_exit SYS_exit_group SYS_fadvise64 SYS_fallocate SYS_fchdir SYS_fchmod SYS_fchmodat
    SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr SYS_fremovexattr SYS_fsetxattr SYS_fstatfs SYS_fsync
    SYS_ftruncate SYS_futex SYS_getdents64 SYS_getegid SYS_geteuid SYS_getpid SYS_getppid SYS_getrandom
    SYS_gettid SYS_getxattr SYS_io_uring_enter SYS_ioctl SYS_linkat SYS_listxattr SYS_lseek SYS_madvise
    SYS_memfd_create SYS_mkdirat SYS_mknodat SYS_mmap SYS_mprotect SYS_mremap SYS_munmap SYS_name_to_handle_at SYS_openat SYS_openat2
    SYS_poll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read
    SYS_readlinkat SYS_recvfrom SYS_recvmsg SYS_removexattr SYS_renameat2 SYS_restart_syscall SYS_rseq
    SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_getaffinity SYS_sched_yield SYS_sendmsg SYS_sendto
    SYS_set_robust_list SYS_setresgid SYS_setresuid SYS_setxattr SYS_shutdown SYS_sigaltstack SYS_socketpair
    SYS_statx SYS_symlinkat SYS_syncfs SYS_tgkill SYS_umask SYS_unlinkat SYS_utimensat SYS_wait4 SYS_write
];

fn main() {
    let mut arguments = Arguments::from_args();
    // A copy has one thread, and must find no lock taken by another.
    arguments.test_threads = Some(1);
    let mut trials = vec![
        Trial::test(
            "calls_with_other_arguments_than_the_listed_are_death",
            other_arguments,
        ),
        Trial::test("a_caged_process_of_a_user_has_nothing", || caged(NOBODY)),
        Trial::test("a_thread_of_a_folder_does_not_leave_it", folder),
    ];
    // Nobody but root is root.
    if is_root() {
        trials.push(Trial::test("a_caged_process_of_root_has_nothing", || caged(0)));
    }
    for (name, duty) in DUTIES {
        let test = move || every_other_call(name, duty);
        trials.push(Trial::test(
            format!("{name}_dies_of_every_call_that_is_not_in_its_list"),
            test,
        ));
    }
    libtest_mimic::run(&arguments, trials).exit()
}

/// What became of a copy of this process that did `act`: its exit code, or the signal that ended it, negative.
fn copy(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: this process has one thread, so the copy is a whole process.
    let process = unsafe {
        let process = libc::fork();
        if process == 0 {
            libc::_exit(act());
        }
        process
    };
    ended(process)
}

/// Waits for the end of a child: its exit code, or the signal that ended it, negative.
fn ended(process: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is valid for writing.
    assert_eq!(unsafe { libc::waitpid(process, &raw mut status, 0) }, process);
    match libc::WIFSIGNALED(status) {
        true => -libc::WTERMSIG(status),
        false => libc::WEXITSTATUS(status),
    }
}

/// Has a copy of this process `act` as the first in a namespace of processes; what became of it.
fn first_process(act: impl FnOnce(Standing) -> i32) -> i32 {
    match processes::split(Parent::This) {
        Split::GoesOn(standing) => act(standing),
        Split::Before(process) => ended(process),
    }
}

/// Whether that became of `who` which should.
fn ended_with(end: i32, wanted: i32, who: &str) -> Result<(), Failed> {
    match end == wanted {
        true => Ok(()),
        false => Err(format!("{who}: ended with {end}, not {wanted}").into()),
    }
}

/// An exit code that tells which of `tries` was the first to be `wrong`; 0 when none was.
fn first(tries: &[bool], wrong: bool) -> i32 {
    let first = tries.iter().position(|one| *one == wrong);
    first.map_or(0, |first| 10 + first as i32)
}

/// What becomes of a thread for `duty` that makes a system call.
fn becomes_of(duty: Duty, number: i64, arguments: [u64; 6]) -> i32 {
    let [a, b, c, d, e, f] = arguments;
    copy(|| {
        if apply(duty, Mode::Kill).is_err() {
            return 1;
        }
        // SAFETY: the call is never made, or has null pointers where it has pointers; the process ends next.
        unsafe { libc::syscall(number, a, b, c, d, e, f) };
        0
    })
}

fn every_other_call(name: &str, duty: Duty) -> Result<(), Failed> {
    let lists: Value = serde_json::from_str(FILTERS).map_err(|error| error.to_string())?;
    let rules = ["every", name].map(|list| lists[list].as_array().expect("it is a list"));
    let listed: BTreeSet<i64> = rules
        .into_iter()
        .flatten()
        .map(|rule| {
            let name = format!("SYS_{}", rule["syscall"].as_str().unwrap_or_default());
            let found = NUMBERS.iter().find(|(known, _)| *known == name);
            found
                .unwrap_or_else(|| panic!("{name} is not in this test's table"))
                .1
        })
        .collect();
    let tried = |number: &i64| !listed.contains(number) && !TRAMPOLINES.contains(number);
    for number in (0..CALLS).filter(tried) {
        let end = becomes_of(duty, number, [0; 6]);
        ended_with(end, -libc::SIGSYS, &format!("who made call {number}"))?;
    }
    Ok(())
}

fn other_arguments() -> Result<(), Failed> {
    const EXEC: u64 = libc::PROT_EXEC as u64 | libc::PROT_READ as u64;
    let fork = libc::SIGCHLD as u64;
    let new_user = fork | libc::CLONE_NEWUSER as u64;
    let tries: &[(&str, Duty, i64, [u64; 6])] = &[
        (
            "code is mapped",
            Duty::Vcpu,
            libc::SYS_mmap,
            [0, 4096, EXEC, 0x22, u64::MAX, 0],
        ),
        (
            "memory becomes code",
            Duty::Block,
            libc::SYS_mprotect,
            [0, 4096, EXEC, 0, 0, 0],
        ),
        (
            "a process is made",
            Duty::Main,
            libc::SYS_clone,
            [fork, 0, 0, 0, 0, 0],
        ),
        (
            "a user namespace is made",
            Duty::Main,
            libc::SYS_clone,
            [new_user, 0, 0, 0, 0, 0],
        ),
        (
            "a terminal gets input",
            Duty::Main,
            libc::SYS_ioctl,
            [0, libc::TIOCSTI, 0, 0, 0, 0],
        ),
        (
            "a VM is made",
            Duty::Vcpu,
            libc::SYS_ioctl,
            [0, 0xae01, 0, 0, 0, 0],
        ),
        (
            "a packet has an address",
            Duty::Net,
            libc::SYS_sendto,
            [0, 0, 0, 0, 8, 16],
        ),
        (
            "a stranger is killed",
            Duty::Main,
            libc::SYS_tgkill,
            [1, 1, 9, 0, 0, 0],
        ),
        (
            "signals of a socket go elsewhere",
            Duty::Vsock,
            libc::SYS_fcntl,
            [0, 8, 1, 0, 0, 0],
        ),
        (
            "it is dumped again",
            Duty::Main,
            libc::SYS_prctl,
            [4, 1, 0, 0, 0, 0],
        ),
        (
            "a capability is kept",
            Duty::Fs,
            libc::SYS_prctl,
            [47, 2, 1, 0, 0, 0],
        ),
    ];
    for (what, duty, number, arguments) in tries {
        let end = becomes_of(*duty, *number, *arguments);
        ended_with(end, -libc::SIGSYS, what)?;
    }
    // What fails for good ends by its own signal, and not by the filter's.
    for (_, duty) in DUTIES {
        let end = copy(|| match apply(duty, Mode::Kill) {
            Ok(()) => std::process::abort(),
            Err(_) => 1,
        });
        ended_with(end, -libc::SIGABRT, "who aborts")?;
    }
    // glibc makes threads by clone where there is no clone3, whose flags no filter sees.
    let missing = copy(|| {
        let applied = apply(Duty::Main, Mode::Kill).is_ok();
        // SAFETY: never made.
        let made = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
        // SAFETY: errno is this thread's.
        i32::from(!(applied && made == -1 && unsafe { *libc::__errno_location() } == libc::ENOSYS))
    });
    ended_with(missing, 0, "who made clone3")
}

/// Whether root runs this test, who can be anybody.
fn is_root() -> bool {
    // SAFETY: cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Becomes `user`, if it can, as a program would be that this user started.
fn become_user(user: libc::uid_t) -> bool {
    // SAFETY: these take no pointers but an empty list.
    user == 0
        || unsafe {
            libc::setgroups(0, std::ptr::null()) == 0
                && libc::setgid(user) == 0
                && libc::setuid(user) == 0
                && libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
        }
}

/// Tries, in the cage, what needs no filter to be refused: so each other layer is seen by itself. The number is that of the first
/// that was had.
fn try_all() -> i32 {
    // SAFETY: system calls with strings that end with zero, or none.
    let refused: [bool; 7] = unsafe {
        [
            fs::read_dir("/").is_ok_and(|entries| entries.count() == 0),
            File::open("/etc/passwd").is_err() && File::open("/proc/self/mem").is_err(),
            fs::write("/tmp/x", "x").is_err() && fs::create_dir("/x").is_err(),
            libc::unshare(libc::CLONE_NEWNS) < 0,
            libc::sethostname(c"x".as_ptr(), 1) < 0,
            std::net::UdpSocket::bind("0.0.0.0:0").is_err()
                || std::net::UdpSocket::bind("0.0.0.0:0")
                    .is_ok_and(|socket| socket.connect("192.0.2.1:9").is_err()),
            libc::prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        ]
    };
    first(&refused, false)
}

/// What this process's namespaces are called, by a descriptor of its folder `ns` in /proc.
fn namespaces(folder: &File) -> Vec<std::ffi::CString> {
    [c"mnt", c"net", c"ipc", c"uts", c"cgroup", c"pid"]
        .into_iter()
        .filter_map(|name| rustix::fs::readlinkat(folder, name, vec![]).ok())
        .collect()
}

/// How many file systems there are for the process whose namespaces `own` is the folder of.
fn mounts(own: &File) -> Option<usize> {
    let file = rustix::fs::openat(own, c"../mountinfo", OFlags::RDONLY, rustix::fs::Mode::empty()).ok()?;
    let text = std::io::read_to_string(File::from(file)).ok()?;
    Some(text.lines().count())
}

/// Whether the process may use as much of the host as it should, and no more.
fn is_limited(memory: u64, user: libc::uid_t) -> bool {
    let most = |resource| rustix::process::getrlimit(resource).maximum;
    most(Resource::Core) == Some(0)
        && most(Resource::As) == Some(memory)
        // Root's tasks are not counted by its namespaces.
        && (user == 0 || most(Resource::Nproc).is_some_and(|tasks| tasks < 1000))
}

fn caged(user: libc::uid_t) -> Result<(), Failed> {
    let open = || File::open("/proc/self/ns");
    let end = copy(|| {
        if is_root() && !become_user(user) {
            return 1;
        }
        let Ok(before) = open() else { return 1 };
        let before = namespaces(&before);
        first_process(|standing| match open() {
            Ok(own) => in_the_cage(user, standing, &own, &before),
            Err(_) => 1,
        })
    });
    ended_with(end, 0, "the copy")
}

/// Goes into the cage and looks around. `own` is the folder of this process's namespaces, and `before` are those it came from.
fn in_the_cage(user: libc::uid_t, standing: Standing, own: &File, before: &[std::ffi::CString]) -> i32 {
    const MEMORY: u64 = 1 << 30;
    let Ok(report) = Cage::enter(MEMORY, standing).and_then(|entering| entering.wait(true)) else {
        return 2;
    };
    if report.namespaces != Layer::On || lighter_vmm::cage::privileges::give_up(false).is_err() {
        return 3;
    }
    let now = namespaces(own);
    if now.len() != 6 || before.iter().zip(&now).any(|(before, now)| before == now) {
        return 4;
    }
    if !is_limited(MEMORY, user) {
        return 5;
    }
    // The empty root, and nothing on it: what lay there could be reached by `/..`.
    if mounts(own) != Some(1) {
        return 6;
    }
    // SAFETY: takes no pointers. Signals go to oneself alone, and to all that have a number: nobody.
    let alone = unsafe { libc::getpid() == 1 && libc::getppid() == 0 && libc::kill(-1, libc::SIGKILL) < 0 };
    if !alone {
        return 7;
    }
    // Without Landlock there is an empty root; with it, not even that can be listed.
    let end = try_all();
    if end != 0 {
        return end;
    }
    i32::from(reach::nothing().is_err() || fs::read_dir("/").is_ok())
}

fn folder() -> Result<(), Failed> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    fs::write(folder.path().join("inside"), "x").map_err(|error| error.to_string())?;
    std::os::unix::fs::symlink("/etc/passwd", folder.path().join("link"))
        .map_err(|error| error.to_string())?;
    let root = File::open("/").map_err(|error| error.to_string())?;
    let opened = File::open(folder.path()).map_err(|error| error.to_string())?;
    let inside = |standing| {
        let Ok(entering) = Cage::enter(1 << 30, standing) else {
            return 1;
        };
        let cage = entering.cage();
        if entering.wait(true).is_err() {
            return 1;
        }
        let Ok(place) = opened.try_clone() else {
            return 2;
        };
        let prepare = cage.prepare(device_type::FS, Box::new(move || reach::folder(&place, false)));
        if prepare().is_err() {
            return 3;
        }
        // SAFETY: a string that ends with zero; what is opened is not used.
        let opens =
            |at: i32, path: &std::ffi::CStr| unsafe { libc::openat(at, path.as_ptr(), libc::O_RDONLY) >= 0 };
        let reached = [
            !opens(opened.as_raw_fd(), c"inside"),
            opens(opened.as_raw_fd(), c".."),
            opens(opened.as_raw_fd(), c"../../etc/passwd"),
            opens(opened.as_raw_fd(), c"link"),
            // Somebody left a descriptor behind.
            opens(root.as_raw_fd(), c"etc/passwd"),
            opens(libc::AT_FDCWD, c"/etc/passwd"),
        ];
        first(&reached, true)
    };
    let end = copy(|| first_process(inside));
    ended_with(end, 0, "the copy")
}
