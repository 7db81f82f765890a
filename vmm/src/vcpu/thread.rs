//! The threads that run vCPUs, and the gate that pauses and ends them.
//!
//! A vCPU leaves the guest for good reasons only: it touched a register of a device ([`crate::bus`]), it crashed, or it was
//! asked to by a signal. The signal's handler sets `immediate_exit` in the vCPU's shared page, so that a signal that comes
//! just before the guest is entered is not lost either.

use crate::bus::Bus;
use crate::cage::Cage;
use crate::cage::filters::Duty;
use crate::threads;
use kvm_ioctls::{VcpuExit, VcpuFd};
use lighter_protocol::monitor::StopReason;
use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// What vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct GateState {
    wanted: Wanted,
    parked: usize,
}

/// Where vCPU threads wait while they are not to run.
#[derive(Debug)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        // A panicking vCPU thread ends the process; the state is plain data in any case.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// Called by a vCPU thread that is outside the guest: waits until it may run, or returns false to end.
    fn pass(&self) -> bool {
        let mut state = self.lock();
        if state.wanted == Wanted::Pause {
            state.parked += 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Pause {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.parked -= 1;
        }
        state.wanted == Wanted::Run
    }

    /// Called by a vCPU thread that ends by itself: whoever waits for all to be parked need not wait for it.
    fn leave(&self) {
        self.lock().parked += 1;
        self.changed.notify_all();
    }

    fn is_open(&self) -> bool {
        self.lock().wanted == Wanted::Run
    }

    fn wait_parked(&self, count: usize) {
        let mut state = self.lock();
        while state.parked < count {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Exits that reached the monitor, by kind.
#[derive(Debug, Default)]
pub struct ExitCounters {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    signal: AtomicU64,
}

impl ExitCounters {
    /// The counters by name.
    pub fn snapshot(&self) -> std::collections::BTreeMap<String, u64> {
        [
            ("io-in", &self.io_in),
            ("io-out", &self.io_out),
            ("mmio-read", &self.mmio_read),
            ("mmio-write", &self.mmio_write),
            ("signal", &self.signal),
        ]
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count.load(Ordering::Relaxed)))
        .collect()
    }
}

/// What every vCPU thread needs.
#[derive(Clone)]
pub struct Surroundings {
    /// Where accesses to device registers go.
    pub bus: Arc<Bus>,
    /// Counts exits.
    pub exits: Arc<ExitCounters>,
    /// Told, once for each vCPU at most, that the VM is over.
    pub on_stop: Arc<dyn Fn(StopReason) + Send + Sync>,
    /// Called by vCPU 0 right before the guest is entered for the first time.
    pub on_entry: Arc<dyn Fn() + Send + Sync>,
    /// Where the threads go before they enter the guest.
    pub cage: Cage,
}

/// A vCPU: its thread has it while it may run, others while it is paused.
type Shared = Arc<Mutex<VcpuFd>>;

/// The running vCPUs of a VM.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    vcpus: Vec<Shared>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// Starts one thread for each vCPU, in order of their numbers.
    ///
    /// # Errors
    /// When the host has no signal handler or thread to give; threads already started are ended.
    pub fn start(vcpus: Vec<VcpuFd>, surroundings: &Surroundings) -> io::Result<Self> {
        install_kick_handler()?;
        let state = Mutex::new(GateState {
            wanted: Wanted::Run,
            parked: 0,
        });
        let gate = Arc::new(Gate {
            state,
            changed: Condvar::new(),
        });
        let mut started = Self {
            threads: vec![],
            vcpus: vec![],
            gate,
        };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let vcpu = Arc::new(Mutex::new(vcpu));
            started.vcpus.push(vcpu.clone());
            let surroundings = surroundings.clone();
            let gate = started.gate.clone();
            let name = format!("vcpu{number}");
            let body = move || run(&vcpu, number, &gate, &surroundings);
            match threads::builder(&name).spawn(body) {
                Ok(thread) => started.threads.push(thread),
                Err(error) => {
                    started.stop();
                    return Err(error);
                }
            }
        }
        Ok(started)
    }

    /// Takes all vCPUs out of the guest, with every access to a device completed; returns when they are.
    pub fn pause(&self) {
        self.gate.set(Wanted::Pause);
        self.kick();
        self.gate.wait_parked(self.threads.len());
    }

    /// Undoes [`Self::pause`]. A guest that can be told learns that it stood still, and does not take that for a hang.
    pub fn resume(&self) {
        for vcpu in &self.vcpus {
            // Refused when the guest does not use KVM's clock: it has nothing to be told by.
            let _ = lock(vcpu).kvmclock_ctrl();
        }
        self.gate.set(Wanted::Run);
    }

    /// Gives the paused vCPUs, with their numbers, to `act` one by one.
    ///
    /// # Errors
    /// The first of `act`.
    pub fn each_paused<T, E>(&self, act: impl Fn(usize, &VcpuFd) -> Result<T, E>) -> Result<Vec<T>, E> {
        let vcpus = self.vcpus.iter().enumerate();
        vcpus.map(|(number, vcpu)| act(number, &lock(vcpu))).collect()
    }

    /// Ends all threads.
    pub fn stop(self) {
        self.gate.set(Wanted::Stop);
        self.kick();
        for thread in self.threads {
            // A thread that panicked is a bug of ours, and has ended.
            let _ = thread.join();
        }
    }

    fn kick(&self) {
        for thread in &self.threads {
            // SAFETY: the thread is not joined yet, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(_signal: libc::c_int) {
    let place = IMMEDIATE_EXIT.get();
    if !place.is_null() {
        // SAFETY: set by `run` to a byte of the mapped kvm_run page of a vCPU which this very thread owns, and cleared before
        // the vCPU goes away.
        unsafe { place.write_volatile(1) };
    }
}

fn install_kick_handler() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as usize;
    // SAFETY: `action` is valid, and its handler only writes a byte through a thread-local pointer.
    if unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    // A descriptor has no state of ours that a panic could leave half changed.
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(shared: &Mutex<VcpuFd>, number: usize, gate: &Gate, surroundings: &Surroundings) {
    if let Err(error) = surroundings.cage.confine(Duty::Vcpu) {
        (surroundings.on_stop)(StopReason::Failed {
            detail: format!("the cage of vCPU {number}: {error}"),
        });
        gate.leave();
        return;
    }
    IMMEDIATE_EXIT.set(&raw mut lock(shared).get_kvm_run().immediate_exit);
    let mut entered = number != 0;
    while gate.pass() {
        let mut vcpu = lock(shared);
        let end = loop {
            vcpu.set_kvm_immediate_exit(0);
            if !gate.is_open() {
                complete_access(&mut vcpu);
                break None;
            }
            if !entered {
                entered = true;
                (surroundings.on_entry)();
            }
            if let Some(reason) = step(&mut vcpu, number, surroundings) {
                break Some(reason);
            }
        };
        drop(vcpu);
        if let Some(reason) = end {
            (surroundings.on_stop)(reason);
            gate.leave();
            break;
        }
    }
    IMMEDIATE_EXIT.set(std::ptr::null_mut());
}

/// Lets KVM finish an access to a device that was answered, without entering the guest.
fn complete_access(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // Ends with EINTR by design.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

/// Enters the guest once and answers its exit; `Some` when the VM is over.
fn step(vcpu: &mut VcpuFd, number: usize, surroundings: &Surroundings) -> Option<StopReason> {
    let Surroundings { bus, exits, .. } = surroundings;
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let crash = match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&exits.io_out);
            return bus.port_write(port, data);
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&exits.io_in);
            bus.port_read(port, data);
            return None;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&exits.mmio_read);
            bus.memory_read(address, data);
            return None;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&exits.mmio_write);
            bus.memory_write(address, data);
            return None;
        }
        Ok(VcpuExit::Intr) => {
            count(&exits.signal);
            return None;
        }
        Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
        Ok(VcpuExit::SystemEvent(kind, _)) => format!("system event {kind}"),
        Ok(VcpuExit::FailEntry(reason, _)) => {
            format!("the CPU refuses to enter the guest, reason {reason:#x}")
        }
        Ok(VcpuExit::InternalError) => internal_error(vcpu),
        Ok(other) => format!("unexpected exit {other:?}"),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            count(&exits.signal);
            return None;
        }
        Err(error) => format!("KVM_RUN: {error}"),
    };
    let rip = vcpu
        .get_regs()
        .map_or_else(|_| "unknown".to_owned(), |regs| format!("{:#x}", regs.rip));
    Some(StopReason::GuestCrashed {
        detail: format!("vCPU {number}: {crash} (instruction pointer {rip})"),
    })
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    /// KVM_INTERNAL_ERROR_EMULATION
    const EMULATION: u32 = 1;
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM filled this member of the union, as the exit reason says; any bytes are a valid number.
    let kind = unsafe { run.__bindgen_anon_1.internal.suberror };
    match kind {
        EMULATION => {
            "KVM cannot emulate an instruction: this host's KVM does not run the guest's code on the CPU"
                .into()
        }
        other => format!("internal error {other} of KVM"),
    }
}
