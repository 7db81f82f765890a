//! The DSDT: devices as AML.

use super::{OEM_ID, OEM_TABLE_ID, bytes};
use crate::layout;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, ONE, Package, Path,
    ResourceTemplate, Return, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

/// Notification value of a pressed button, and of a changed generation identifier.
const CHANGED: u8 = 0x80;
/// The value for [`layout::SLEEP_CONTROL_PORT`] that means power-off: `_S5`'s sleep type.
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;

/// The table for `devices` virtio-mmio windows.
pub(super) fn build(devices: usize) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, 1);
    for number in 0..devices {
        dsdt.append_slice(&virtio(number));
    }
    dsdt.append_slice(&serial());
    let button = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    dsdt.append_slice(&bytes(&Device::new(Path::new("_SB_.PWRB"), vec![&button])));
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &ZERO, &ZERO, &ZERO]);
    dsdt.append_slice(&bytes(&Name::new(Path::new("_S5_"), &off)));
    dsdt.append_slice(&generation_id());
    dsdt.append_slice(&event_device());
    dsdt.as_slice().to_vec()
}

/// An edge-triggered line of the I/O interrupt controller, as KVM's irqfd raises it.
fn line(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// A virtio-mmio device (virtio 1.2 has no ACPI binding; Linux's is `LNRO0005`).
fn virtio(number: usize) -> Vec<u8> {
    // Fits: there are at most `layout::MAX_VIRTIO_DEVICES`.
    let window = (layout::VIRTIO_MMIO + number as u64 * layout::VIRTIO_MMIO_STRIDE) as u32;
    bytes(&Device::new(
        Path::new(&format!("_SB_.V{number:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(number as u8)),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, window, layout::VIRTIO_MMIO_STRIDE as u32),
                    &line(layout::VIRTIO_GSI + number as u32),
                ]),
            ),
        ],
    ))
}

/// The console, so that the guest knows its interrupt: without one, programs of the guest cannot write to it.
fn serial() -> Vec<u8> {
    let port = layout::SERIAL_PORT;
    // Eight.
    let count = layout::SERIAL_PORTS as u8;
    bytes(&Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, count), &line(layout::SERIAL_GSI)]),
            ),
        ],
    ))
}

/// The generation identifier's device: `ADDR` says where its 16 bytes are (Microsoft's "Virtual Machine Generation ID").
fn generation_id() -> Vec<u8> {
    let address = layout::GENERATION_ID as u32;
    bytes(&Device::new(
        Path::new("_SB_.VGEN"),
        vec![
            &Name::new("_HID".into(), &"LGHTVGEN"),
            &Name::new("_CID".into(), &"VMGENCTR"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
        ],
    ))
}

/// The generic event device (ACPI 6.5, section 5.6.9): its interrupts become notifications.
fn event_device() -> Vec<u8> {
    let power_button = (layout::POWER_BUTTON_GSI, Path::new("\\_SB_.PWRB"));
    let generation = (layout::GENERATION_GSI, Path::new("\\_SB_.VGEN"));
    bytes(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("GED0"),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&line(power_button.0), &line(generation.0)]),
                ),
                &Method::new(
                    Path::new("_EVT"),
                    1,
                    true,
                    vec![
                        &If::new(
                            &Equal::new(&Arg(0), &power_button.0),
                            vec![&Notify::new(&power_button.1, &CHANGED), &Return::new(&ZERO)],
                        ),
                        &If::new(
                            &Equal::new(&Arg(0), &generation.0),
                            vec![&Notify::new(&generation.1, &CHANGED)],
                        ),
                    ],
                ),
            ],
        )],
    ))
}
