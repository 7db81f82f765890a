//! The guest's way to the network, as its VM's setting says.
//!
//! - `passt`: a program that turns its frames into the user's own sockets
//! - `keeper`: one of them after the other
//! - `routes`: whether there is a way out for it
//! - `tap`: an interface of the host's

mod keeper;
pub mod passt;
mod routes;
mod tap;

use super::identity::Whose;
use super::state::State;
use crate::error::{Error, Result};
use crate::network::{self, Network};
use crate::snapshots::base::Base;
use crate::vm::{Settings, Vm};
pub use keeper::{Keeper, Order};
use lighter_protocol::monitor::NetKind;
use lighter_protocol::network::{GATEWAY, GuestNetwork};
use passt::Passt;
use sha2::{Digest, Sha256};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// What troubles with it are told as; the monitor's name of the device.
pub const DEVICE: &str = "net";

/// What the monitor makes the guest's network device of, and what the guest is told of it.
#[derive(Debug)]
pub struct Device {
    /// What its link is.
    pub kind: NetKind,
    /// Where that begins, if it does yet.
    pub plug: Option<OwnedFd>,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet, bytes.
    pub mtu: u16,
    /// For a guest that is booted.
    pub guest: GuestNetwork,
}

/// What has to be done for a guest's network while it runs.
#[derive(Debug, Default)]
pub enum Way {
    /// Nothing.
    #[default]
    Given,
    /// A passt is to be kept, of which the first, if there can be one, is this.
    Passt(Option<Passt>),
}

/// A VM's network, about to begin.
#[derive(Debug, Default)]
pub struct Prepared {
    /// For the monitor.
    pub device: Option<Device>,
    /// The host's address as the guest reaches it, if it may.
    pub host: Option<Ipv4Addr>,
    /// What comes after.
    pub way: Way,
}

/// Opens what the network of `vm` needs. A guest that goes on from `base` has the device that it had; if it is `Whose::AnotherS`
/// memory, an interface may be with the VM that it is from, and it goes on without.
///
/// # Errors
/// When there is no socket to give, or the interface cannot be used.
pub fn prepare(vm: &Vm, base: Option<&Base>, whose: Whose, state: &State) -> Result<Prepared> {
    let had_none = base.is_some_and(|base| !base.manifest.network);
    match &vm.settings.network {
        Network::None => Ok(Prepared::default()),
        _ if had_none => {
            state.trouble(
                DEVICE,
                "the snapshot's VM had no network; the guest has none until it is started anew",
            );
            Ok(Prepared::default())
        }
        Network::Passt => of_passt(vm, state),
        Network::Tap(tap) => of_tap(vm, tap, base.is_some() && whose == Whose::AnotherS, state),
    }
}

fn of_passt(vm: &Vm, state: &State) -> Result<Prepared> {
    let (plug, passt) = match passt::prepare(vm.settings.host_access)? {
        Ok((stream, passt)) => (Some(stream), Some(passt)),
        Err(absence) => {
            state.trouble(DEVICE, absence);
            (None, None)
        }
    };
    Ok(Prepared {
        device: Some(Device {
            kind: NetKind::Stream,
            plug,
            mac: passt::MAC,
            mtu: passt::MTU,
            guest: GuestNetwork::of_passt(),
        }),
        host: host_of(&vm.settings),
        way: Way::Passt(passt),
    })
}

fn of_tap(vm: &Vm, tap: &network::Tap, is_copy: bool, state: &State) -> Result<Prepared> {
    let interface = &tap.interface;
    let (plug, mtu) = match tap::open(interface) {
        Ok(opened) => {
            if !opened.is_up {
                let reason = format!(
                    "the interface {interface} is down, and the guest has no network: sudo ip link set {interface} up"
                );
                state.trouble(DEVICE, &reason);
            }
            (Some(opened.descriptor), opened.mtu)
        }
        Err(error) if is_copy => {
            let Error { message, .. } = error;
            state.trouble(
                DEVICE,
                &format!("{message}; the guest has no network until it is started anew"),
            );
            (None, STANDARD_MTU)
        }
        Err(error) => return Err(error),
    };
    let host = host_of(&vm.settings);
    Ok(Prepared {
        device: Some(Device {
            kind: NetKind::Tap,
            plug,
            mac: mac(vm),
            mtu,
            guest: GuestNetwork {
                addresses: tap.addresses.clone(),
                gateways: tap.gateways.clone(),
                host,
                ahead: None,
            },
        }),
        host,
        way: Way::Given,
    })
}

/// The host's address as a guest of these settings reaches it, if it may: what passt takes for the host's loopback interface, or
/// the host's own address on the network that it shares with the guest.
pub fn host_of(settings: &Settings) -> Option<Ipv4Addr> {
    let host = match &settings.network {
        Network::None => None,
        Network::Passt => Some(GATEWAY),
        Network::Tap(tap) => tap::host_address(&tap.addresses),
    };
    host.filter(|_| settings.host_access)
}

/// What an interface has of which nobody said anything.
const STANDARD_MTU: u16 = 1500;

/// An Ethernet address that no maker gave: the same for a VM each time, and another for each VM of whatever host, since they may
/// meet on one network.
fn mac(vm: &Vm) -> [u8; 6] {
    // A host without one has few VMs that meet others.
    let host = std::fs::read("/etc/machine-id").unwrap_or_default();
    let sum = Sha256::new()
        .chain_update(host)
        .chain_update(vm.paths.data.as_os_str().as_encoded_bytes())
        .finalize();
    let mut mac = [0x02; 6];
    mac[1..].copy_from_slice(&sum[..5]);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::state::testing::vm_and_state;

    #[test]
    fn a_vm_keeps_its_address_and_no_other_has_it() {
        let (vm, _) = vm_and_state();
        let mut other = vm.clone();
        other.paths.data.push("b");
        assert_eq!(mac(&vm), mac(&vm));
        assert_ne!(mac(&vm), mac(&other));
        assert_eq!(mac(&vm)[0], 2);
    }

    #[test]
    fn a_vm_that_is_to_have_no_network_has_none_and_no_trouble() {
        let (mut vm, state) = vm_and_state();
        vm.settings.network = Network::None;
        let prepared = prepare(&vm, None, Whose::AnotherS, &state).unwrap();
        assert!(prepared.device.is_none() && prepared.host.is_none());
        assert!(state.watch().borrow().trouble.is_none());
    }

    #[test]
    fn a_copy_goes_on_without_an_interface_and_what_it_is_a_copy_of_does_not() {
        let (vm, state) = vm_and_state();
        let tap: network::Tap = "lighter-none,address=10.0.0.2/8".parse().unwrap();
        assert!(of_tap(&vm, &tap, false, &state).is_err());
        assert!(state.watch().borrow().trouble.is_none());
        let device = of_tap(&vm, &tap, true, &state).unwrap().device.unwrap();
        assert!(device.plug.is_none());
        let trouble = state.watch().borrow().trouble.clone().unwrap();
        assert!(
            trouble.reason.contains("no interface lighter-none"),
            "{trouble:?}"
        );
    }
}
