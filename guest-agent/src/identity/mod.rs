//! Who a guest is that goes on from a snapshot: the one that was saved, or others from the same snapshot, may live beside it, with
//! the same memory. Before anything of it is served, it takes what the supervisor gives it of its own
//! ([`lighter_protocol::agent::Identity`]).
//!
//! - [`entropy`]: random numbers
//! - [`conntrack`]: connections of the network that it was on
//! - [`engine`]: what the engine has written down of itself
//!
//! The kernel has been told already that it goes on from a snapshot (its VM generation ID is another), and has seeded its generator
//! anew; this adds what the host has to give. What the user sees is told in `docs/identity.md`.

mod conntrack;
mod engine;
mod entropy;

use std::io;

use lighter_protocol::{
    agent::{AgentMessage, Identity},
    causes::chain,
};
use tokio::task::spawn_blocking;

use crate::{
    clock,
    log::Log,
    machine_id, network,
    random_ports::{self, Given},
    shares,
};

/// What a guest could not take.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// The clock is as the snapshot's.
    #[error("cannot set the clock")]
    Clock(#[source] io::Error),
    /// A step.
    #[error(transparent)]
    MachineId(#[from] machine_id::Error),
    /// A step.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// A step.
    #[error(transparent)]
    Conntrack(#[from] conntrack::Error),
    /// A step.
    #[error(transparent)]
    Socket(#[from] shares::Error),
    /// A step.
    #[error(transparent)]
    RandomPorts(#[from] random_ports::Error),
    /// A step.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

/// Takes `identity`, and says how that went. It may be taken again when the answer was lost.
pub async fn take(identity: Identity, random_ports: Given, log: &Log) -> AgentMessage {
    let taking = spawn_blocking(move || take_now(&identity, &random_ports));
    let (seeded, troubles) = taking
        .await
        .unwrap_or_else(|error| (false, vec![format!("taking an identity failed: {error}")]));
    for trouble in &troubles {
        log.error(trouble.clone());
    }
    AgentMessage::IdentityTaken { seeded, troubles }
}

fn take_now(identity: &Identity, random_ports: &Given) -> (bool, Vec<String>) {
    // First: what follows needs random numbers.
    let credited = entropy::credit(&identity.seed);
    let seeded = credited.is_ok();
    let mut troubles: Vec<String> = credited.err().iter().map(|error| chain(error)).collect();
    let clock = || clock::set(identity.unix_ns).map_err(Error::Clock);
    let connections = || Ok(conntrack::forget(&network::addresses()?)?);
    let fork = identity.fork.as_ref();
    let steps: [&dyn Fn() -> Result<(), Error>; 5] = [
        &clock,
        &|| Ok(network::renew(fork.map(|fork| fork.mac))?),
        &connections,
        &|| Ok(shares::add_socket(&identity.words)?),
        &|| Ok(random_ports.take(&identity.words)?),
    ];
    let steps_of_fork: [&dyn Fn() -> Result<(), Error>; 3] =
        [&|| Ok(machine_id::renew()?), &|| Ok(engine::renew_id()?), &|| {
            Ok(engine::leave_swarm()?)
        }];
    let steps_of_fork = fork.map_or(&[][..], |_| &steps_of_fork);
    for step in steps.iter().chain(steps_of_fork) {
        troubles.extend(step().err().iter().map(|error| chain(error)));
    }
    (seeded, troubles)
}
