//! The transport as drivers, good and bad, see it.

use super::*;
use crate::memory;
use crate::virtio::ActivateError;
use crate::virtio::interrupt::USED_RING;
use proptest::prelude::*;
use std::sync::Mutex;

const TYPE: u32 = 42;
const FEATURE: u64 = 1 << 3;

/// What happened to the device.
#[derive(Debug, Default)]
struct Log {
    activations: Vec<u64>,
    resets: usize,
    active: bool,
}

/// A device that only notes what the transport does to it.
struct Recorder {
    log: Arc<Mutex<Log>>,
    queues: Vec<VirtQueue>,
    config: [u8; 6],
}

impl VirtioDevice for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }

    fn device_type(&self) -> u32 {
        TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 8]
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.log.lock().unwrap();
        assert!(!log.active, "activated twice");
        if !activation.queues[0].is_ready() {
            return Err(ActivateError::QueueNotReady(0));
        }
        log.active = true;
        log.activations.push(activation.features);
        self.queues = activation.queues;
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<VirtQueue> {
        self.log.lock().unwrap().active = false;
        std::mem::take(&mut self.queues)
    }

    fn reset(&mut self) {
        self.log.lock().unwrap().resets += 1;
    }
}

fn transport() -> (MmioTransport, Arc<Mutex<Log>>) {
    let log = Arc::<Mutex<Log>>::default();
    let device = Recorder {
        log: log.clone(),
        queues: vec![],
        config: [1, 2, 3, 4, 5, 6],
    };
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let memory = memory::create(1).unwrap();
    let transport = MmioTransport::new(Box::new(device), memory, line, Box::new(|| Ok(())));
    (transport.unwrap(), log)
}

