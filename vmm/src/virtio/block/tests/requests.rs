//! Parsing alone.

use super::*;
use crate::memory::{self, GuestMemory};
use crate::virtio::block::request::{Action, Malformed, Reply, Rules, Status, parse};
use crate::virtio::testing::WRITE;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const RULES: Rules = Rules {
    sectors: 1 << 20,
    read_only: false,
    writethrough: false,
};

/// Where the tests put a header.
const HEADER_AT: u64 = 0x1000;

fn readable(address: u64, length: u32) -> Descriptor {
    Descriptor::new(address, length, 0, 0)
}

fn writable(address: u64, length: u32) -> Descriptor {
    Descriptor::new(address, length, WRITE, 0)
}

fn parsed(type_: u32, sector: u64, data: &[Descriptor], rules: Rules) -> Result<(Reply, Action), Malformed> {
    let memory = memory_with(type_, sector);
    let mut chain = vec![readable(HEADER_AT, 16)];
    chain.extend_from_slice(data);
    chain.push(writable(0x8000, 1));
    parse(&memory, 3, chain.into_iter(), rules)
}

fn memory_with(type_: u32, sector: u64) -> GuestMemory {
    let memory = memory::create(1).unwrap();
    memory
        .write_slice(&header(type_, sector), GuestAddress(HEADER_AT))
        .unwrap();
    memory
}

#[test]
fn a_read_has_its_data_counted_and_vouches_for_nothing() {
    let data = [writable(0x2000, 500), writable(0x3000, 12)];
    let (reply, action) = parsed(abi::VIRTIO_BLK_T_IN, 4, &data, RULES).unwrap();
    let expected = Reply {
        head: 3,
        status: GuestAddress(0x8000),
        data: 512,
        durable: false,
    };
    assert_eq!(reply, expected);
    assert!(matches!(action, Action::Operate(_)));
}

#[test]
fn writes_vouch_for_themselves_when_the_driver_cannot_flush() {
    for writethrough in [false, true] {
        let rules = Rules {
            writethrough,
            ..RULES
        };
        let data = [readable(0x2000, 512)];
        let (reply, _) = parsed(abi::VIRTIO_BLK_T_OUT, 4, &data, rules).unwrap();
        assert_eq!(reply.durable, writethrough);
        let (reply, _) = parsed(abi::VIRTIO_BLK_T_FLUSH, 0, &[], rules).unwrap();
        assert!(reply.durable);
    }
}

#[test]
fn what_cannot_be_answered_is_malformed() {
    let memory = memory_with(abi::VIRTIO_BLK_T_IN, 0);
    let outcome = |chain: &[Descriptor]| parse(&memory, 0, chain.iter().copied(), RULES).map(|_| ());
    let head = readable(HEADER_AT, 16);
    assert!(matches!(outcome(&[]), Err(Malformed::NoStatus)));
    assert!(matches!(outcome(&[head]), Err(Malformed::NoStatus)));
    assert!(matches!(
        outcome(&[head, writable(0x8000, 0)]),
        Err(Malformed::NoStatus)
    ));
    let short = readable(HEADER_AT, 15);
    assert!(matches!(
        outcome(&[short, writable(0x8000, 1)]),
        Err(Malformed::NoHeader)
    ));
    let late = [writable(0x8000, 1), head];
    assert!(matches!(outcome(&late), Err(Malformed::Order)));
    for status in [1 << 20, u64::MAX] {
        assert!(matches!(
            outcome(&[head, writable(status, 1)]),
            Err(Malformed::Outside(_))
        ));
    }
    assert!(matches!(
        outcome(&[head, writable(u64::MAX, 2)]),
        Err(Malformed::NoStatus)
    ));
    let outside = [head, writable(0xf_fe00, 1024), writable(0x8000, 1)];
    assert!(matches!(outcome(&outside), Err(Malformed::Outside(_))));
    let many: Vec<_> = (0..257).map(|_| writable(0x8000, 1)).collect();
    assert!(matches!(outcome(&many), Err(Malformed::TooLong)));
    let long: Vec<_> = (0..2).map(|_| writable(0x8000, u32::MAX)).collect();
    assert!(matches!(outcome(&long), Err(Malformed::TooLong)));
}

