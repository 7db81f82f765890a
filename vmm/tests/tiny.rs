//! The monitor as a process, with guests of a few instructions: what a supervisor relies on. They need /dev/kvm, but none
//! that runs Linux.

use lighter_protocol::monitor::{EventKind, Request, Response, RunState, StopReason};
use lighter_tests::tiny_guest::{self, CONSOLE_BYTES, Kernel, Lines, Vm};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

const MONITOR: &str = env!("CARGO_BIN_EXE_lighter-vmm");

fn setup(kernel: Kernel) -> tiny_guest::Setup {
    tiny_guest::Setup::new(MONITOR, kernel)
}

/// `mov dx, port; mov al, value; out dx, al` in 32- and 64-bit code.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

const SERIAL: u16 = 0x3f8;
/// A port nobody listens on: every write is an exit and nothing else.
const NOBODY: u16 = 0x80;

fn power_off() -> Vec<u8> {
    out(0x600, 5 << 2 | 1 << 5)
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(SERIAL, byte)).collect()
}

/// Runs `body` for ever.
fn forever(body: &[u8]) -> Vec<u8> {
    let back = -(i32::try_from(body.len()).unwrap() + 5);
    [body, &[0xe9], &back.to_le_bytes()].concat()
}

fn spinning() -> Kernel {
    Kernel::Pvh(forever(&out(NOBODY, 0)))
}

#[test]
fn a_guest_that_powers_off_ends_the_monitor_cleanly_and_its_console_is_kept() {
    for kernel in [Kernel::Pvh as fn(Vec<u8>) -> Kernel, Kernel::BzImage] {
        let mut vm = setup(kernel([print("ahoy\n"), power_off()].concat())).start();
        let events = vm.events_to_the_end();
        assert_eq!(events[0], EventKind::ProcessStarted);
        assert!(matches!(&events[1], EventKind::Caged { .. }));
        assert_eq!(events[2], EventKind::Ready);
        assert_eq!(events[3], EventKind::GuestEntered);
        assert_eq!(
            events[4],
            EventKind::Stopped {
                reason: StopReason::PowerOff
            }
        );
        assert_eq!(vm.exit_code(), 0);
        assert_eq!(vm.console(), "ahoy\n");
    }
}

#[test]
fn a_guest_that_says_more_than_is_kept_is_read_to_its_last_word() {
    let count = u32::try_from(CONSOLE_BYTES).unwrap() + 5;
    let mut body = out(SERIAL, b'x');
    // `loop`, to the beginning of the body.
    let back = -(i8::try_from(body.len()).unwrap() + 2);
    body.extend([0xe2, back.cast_unsigned()]);
    // `mov ecx, count`
    let many = [&[0xb9][..], &count.to_le_bytes(), &body].concat();
    let mut vm = setup(Kernel::Pvh([many, print("end\n"), power_off()].concat())).start();
    assert_eq!(vm.stop_reason(), StopReason::PowerOff);
    let kept = vm.console();
    assert!(kept.ends_with("xend\n"), "{} bytes", kept.len());
    assert!((CONSOLE_BYTES / 4..=CONSOLE_BYTES).contains(&(kept.len() as u64)));
}

#[test]
fn a_strict_vm_runs_in_the_whole_cage_or_not_at_all() {
    let start = |strict, environment| {
        let mut setup = setup(Kernel::Pvh(power_off()));
        setup.strict = strict;
        setup.environment = environment;
        setup.start()
    };
    let mut vm = start(true, vec![]);
    let events = vm.events_to_the_end();
    let EventKind::Caged { cage } = &events[1] else {
        panic!("{events:?}");
    };
    assert_eq!(cage.missing().count(), 0, "{cage:?}");
    assert_eq!(vm.exit_code(), 0);
    for (environment, hole) in [
        (("LIGHTER_CAGE", "off"), "namespaces"),
        (("LIGHTER_SECCOMP", "log"), "seccomp"),
    ] {
        for strict in [true, false] {
            match start(strict, vec![environment]).stop_reason() {
                StopReason::Failed { detail } => {
                    assert!(
                        strict && detail.contains("the VM is strict") && detail.contains(hole),
                        "{detail}"
                    );
                }
                reason => assert!(!strict && reason == StopReason::PowerOff, "{reason:?}"),
            }
        }
    }
}

#[test]
fn a_reset_ends_the_vm() {
    let mut vm = setup(Kernel::Pvh(out(0x602, 1))).start();
    assert_eq!(vm.stop_reason(), StopReason::Reset);
    assert_eq!(vm.exit_code(), 0);
}

#[test]
fn a_triple_fault_is_named_with_its_place() {
    // An interrupt without a table for it.
    let mut vm = setup(Kernel::Pvh(vec![0x0f, 0x0b])).start();
    let StopReason::GuestCrashed { detail } = vm.stop_reason() else {
        panic!("not a crash")
    };
    assert!(
        detail.contains("vCPU 0: triple fault (instruction pointer 0x"),
        "{detail}"
    );
    assert_eq!(vm.exit_code(), 1);
}

#[test]
fn a_paused_guest_makes_no_progress_and_a_resumed_one_does() {
    let mut vm = setup(spinning()).start();
    vm.wait_for(&EventKind::GuestEntered);
    let exits = |vm: &mut Vm| match vm.request(&Request::Statistics) {
        Response::Statistics(statistics) => statistics.exits["io-out"],
        other => panic!("{other:?}"),
    };
    for _ in 0..20 {
        assert_eq!(vm.request(&Request::Pause), Response::Done);
        let before = exits(&mut vm);
        let state = Response::Status {
            state: RunState::Paused,
            cpus: 1,
            memory_mib: 64,
        };
        assert_eq!(vm.request(&Request::Status), state);
        assert_eq!(exits(&mut vm), before);
        assert_eq!(vm.request(&Request::Resume), Response::Done);
        while exits(&mut vm) == before {}
    }
    assert_eq!(vm.request(&Request::Stop), Response::Done);
    assert_eq!(vm.stop_reason(), StopReason::Requested);
    assert_eq!(vm.exit_code(), 0);
}