fn read(transport: &MmioTransport, offset: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut MmioTransport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

fn agree_on(transport: &mut MmioTransport, features: u64) {
    write(transport, register::STATUS, status::ACKNOWLEDGE);
    write(transport, register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
        write(transport, register::DRIVER_FEATURES_SEL, select);
        write(transport, register::DRIVER_FEATURES, half);
    }
    write(
        transport,
        register::STATUS,
        status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
    );
}

fn set_up_queue(transport: &mut MmioTransport, number: u32, address: u32) {
    write(transport, register::QUEUE_SEL, number);
    write(transport, register::QUEUE_NUM, 8);
    for (offset, at) in [
        (register::QUEUE_DESC_LOW, address),
        (register::QUEUE_DRIVER_LOW, address.wrapping_add(0x1000)),
        (register::QUEUE_DEVICE_LOW, address.wrapping_add(0x2000)),
    ] {
        write(transport, offset, at);
    }
    write(transport, register::QUEUE_READY, 1);
}

fn start(transport: &mut MmioTransport) {
    let status = read(transport, register::STATUS);
    write(transport, register::STATUS, status | status::DRIVER_OK);
}

#[test]
fn a_well_behaved_driver_gets_the_device_running() {
    let (mut transport, log) = transport();
    assert_eq!(read(&transport, register::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(read(&transport, register::VERSION), 2);
    assert_eq!(read(&transport, register::DEVICE_ID), TYPE);
    assert_eq!(read(&transport, register::QUEUE_NUM_MAX), 64);
    agree_on(&mut transport, FEATURE | VERSION_1);
    set_up_queue(&mut transport, 0, 0x1000);
    assert_eq!(read(&transport, register::QUEUE_READY), 1);
    start(&mut transport);
    assert_eq!(log.lock().unwrap().activations, [FEATURE | VERSION_1]);
    assert_eq!(read(&transport, register::STATUS) & status::DEVICE_NEEDS_RESET, 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut transport, _) = transport();
    agree_on(&mut transport, VERSION_1 | 1 << 5);
    assert_eq!(read(&transport, register::STATUS) & status::FEATURES_OK, 0);
}

#[test]
fn a_driver_of_the_legacy_interface_is_refused() {
    let (mut transport, _) = transport();
    agree_on(&mut transport, FEATURE);
    assert_eq!(read(&transport, register::STATUS) & status::FEATURES_OK, 0);
}

#[test]
fn a_device_that_cannot_start_says_that_it_needs_a_reset_and_recovers_by_one() {
    // Without features; without a queue; with a queue outside of memory.
    for case in 0..3 {
        let (mut transport, log) = transport();
        if case > 0 {
            agree_on(&mut transport, VERSION_1);
        }
        if case == 2 {
            set_up_queue(&mut transport, 0, 0xffff_0000);
        }
        start(&mut transport);
        assert_ne!(read(&transport, register::STATUS) & status::DEVICE_NEEDS_RESET, 0);
        assert_eq!(
            read(&transport, register::INTERRUPT_STATUS),
            super::super::interrupt::CONFIG_CHANGE
        );
        assert!(log.lock().unwrap().activations.is_empty());
        write(&mut transport, register::STATUS, 0);
        assert_eq!(read(&transport, register::STATUS), 0);
        assert_eq!(read(&transport, register::INTERRUPT_STATUS), 0);
        agree_on(&mut transport, VERSION_1);
        set_up_queue(&mut transport, 0, 0x1000);
        start(&mut transport);
        assert_eq!(log.lock().unwrap().activations.len(), 1);
    }
}

#[test]
fn a_reset_of_a_running_device_stops_it_and_forgets_its_queues() {
    let (mut transport, log) = transport();
    agree_on(&mut transport, VERSION_1);
    set_up_queue(&mut transport, 0, 0x1000);
    start(&mut transport);
    write(&mut transport, register::STATUS, 0);
    assert!(!log.lock().unwrap().active);
    assert_eq!(log.lock().unwrap().resets, 1);
    write(&mut transport, register::QUEUE_SEL, 0);
    assert_eq!(read(&transport, register::QUEUE_READY), 0);
}

#[test]
fn a_paused_device_is_saved_and_goes_on_with_the_same_queues() {
    let (mut transport, log) = transport();
    agree_on(&mut transport, VERSION_1 | EVENT_IDX);
    set_up_queue(&mut transport, 0, 0x1000);
    start(&mut transport);
    assert!(transport.save().is_none());
    transport.pause();
    let state = transport.save().unwrap();
    assert!(state.rings[0].ready && state.rings[0].event_idx && state.rings[0].desc_table == 0x1000);
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<TransportState>(&json).unwrap(), state);
    transport.resume();
    assert_eq!(log.lock().unwrap().activations.len(), 2);
    transport.pause();
    assert_eq!(transport.save().unwrap(), state);
}

#[test]
fn a_new_device_goes_on_as_the_saved_one() {
    let (mut source, _) = transport();
    agree_on(&mut source, FEATURE | VERSION_1);
    set_up_queue(&mut source, 0, 0x1000);
    start(&mut source);
    source.interrupt().used_ring();
    source.pause();
    let state = source.save().unwrap();
    let (mut copy, log) = transport();
    copy.restore(&state, &source.save_device().unwrap()).unwrap();
    assert_eq!(copy.save().unwrap(), state);
    copy.resume();
    assert_eq!(log.lock().unwrap().activations, [FEATURE | VERSION_1]);
    write(&mut copy, register::QUEUE_SEL, 0);
    assert_eq!(read(&copy, register::QUEUE_READY), 1);
    assert_eq!(read(&copy, register::INTERRUPT_STATUS), USED_RING);
    // A driver's acknowledgement may have been on its way: it is told to look.
    write(&mut copy, register::INTERRUPT_ACK, USED_RING);
    copy.remind_driver();
    assert_eq!(read(&copy, register::INTERRUPT_STATUS), USED_RING);
}

#[test]
fn a_device_that_was_being_set_up_is_set_up_further() {
    let (mut source, _) = transport();
    agree_on(&mut source, VERSION_1);
    let state = source.save().unwrap();
    let (mut copy, log) = transport();
    copy.restore(&state, &[]).unwrap();
    copy.resume();
    copy.remind_driver();
    assert_eq!(read(&copy, register::INTERRUPT_STATUS), 0);
    set_up_queue(&mut copy, 0, 0x1000);
    start(&mut copy);
    assert_eq!(log.lock().unwrap().activations, [VERSION_1]);
}

#[test]
fn a_state_that_no_driver_made_is_refused() {
    let (mut source, _) = transport();
    agree_on(&mut source, FEATURE | VERSION_1);
    set_up_queue(&mut source, 0, 0x1000);
    start(&mut source);
    source.pause();
    let state = source.save().unwrap();
    let refused = |change: &dyn Fn(&mut TransportState), own: &[u8]| {
        let mut state = state.clone();
        change(&mut state);
        let (mut copy, log) = transport();
        let error = copy.restore(&state, own).unwrap_err();
        copy.resume();
        assert!(log.lock().unwrap().activations.is_empty());
        error
    };
    let error = refused(&|state| state.driver_features |= 1 << 5, &[]);
    assert!(matches!(error, RestoreError::Features(0x20)));
    let error = refused(&|state| state.rings.truncate(1), &[]);
    assert!(matches!(error, RestoreError::Queues { saved: 1, here: 2 }));
    let error = refused(&|state| state.rings[0].desc_table = 8, &[]);
    assert!(matches!(error, RestoreError::Ring { queue: 0, .. }), "{error:?}");
    let error = refused(&|state| state.rings[0].used_ring = 1 << 40, &[]);
    assert!(matches!(error, RestoreError::Place(0)));
    let error = refused(&|state| state.rings[1].max_size = 16, &[]);
    assert!(matches!(error, RestoreError::Place(1)), "{error:?}");
    assert!(matches!(refused(&|_| (), b"what?"), RestoreError::Own(_)));
}

#[test]
fn a_queue_cannot_be_moved_while_it_is_in_use() {
    let (mut transport, _) = transport();
    agree_on(&mut transport, VERSION_1);
    set_up_queue(&mut transport, 0, 0x1000);
    write(&mut transport, register::QUEUE_DESC_LOW, 0x8000);
    start(&mut transport);
    write(&mut transport, register::QUEUE_DESC_LOW, 0x9000);
    transport.pause();
    assert_eq!(transport.save().unwrap().rings[0].desc_table, 0x1000);
}

#[test]
fn configuration_space_is_read_at_any_width_and_ends_in_zeroes() {
    let (transport, _) = transport();
    let mut bytes = [0xee; 4];
    transport.read(register::CONFIG + 4, &mut bytes);
    assert_eq!(bytes, [5, 6, 0, 0]);
    let mut byte = [0xee];
    transport.read(register::CONFIG + 2, &mut byte);
    assert_eq!(byte, [3]);
    let mut wide = [0xee; 8];
    transport.read(register::STATUS, &mut wide);
    assert_eq!(wide, [0; 8]);
}

proptest! {
    /// Whatever is written where, nothing panics, and a reset brings the device back to a usable state.
    #[test]
    fn arbitrary_writes_do_no_harm(
        writes in prop::collection::vec((0u64..0x200, any::<u32>(), any::<bool>()), 0..200),
    ) {
        let (mut transport, log) = transport();
        for (offset, value, small) in writes {
            write(&mut transport, offset & !3, if small { value % 16 } else { value });
            read(&transport, offset & !3);
            if value % 7 == 0 {
                transport.pause();
                transport.resume();
            }
        }
        write(&mut transport, register::STATUS, 0);
        let before = log.lock().unwrap().activations.len();
        agree_on(&mut transport, VERSION_1);
        set_up_queue(&mut transport, 0, 0x1000);
        start(&mut transport);
        prop_assert_eq!(log.lock().unwrap().activations.len(), before + 1);
    }
}

/// A snapshot of such a VM could not be restored: queues went with the attempt to start the device, or lie where they cannot.
#[test]
fn a_device_that_could_not_start_can_be_saved_and_restored() {
    // The device needs the other one; the memory ends before.
    for (number, address) in [(1, 0x4000), (0, 0xffff_0000)] {
        let (mut failed, _) = transport();
        agree_on(&mut failed, VERSION_1);
        set_up_queue(&mut failed, number, address);
        start(&mut failed);
        assert_ne!(read(&failed, register::STATUS) & status::DEVICE_NEEDS_RESET, 0);
        failed.pause();
        let saved = failed.save().unwrap();
        let (mut restored, log) = transport();
        restored.restore(&saved, &[]).unwrap();
        restored.resume();
        assert_ne!(read(&restored, register::STATUS) & status::DEVICE_NEEDS_RESET, 0);
        write(&mut restored, register::STATUS, 0);
        agree_on(&mut restored, VERSION_1);
        set_up_queue(&mut restored, 0, 0x4000);
        start(&mut restored);
        assert!(log.lock().unwrap().active);
    }
}