prop_compose! {
    /// Descriptors that are often near something that exists.
    fn any_descriptor()(
        address in prop_oneof![Just(HEADER_AT), 0u64..0x11_0000, Just(u64::MAX), any::<u64>()],
        length in prop_oneof![Just(16), Just(1), Just(512), 0u32..0x1_0000, any::<u32>()],
        flags in any::<u16>(),
    ) -> Descriptor {
        Descriptor::new(address, length, flags, 0)
    }
}

proptest! {
    #[test]
    fn any_chain_is_parsed_without_harm(
        type_ in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..1 << 21, any::<u64>()],
        chain in proptest::collection::vec(any_descriptor(), 0..300),
        read_only: bool,
    ) {
        let memory = memory_with(type_, sector);
        let rules = Rules { read_only, ..RULES };
        if let Ok((reply, action)) = parse(&memory, 0, chain.into_iter(), rules) {
            prop_assert!(reply.status.0 < 1 << 20);
            let writes = ![abi::VIRTIO_BLK_T_IN, abi::VIRTIO_BLK_T_FLUSH].contains(&type_);
            if read_only && writes {
                prop_assert!(!matches!(action, Action::Operate(_)));
            }
        }
    }

    #[test]
    fn the_spread_over_descriptors_does_not_matter(
        cuts in proptest::collection::vec(1u32..700, 1..20),
        sectors in 1u32..8,
    ) {
        // The data lies in one piece of memory, cut up in any way, and the status byte follows it.
        let memory = memory_with(abi::VIRTIO_BLK_T_IN, 9);
        let mut chain: Vec<_> = (0..16).map(|byte| readable(HEADER_AT + byte, 1)).collect();
        let (mut at, end) = (0x2000, 0x2000 + u64::from(sectors) * 512 + 1);
        for cut in cuts {
            let part = u64::from(cut).min(end - at);
            chain.push(writable(at, part as u32));
            at += part;
        }
        chain.push(writable(at, (end - at) as u32));
        let (reply, action) = parse(&memory, 0, chain.into_iter(), RULES).unwrap();
        prop_assert_eq!(reply.status.0, end - 1);
        prop_assert_eq!(reply.data, sectors * 512);
        prop_assert!(matches!(action, Action::Operate(_)));
    }

    #[test]
    fn only_whole_ranges_on_the_disk_are_emptied(
        sector in prop_oneof![0u64..1 << 21, any::<u64>()],
        count in prop_oneof![0u32..1 << 21, any::<u32>()],
        flags in 0u32..3,
        zeroes: bool,
    ) {
        let type_ = if zeroes { abi::VIRTIO_BLK_T_WRITE_ZEROES } else { abi::VIRTIO_BLK_T_DISCARD };
        let memory = memory_with(type_, 0);
        memory.write_slice(&range(sector, count, flags), GuestAddress(0x2000)).unwrap();
        let chain = [readable(HEADER_AT, 16), readable(0x2000, 16), writable(0x8000, 1)];
        let (_, action) = parse(&memory, 0, chain.into_iter(), RULES).unwrap();
        let on_disk = count > 0 && sector.checked_add(count.into()).is_some_and(|end| end <= RULES.sectors);
        let expected = match (flags <= u32::from(zeroes), on_disk) {
            (true, true) => None,
            (false, _) => Some(Status::Unsupported),
            (true, false) => Some(Status::IoError),
        };
        let refused = match action {
            Action::Refuse(status) => Some(status),
            _ => None,
        };
        prop_assert_eq!(refused, expected);
    }
}