#[test]
fn a_guest_that_crashes_while_it_is_paused_and_resumed_does_not_hang_the_monitor() {
    for _ in 0..20 {
        let mut vm = setup(Kernel::Pvh(vec![0x0f, 0x0b])).start();
        // The connection may close at any point: the VM is over by itself.
        let _ = vm.try_request(&Request::Pause);
        let _ = vm.try_request(&Request::Resume);
        assert!(matches!(vm.stop_reason(), StopReason::GuestCrashed { .. }));
    }
}

#[test]
fn nonsense_on_the_control_socket_is_answered_and_does_no_harm() {
    let mut vm = setup(spinning()).start();
    let mut stream = vm.connect_control();
    stream
        .write_all(b"{\"command\":\"explode\"}\n\xff\xfe\n")
        .unwrap();
    let mut lines = Lines::new(stream);
    for _ in 0..2 {
        assert!(matches!(
            serde_json::from_str(&lines.line()),
            Ok(Response::Error { .. })
        ));
    }
    // A line without end is cut off, not collected.
    let mut flood = vm.connect_control();
    let chunk = [b'x'; 4096];
    while flood.write_all(&chunk).is_ok() {}
    // More clients than are served: the rest is turned away.
    let crowd: Vec<UnixStream> = (0..64).map(|_| vm.connect_control()).collect();
    let turned_away = crowd.iter().rev().take(8);
    for mut client in turned_away {
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
    drop(crowd);
    // There is room again as soon as the monitor has seen them go.
    while vm.try_request(&Request::Status).is_err() {}
    assert_eq!(vm.request(&Request::Stop), Response::Done);
    assert_eq!(vm.stop_reason(), StopReason::Requested);
}

#[test]
fn a_guest_that_touches_every_register_of_every_device_gets_nowhere() {
    // Reads and writes 32 bits at each word of all device windows and behind them, then powers off.
    let code = [
        &[0xbf, 0, 0, 0, 0xd0][..],            // mov edi, VIRTIO_MMIO
        &[0x8b, 0x07],                         // again: mov eax, [edi]
        &[0xf7, 0xd0],                         // not eax
        &[0x89, 0x07],                         // mov [edi], eax
        &[0x83, 0xc7, 0x04],                   // add edi, 4
        &[0x81, 0xff, 0x00, 0x80, 0x00, 0xd0], // cmp edi, VIRTIO_MMIO + 8 windows
        &[0x72, 0xef],                         // jb again
        &power_off(),
    ]
    .concat();
    let mut vm = setup(Kernel::Pvh(code)).start();
    assert_eq!(vm.stop_reason(), StopReason::PowerOff);
}

#[test]
fn memory_beyond_4_gib_is_there() {
    // mov eax, [0xffff_ffff + …] needs 64-bit code: the bzImage entry maps the first 4 GiB only, so what is checked here is
    // that a machine of 5 GiB is built and runs.
    let mut machine = setup(Kernel::Pvh(power_off()));
    machine.memory_mib = 5 << 10;
    assert_eq!(machine.start().stop_reason(), StopReason::PowerOff);
}

fn failure(setup: tiny_guest::Setup) -> String {
    let mut vm = setup.start();
    let StopReason::Failed { detail } = vm.stop_reason() else {
        panic!("it did not fail")
    };
    assert_eq!(vm.exit_code(), 1);
    detail
}

#[test]
fn every_reason_not_to_start_is_named() {
    let mut machine = setup(Kernel::Bytes(b"not a kernel, by far".repeat(100)));
    assert!(failure(machine).contains("neither an ELF vmlinux nor a bzImage"));
    machine = setup(Kernel::Bytes(vec![]));
    assert!(failure(machine).contains("cannot read the kernel"));
    machine = setup(spinning());
    machine.cpus = 65;
    assert!(failure(machine).contains("1 to 64 CPUs, not 65"));
    machine = setup(spinning());
    machine.memory_mib = 0;
    assert!(failure(machine).contains("0 MiB is no size"));
    machine = setup(spinning());
    machine.command_line = "x".repeat(3000);
    assert!(failure(machine).contains("command line has 3000 bytes"));
    machine = setup(spinning());
    machine.kvm = std::fs::File::open("/dev/null").unwrap().into();
    assert!(failure(machine).contains("is the descriptor /dev/kvm?"));
    machine = setup(spinning());
    machine.disk_length = 1000;
    assert!(failure(machine).contains("cannot attach disk test"));
}

#[test]
fn two_vms_cannot_open_one_disk() {
    let machine = setup(spinning());
    let path = machine.disk_path();
    let mut first = machine.start();
    first.wait_for(&EventKind::GuestEntered);
    let mut second = setup(spinning());
    second.disk = Some(path);
    let detail = failure(second);
    assert!(
        detail.contains("cannot attach disk test") && detail.contains("in use"),
        "{detail}"
    );
}

#[test]
fn a_description_that_makes_no_sense_is_refused() {
    for text in ["", "{}", "[1,2", "{\"name\":7}"] {
        let output = tiny_guest::run_with_stdin(MONITOR.as_ref(), text);
        assert!(!output.status.success());
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(
            message.starts_with("lighter-vmm: the description is not understood"),
            "{message}"
        );
    }
}
