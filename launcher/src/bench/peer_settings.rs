//! What each peer is told, by its own manual's recommendations for a quick boot.

use super::peer::{CONFIG_FD, DATA_FD, Guest};
use crate::error::{Code, Error, Result};
use crate::supervisor::machine::{COMMON_COMMAND_LINE, NO_PCI};
use lighter_protocol::announce::WORD;
use lighter_protocol::ports::GUEST_CID;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;

/// The socket through which the guest's are reached, in the folder that a peer runs in.
pub const VSOCK: &str = "vsock";

/// The path of a descriptor that a peer inherits.
pub fn inherited(descriptor: i32) -> String {
    format!("/proc/self/fd/{descriptor}")
}

/// Firecracker's command line.
pub fn firecracker() -> Vec<OsString> {
    let config = inherited(CONFIG_FD);
    ["--no-api", "--config-file", &config].map(OsString::from).into()
}

/// What Firecracker's guest is booted with. Its own getting-started guide has `reboot=k panic=1`; a keyboard controller
/// is there for the reboot alone and need not be probed.
pub fn firecracker_config(guest: &Guest, data_disk: &str) -> Value {
    let own = "reboot=k panic=1 i8042.noaux i8042.nomux i8042.dumbkbd";
    json!({
        "boot-source": {
            "kernel_image_path": guest.kernel,
            "boot_args": format!("{COMMON_COMMAND_LINE} {NO_PCI} {own} {}{WORD}", guest.words),
        },
        "drives": [
            {
                "drive_id": "root",
                "path_on_host": guest.image,
                "is_root_device": true,
                "is_read_only": true,
            },
            {
                "drive_id": "data",
                "path_on_host": data_disk,
                "is_root_device": false,
                "is_read_only": false,
                // A flush of the guest reaches the file, as Lighter's does.
                "cache_type": "Writeback",
            },
        ],
        "machine-config": { "vcpu_count": guest.cpus, "mem_size_mib": guest.memory.mib() },
        "entropy": {},
        // Lighter's guests have these as well: without the one nobody could reach the engine.
        "vsock": { "guest_cid": GUEST_CID, "uds_path": VSOCK },
        "balloon": { "amount_mib": 0, "deflate_on_oom": true },
    })
}

/// cloud-hypervisor's command line. Its devices are on PCI, so that its guest has to look for them there; the console is the serial
/// port instead of virtio's, as for all. What its manual recommends is its default: `io_uring` for disks, large pages for memory.
///
/// # Errors
/// When the image's path has a quotation mark, which it cannot be told.
pub fn cloud_hypervisor(guest: &Guest) -> Result<Vec<OsString>> {
    let image = &guest.image;
    if image.as_os_str().as_encoded_bytes().contains(&b'"') {
        let text = format!(
            "cloud-hypervisor takes no path with a quotation mark in it: {}",
            image.display()
        );
        return Err(Error::new(Code::Usage, text).hint("put the image elsewhere: --image FILE"));
    }
    let mut root = OsString::from("path=\"");
    root.push(image);
    root.push("\",readonly=on,sparse=off,image_type=raw");
    let data = format!("path={},image_type=raw", inherited(DATA_FD));
    let command_line = format!("{COMMON_COMMAND_LINE} reboot=t panic=-1 {}{WORD}", guest.words);
    Ok([
        ("--cpus", format!("boot={}", guest.cpus).into()),
        ("--memory", format!("size={}M", guest.memory.mib()).into()),
        ("--kernel", guest.kernel.clone().into()),
        ("--cmdline", command_line.into()),
        ("--disk", root),
        ("--disk", data.into()),
        ("--vsock", format!("cid={GUEST_CID},socket={VSOCK}").into()),
        ("--balloon", "size=0,deflate_on_oom=on".into()),
        ("--serial", "tty".into()),
        ("--console", "off".into()),
    ]
    .into_iter()
    .flat_map(|(option, value)| [option.into(), value])
    .collect())
}

/// QEMU's microvm as its manual recommends for a quick boot: none of the old devices, modern virtio, and a thread for
/// the disks.
pub fn qemu(guest: &Guest) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = [
        "-M",
        "microvm,acpi=on,pit=off,pic=off,rtc=off,isa-serial=on",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-global",
        "virtio-mmio.force-legacy=false",
        "-object",
        "iothread,id=disks",
        "-device",
        "virtio-rng-device",
        "-device",
        "virtio-balloon-device",
    ]
    .map(OsString::from)
    .into();
    let mut add = |option: &str, value: OsString| arguments.extend([option.into(), value]);
    add("-smp", guest.cpus.to_string().into());
    add("-m", guest.memory.mib().to_string().into());
    add("-kernel", guest.kernel.clone().into());
    add(
        "-append",
        format!(
            "{COMMON_COMMAND_LINE} {NO_PCI} reboot=t panic=-1 {}{WORD}",
            guest.words
        )
        .into(),
    );
    let mut root = OsString::from("if=none,id=root,format=raw,readonly=on,file.locking=off,file=");
    root.push(doubled_commas(&guest.image));
    add("-drive", root);
    add("-device", "virtio-blk-device,drive=root,iothread=disks".into());
    let data = format!(
        "if=none,id=data,format=raw,cache=writeback,discard=unmap,file={}",
        inherited(DATA_FD)
    );
    add("-drive", data.into());
    add("-device", "virtio-blk-device,drive=data,iothread=disks".into());
    arguments.extend(guest.qemu_options.iter().cloned());
    arguments
}

/// QEMU takes a comma in a value for its end unless there are two.
pub fn doubled_commas(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = vec![];
    for &byte in path.as_os_str().as_bytes() {
        bytes.extend(std::iter::repeat_n(byte, 1 + usize::from(byte == b',')));
    }
    OsString::from_vec(bytes)
}
