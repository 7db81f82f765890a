//! Other ports than those asked for: a VM that goes on from a snapshot has containers that run, with ports that the VM beside it, or
//! any program, may have by now. They get ports of the VM's own block of random ones, one for all addresses and transports of the
//! port that was asked for.

use lighter_protocol::publish::RandomPorts;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Where taken ports went; clones share it.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    block: Option<RandomPorts>,
    went: Arc<Mutex<BTreeMap<u16, u16>>>,
}

impl Elsewhere {
    /// With the ports of `block`; without one nothing goes elsewhere.
    pub fn new(block: Option<RandomPorts>) -> Self {
        Self {
            block,
            went: Arc::default(),
        }
    }

    /// Opens the first port that `open` can in place of `asked`; `None` when there is none, or it fails for another reason than
    /// that a port is taken.
    pub fn find<T>(&self, asked: u16, open: impl Fn(u16) -> io::Result<T>) -> Option<(T, u16)> {
        // Held throughout: ports that come at the same time are not to have each other's.
        let mut went = self.went.lock().unwrap_or_else(PoisonError::into_inner);
        let RandomPorts(block) = self.block.clone()?;
        let before = went.get(&asked).copied();
        let others: Vec<u16> = block
            .filter(|port| !went.values().any(|used| used == port))
            .collect();
        for port in before.into_iter().chain(others) {
            match open(port) {
                Ok(opened) => {
                    went.entry(asked).or_insert(port);
                    return Some((opened, port));
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(_) => return None,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken() -> io::Error {
        io::ErrorKind::AddrInUse.into()
    }

    #[test]
    fn all_of_a_port_goes_to_one_other_that_is_no_other_port_s() {
        let elsewhere = Elsewhere::new(Some(RandomPorts(100..=102)));
        let but_100 = |port| if port == 100 { Err(taken()) } else { Ok(()) };
        assert_eq!(elsewhere.find(80, but_100), Some(((), 101)));
        assert_eq!(elsewhere.find(443, |_| Ok(())), Some(((), 100)));
        // The other family, or datagrams.
        assert_eq!(elsewhere.clone().find(80, |_| Ok(())), Some(((), 101)));
        assert_eq!(
            elsewhere.find(80, |port| if port == 101 { Err(taken()) } else { Ok(()) }),
            Some(((), 102))
        );
        assert_eq!(elsewhere.find(22, |_| Ok(())), Some(((), 102)));
        assert_eq!(elsewhere.find(23, |_| Ok(())), None);
    }

    #[test]
    fn an_address_that_cannot_be_had_ends_the_search() {
        let tried = std::cell::Cell::new(0);
        let elsewhere = Elsewhere::new(Some(RandomPorts(100..=102)));
        let found = elsewhere.find(80, |_| {
            tried.set(tried.get() + 1);
            Err::<(), _>(io::ErrorKind::AddrNotAvailable.into())
        });
        assert_eq!((found, tried.get()), (None, 1));
        assert_eq!(Elsewhere::new(None).find(80, |_| Ok(())), None);
    }
}
