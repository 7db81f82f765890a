//! The identity of a VM that goes on from a snapshot: the one that was saved, or others from the same snapshot, may run beside it. The
//! supervisor gives it what is its own with each greeting until it has answered that it took it; until then clients of its engine
//! wait, and its published ports are those of nobody.

use super::machine;
use super::state::State;
use crate::vm::Vm;
use lighter_protocol::agent::{Fork, Identity};
use lighter_protocol::publish::RandomPorts;
use lighter_protocol::supervisor::IdentityState;
use rustix::rand::{GetRandomFlags, getrandom};
use std::time::Duration;
use tokio::time::timeout;

/// How long a guest may take: on an emulated machine, while its engine leaves a swarm.
const PATIENCE: Duration = Duration::from_secs(300);

/// Whose memory a guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// That of its VM, which was suspended: there is no other.
    Its,
    /// That of another VM, even if it had the same name: that one, or others from the same snapshot, may be on other hosts.
    AnotherS,
}

/// What a guest is given.
#[derive(Clone, Debug)]
pub struct Giver {
    words: String,
    fork: Option<Fork>,
    state: State,
}

impl Giver {
    /// For the guest of `vm`, which is to be itself in due time.
    pub fn new(vm: &Vm, whose: Whose, random_ports: Option<&RandomPorts>, state: &State) -> Self {
        state.identity_awaited();
        tokio::spawn(await_it(state.clone(), PATIENCE));
        Self {
            words: machine::words_of_vm(random_ports, &vm.paths.docker_socket()),
            fork: match whose {
                Whose::Its => None,
                Whose::AnotherS => Some(Fork { mac: mac(random()) }),
            },
            state: state.clone(),
        }
    }

    /// For a guest that greets; `None` once it has taken it.
    pub fn identity(&self) -> Option<Identity> {
        if self.state.watch().borrow().identity == Some(IdentityState::Taken) {
            return None;
        }
        Some(Identity {
            seed: random(),
            unix_ns: crate::clock::unix_ns(),
            words: self.words.clone(),
            fork: self.fork,
        })
    }
}

/// Waits until the guest is itself, and tells when that takes too long.
async fn await_it(state: State, patience: Duration) {
    if timeout(patience, is_itself(&state)).await.is_err() {
        state.identity_overdue(&format!(
            "the guest has not said within {} s that it took an identity of its own; nobody is served by it",
            patience.as_secs()
        ));
    }
}

/// Waits until it is known whether the guest is itself. One that was booted always is.
pub async fn is_itself(state: &State) -> bool {
    let mut watch = state.watch();
    let settled = watch.wait_for(|status| status.identity != Some(IdentityState::Pending));
    settled
        .await
        .is_ok_and(|status| status.identity != Some(IdentityState::Refused))
}

/// Random bytes of the host's.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // As many as this are given whole, and never refused.
    let given = getrandom(&mut bytes, GetRandomFlags::empty());
    assert_eq!(given, Ok(N), "the kernel gives no random numbers");
    bytes
}

/// Makes an Ethernet address of random bytes: one that no maker gave, and that is no group's.
fn mac(mut bytes: [u8; 6]) -> [u8; 6] {
    bytes[0] = bytes[0] & !1 | 2;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::network::passt;
    use crate::supervisor::state::testing::vm_and_state;

    #[test]
    fn addresses_are_local_and_no_group_s() {
        assert_eq!(mac([0xff; 6])[0], 0xfe);
        assert_eq!(mac([0; 6])[0], 2);
        let made: [[u8; 6]; 2] = [mac(random()), mac(random())];
        assert_ne!(made[0], made[1]);
        assert_ne!(made[0], passt::MAC);
    }

    #[tokio::test]
    async fn an_identity_is_given_until_it_is_taken_and_each_time_with_another_seed() {
        let (vm, state) = vm_and_state();
        assert!(is_itself(&state).await);
        let ports = RandomPorts(40_000..=40_511);
        let giver = Giver::new(&vm, Whose::AnotherS, Some(&ports), &state);
        let [first, second] = [giver.identity().unwrap(), giver.identity().unwrap()];
        assert_ne!(first.seed, second.seed);
        assert!(first.fork.is_some());
        assert_eq!(first.fork, second.fork);
        let socket = vm.paths.docker_socket();
        assert_eq!(RandomPorts::find(&first.words), Some(Ok(ports)));
        assert_eq!(
            lighter_protocol::shares::find_socket(&first.words),
            Ok(Some(socket))
        );
        let waiting = tokio::spawn({
            let state = state.clone();
            async move { is_itself(&state).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        state.identity_taken(true, "");
        assert!(waiting.await.unwrap());
        assert_eq!(giver.identity(), None);
    }

    #[tokio::test]
    async fn a_guest_that_says_nothing_is_refused_in_the_end() {
        let (_, state) = vm_and_state();
        state.identity_awaited();
        await_it(state.clone(), Duration::from_millis(1)).await;
        assert!(!is_itself(&state).await);
        let trouble = state.watch().borrow().trouble.clone().unwrap();
        assert!(trouble.reason.contains("identity of its own"), "{trouble:?}");
    }
}
