//! Random good requests against a disk in memory that cannot be wrong: over one file, and over layers.

use super::*;
use proptest::prelude::*;

/// Three clusters of a layer, and a part of one.
const SECTORS: u64 = 3 * 128 + 5;

#[derive(Clone, Debug)]
enum Request {
    Read {
        sector: u64,
        pieces: Vec<usize>,
    },
    Write {
        sector: u64,
        pieces: Vec<usize>,
        seed: u64,
    },
    Discard {
        sector: u64,
        count: u32,
    },
    Zero {
        sector: u64,
        count: u32,
    },
    Flush,
    /// As a snapshot does.
    AddLayer,
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    // Multiples of 512 in all, cut anywhere.
    (1usize..12, proptest::collection::vec(1usize..900, 0..5)).prop_map(|(sectors, cuts)| {
        let mut left = sectors * 512;
        let mut pieces = vec![];
        for cut in cuts {
            let piece = cut.min(left - 1);
            if piece > 0 {
                pieces.push(piece);
                left -= piece;
            }
        }
        pieces.push(left);
        pieces
    })
}

fn request() -> impl Strategy<Value = Request> {
    // Some of them reach beyond the disk.
    let sector = 0..SECTORS + 2;
    let count = || prop_oneof![1u32..20, 100u32..300];
    prop_oneof![
        3 => (sector.clone(), pieces()).prop_map(|(sector, pieces)| Request::Read { sector, pieces }),
        3 => (sector.clone(), pieces(), any::<u64>())
            .prop_map(|(sector, pieces, seed)| Request::Write { sector, pieces, seed: seed % 1000 }),
        1 => (sector.clone(), count()).prop_map(|(sector, count)| Request::Discard { sector, count }),
        1 => (sector, count()).prop_map(|(sector, count)| Request::Zero { sector, count }),
        1 => Just(Request::Flush),
        1 => Just(Request::AddLayer),
    ]
}

/// The bytes of `count` sectors, if they are on the disk.
fn on_disk(sector: u64, count: usize) -> Option<std::ops::Range<usize>> {
    let start = sector as usize * 512;
    let end = start + count * 512;
    (end <= SECTORS as usize * 512).then_some(start..end)
}

fn check(kind: Kind, layout: Layout, event_idx: bool, layers: bool, requests: &[Request]) {
    let mut setup = Setup::with(kind, SECTORS, false, layout, event_idx);
    let mut model = vec![0; SECTORS as usize * 512];
    for request in requests {
        match request {
            Request::Read { sector, pieces } => {
                let buffers: Vec<_> = pieces
                    .iter()
                    .map(|length| setup.guest.writable(*length))
                    .collect();
                let (status, written) = setup.send(&header(abi::VIRTIO_BLK_T_IN, *sector), &buffers);
                let bytes: Vec<u8> = buffers
                    .iter()
                    .flat_map(|buffer| setup.guest.bytes(*buffer))
                    .collect();
                match on_disk(*sector, bytes.len() / 512) {
                    Some(range) => {
                        assert_eq!((status, written as usize), (OK, bytes.len() + 1));
                        assert!(bytes == model[range], "{request:?}");
                    }
                    None => assert_eq!((status, written), (IOERR, 1)),
                }
            }
            Request::Write { sector, pieces, seed } => {
                let bytes = pattern(*seed, pieces.iter().sum());
                let mut rest = &bytes[..];
                let mut buffers = vec![];
                for length in pieces {
                    let (piece, later) = rest.split_at(*length);
                    buffers.push(setup.guest.readable(piece));
                    rest = later;
                }
                let (status, _) = setup.send(&header(abi::VIRTIO_BLK_T_OUT, *sector), &buffers);
                match on_disk(*sector, bytes.len() / 512) {
                    Some(range) => {
                        assert_eq!(status, OK);
                        model[range].copy_from_slice(&bytes);
                    }
                    None => assert_eq!(status, IOERR),
                }
            }
            Request::Discard { sector, count } | Request::Zero { sector, count } => {
                let (type_, flags) = match request {
                    Request::Discard { .. } => (abi::VIRTIO_BLK_T_DISCARD, 0),
                    _ => (abi::VIRTIO_BLK_T_WRITE_ZEROES, 1),
                };
                let status = setup.empty(type_, &[range(*sector, *count, flags)]);
                match on_disk(*sector, *count as usize) {
                    Some(range) => {
                        assert_eq!(status, OK);
                        model[range].fill(0);
                    }
                    None => assert_eq!(status, IOERR),
                }
            }
            Request::Flush => assert_eq!(setup.flush(), OK),
            Request::AddLayer if layers => setup.add_layer(None).unwrap(),
            Request::AddLayer => {}
        }
    }
    assert!(setup.on_file(0, model.len()) == model, "the file differs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_behaves_like_an_array(
        ring: bool,
        indirect: bool,
        event_idx: bool,
        layers: bool,
        requests in proptest::collection::vec(request(), 1..40),
    ) {
        let kind = if ring { Kind::Best } else { Kind::Plain };
        let layout = if indirect { Layout::Indirect } else { Layout::Direct };
        check(kind, layout, event_idx, layers, &requests);
    }
}
