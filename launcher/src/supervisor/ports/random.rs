//! Random ports (`docker run -P`, `-p 80`): dockerd chooses them, and asks nobody. So that no two engines choose the same,
//! each VM has a block of the host's own range for itself. A block is reserved by a socket with an abstract name, which
//! reaches exactly as far as ports do (all users of one network namespace) and is free again when its holder ends,
//! however that ends.

use lighter_protocol::publish::RandomPorts;
use std::ops::RangeInclusive;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// The host's range.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Ports in a block.
const BLOCK: u16 = 512;

/// A block of ports, reserved until dropped.
#[derive(Debug)]
pub struct Block {
    /// For the guest.
    pub ports: RandomPorts,
    _reservation: UnixDatagram,
}

/// Reserves a block; `None` when all are taken. The guest then chooses from the whole range, and dockerd tries again
/// when a port turns out to be taken.
pub fn reserve() -> Option<Block> {
    let range = std::fs::read_to_string(RANGE).ok()?;
    blocks(parse(&range)?).find_map(|ports| {
        let name = format!("lighter-random-ports-{}", ports.start());
        let address = SocketAddr::from_abstract_name(name).ok()?;
        Some(Block {
            _reservation: UnixDatagram::bind_addr(&address).ok()?,
            ports: RandomPorts(ports),
        })
    })
}

fn parse(range: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = range.split_ascii_whitespace().map(str::parse);
    Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
}

fn blocks(range: RangeInclusive<u16>) -> impl Iterator<Item = RangeInclusive<u16>> {
    let last = *range.end();
    range
        .step_by(usize::from(BLOCK))
        .map_while(move |first| Some(first..=first.checked_add(BLOCK - 1).filter(|end| *end <= last)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_and_within_the_range() {
        let all: Vec<_> = blocks(parse("32768\t60999\n").unwrap()).collect();
        assert_eq!(all.len(), 55);
        assert_eq!(all[0], 32768..=33279);
        assert!(all.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        assert_eq!(*all[54].end(), 60927);
        assert_eq!(blocks(65500..=65535).count(), 0);
        assert_eq!(blocks(65024..=65535).count(), 1);
        assert_eq!(parse("1"), None);
    }

    #[test]
    fn no_block_is_had_twice_and_one_that_was_given_up_is_had_again() {
        let first = reserve().unwrap();
        let second = reserve().unwrap();
        assert_ne!(first.ports, second.ports);
        let ports = first.ports.clone();
        drop(first);
        // Other tests reserve, too.
        let reserved: Vec<_> = std::iter::from_fn(reserve).collect();
        assert!(reserved.iter().any(|block| block.ports == ports));
        assert!(reserved.iter().all(|block| block.ports != second.ports));
    }
}
