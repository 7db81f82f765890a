//! What a well-behaved driver sees.

use super::*;
use crate::virtio::block::{BlockConfig, BlockError};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

#[test]
fn what_is_written_is_on_the_file_and_read_back() {
    for kind in KINDS {
        for (layout, event_idx) in [
            (Layout::Direct, false),
            (Layout::Direct, true),
            (Layout::Indirect, true),
        ] {
            let mut setup = Setup::with(kind, 1024, false, layout, event_idx);
            for (round, sector) in [0, 1, 100, 1016].into_iter().enumerate() {
                let data = pattern(round as u64, 4096);
                assert_eq!(setup.write(sector, &data), OK);
                assert_eq!(setup.on_file(sector * 512, 4096), data);
                assert_eq!(setup.read(sector, 4096), (OK, data));
            }
            assert_eq!(setup.flush(), OK);
            assert_eq!(setup.file.metadata().unwrap().len(), 1024 * 512);
        }
    }
}

#[test]
fn buffers_of_any_size_are_filled_in_order() {
    for kind in KINDS {
        let mut setup = Setup::with(kind, 64, false, Layout::Direct, true);
        let data = pattern(1, 2048);
        setup.file.write_all_at(&data, 512).unwrap();
        let header_bytes = header(abi::VIRTIO_BLK_T_IN, 1);
        let (first, second) = header_bytes.split_at(5);
        let buffers = [
            setup.guest.readable(first),
            setup.guest.readable(second),
            setup.guest.writable(1),
            setup.guest.writable(700),
            // The status is the last byte of the last buffer, behind the data.
            setup.guest.writable(2048 - 701 + 1),
        ];
        let used = setup.queue.round_trip(&setup.guest, &buffers, Layout::Direct);
        assert_eq!(used.length, 2049);
        let mut read: Vec<u8> = buffers[2..]
            .iter()
            .flat_map(|buffer| setup.guest.bytes(*buffer))
            .collect();
        assert_eq!(read.pop(), Some(OK));
        assert_eq!(read, data);
        // A header and data in one buffer, written.
        let mut bytes = header(abi::VIRTIO_BLK_T_OUT, 8).to_vec();
        bytes.extend_from_slice(&data[..512]);
        assert_eq!(setup.send(&bytes, &[]), (OK, 1));
        assert_eq!(setup.on_file(8 * 512, 512), data[..512]);
    }
}

#[test]
fn a_full_queue_of_requests_is_completed_each_once() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 4096);
        for round in 0..4 {
            let mut statuses = vec![];
            for request in 0..u64::from(QUEUE_SIZE) {
                let sector = header(abi::VIRTIO_BLK_T_OUT, request * 8);
                let data = pattern(request + round, 4096);
                let status = setup.guest.writable(1);
                setup.guest.fill(status, 0xff);
                let buffers = [setup.guest.readable(&sector), setup.guest.readable(&data), status];
                setup.queue.add(&buffers, Layout::Indirect);
                statuses.push(status);
            }
            setup.queue.kick();
            while setup.queue.in_flight() > 0 {
                setup.queue.wait(&setup.guest);
            }
            assert!(statuses.iter().all(|status| setup.guest.bytes(*status) == [OK]));
            for request in [0, 1, 255] {
                assert_eq!(
                    setup.on_file(request * 4096, 4096),
                    pattern(request + round, 4096)
                );
            }
            setup.guest.free_all_but_queue(&setup.queue);
        }
    }
}

#[test]
fn offsets_beyond_4_gib_are_where_they_should_be() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 6 << 21);
        let far = 5 << 21;
        let data = pattern(3, 1024);
        // Across the 4 GiB line too.
        for sector in [far, (4 << 21) - 1] {
            assert_eq!(setup.write(sector, &data), OK);
            assert_eq!(setup.on_file(sector * 512, 1024), data);
        }
        assert_eq!(setup.read(1 << 21, 1024), (OK, vec![0; 1024]));
        assert_eq!(setup.read(far, 1024), (OK, data));
        let end = (6 << 21) - 2;
        assert_eq!(setup.write(end, &[1; 1024]), OK);
        assert_eq!(setup.write(end + 1, &[1; 1024]), IOERR);
    }
}

#[test]
fn discarded_sectors_go_back_to_the_host_and_read_as_zeros() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 8192);
        assert_eq!(setup.write(0, &[7; 1 << 20]), OK);
        assert_eq!(setup.flush(), OK);
        let before = setup.file.metadata().unwrap().blocks();
        // Two ranges of 256 KiB.
        let ranges = [range(0, 512, 0), range(1024, 512, 0)];
        assert_eq!(setup.empty(abi::VIRTIO_BLK_T_DISCARD, &ranges), OK);
        assert!(setup.file.metadata().unwrap().blocks() <= before - 1024);
        for (sector, byte) in [(0, 0), (512, 7), (1024, 0), (1536, 7)] {
            assert_eq!(
                setup.read(sector, 4096),
                (OK, vec![byte; 4096]),
                "sector {sector}"
            );
        }
        assert_eq!(setup.file.metadata().unwrap().len(), 8192 * 512);
        assert_eq!(setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[range(0, 8, 1)]), UNSUPP);
        for wrong in [
            range(8192, 1, 0),
            range(8191, 2, 0),
            range(u64::MAX, u32::MAX, 0),
            range(0, 0, 0),
        ] {
            assert_eq!(
                setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[range(512, 1, 0), wrong]),
                IOERR
            );
        }
        // A request is refused whole.
        assert_eq!(setup.read(512, 512), (OK, vec![7; 512]));
        assert_eq!(
            setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[range(0, 1, 0); 17]),
            IOERR
        );
        assert_eq!(setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[]), IOERR);
    }
}

#[test]
fn write_zeroes_keeps_or_frees_the_space_as_asked() {
    // Some file systems (tmpfs) cannot zero in place; a guest then hears that, and writes zeros itself.
    let probe = tempfile::tempfile().unwrap();
    let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: plain numbers.
    let can_zero = unsafe { libc::fallocate(probe.as_raw_fd(), mode, 0, 4096) } == 0;
    for kind in KINDS {
        let mut setup = Setup::new(kind, 8192);
        assert_eq!(setup.write(0, &[7; 1 << 20]), OK);
        assert_eq!(setup.flush(), OK);
        let before = setup.file.metadata().unwrap().blocks();
        let zeroes = abi::VIRTIO_BLK_T_WRITE_ZEROES;
        assert_eq!(
            setup.empty(zeroes, &[range(0, 512, 0)]),
            if can_zero { OK } else { UNSUPP }
        );
        assert_eq!(setup.on_file(0, 4096), [if can_zero { 0 } else { 7 }; 4096]);
        assert!(setup.file.metadata().unwrap().blocks() >= before);
        assert_eq!(setup.empty(zeroes, &[range(1024, 512, 1)]), OK);
        assert_eq!(setup.on_file(1024 * 512, 512 * 512), vec![0; 512 * 512]);
        assert!(setup.file.metadata().unwrap().blocks() <= before - 512);
        assert_eq!(setup.on_file(1536 * 512, 512), [7; 512]);
        assert_eq!(setup.empty(zeroes, &[range(0, 8, 2)]), UNSUPP);
        assert_eq!(setup.empty(zeroes, &[range(8191, 2, 1)]), IOERR);
    }
}

#[test]
fn requests_off_the_disk_or_off_its_sectors_are_errors() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        assert_eq!(setup.write(0, &[7; 64 * 512]), OK);
        for (sector, length) in [
            (64, 512),
            (63, 1024),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 512),
        ] {
            assert_eq!(setup.write(sector, &vec![9; length]), IOERR);
            assert_eq!(setup.read(sector, length).0, IOERR);
        }
        for length in [0, 1, 511, 513] {
            assert_eq!(setup.write(0, &vec![9; length]), IOERR);
            assert_eq!(setup.read(0, length).0, IOERR);
        }
        assert_eq!(setup.on_file(0, 64 * 512), [7; 64 * 512]);
        assert_eq!(setup.file.metadata().unwrap().len(), 64 * 512);
        let unknown = setup.send(&header(77, 0), &[]);
        assert_eq!(unknown, (UNSUPP, 1));
    }
}

#[test]
fn a_read_only_disk_is_read_and_never_written() {
    for kind in KINDS {
        let mut setup = Setup::with(kind, 64, true, Layout::Indirect, true);
        setup.file.write_all_at(&[7; 64 * 512], 0).unwrap();
        assert_eq!(setup.read(3, 512), (OK, vec![7; 512]));
        assert_eq!(setup.write(3, &[9; 512]), IOERR);
        assert_eq!(setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[range(0, 8, 0)]), IOERR);
        assert_eq!(
            setup.empty(abi::VIRTIO_BLK_T_WRITE_ZEROES, &[range(0, 8, 1)]),
            IOERR
        );
        assert_eq!(setup.on_file(0, 64 * 512), [7; 64 * 512]);
        let offered = setup.block.features();
        assert_ne!(offered & 1 << abi::VIRTIO_BLK_F_RO, 0);
        assert_eq!(
            offered & (1 << abi::VIRTIO_BLK_F_DISCARD | 1 << abi::VIRTIO_BLK_F_WRITE_ZEROES),
            0
        );
    }
}

#[test]
fn the_serial_number_is_the_id() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        let identify = header(abi::VIRTIO_BLK_T_GET_ID, 0);
        let data = [setup.guest.writable(3), setup.guest.writable(17)];
        assert_eq!(setup.send(&identify, &data), (OK, 21));
        let serial: Vec<u8> = data
            .iter()
            .flat_map(|buffer| setup.guest.bytes(*buffer))
            .collect();
        assert_eq!(serial, b"data\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        let short = setup.guest.writable(2);
        assert_eq!(setup.send(&identify, &[short]), (OK, 3));
        assert_eq!(setup.guest.bytes(short), b"da");
    }
}

#[test]
fn pauses_in_the_middle_of_io_lose_and_repeat_nothing() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 4096);
        for round in 0..30u64 {
            for request in 0..100 {
                let sector = header(abi::VIRTIO_BLK_T_OUT, request * 8);
                let data = pattern(request * round, 4096);
                let status = setup.guest.writable(1);
                setup.guest.fill(status, 0xff);
                let buffers = [setup.guest.readable(&sector), setup.guest.readable(&data), status];
                setup.queue.add(&buffers, Layout::Indirect);
                if request % 33 == 0 {
                    setup.queue.kick();
                    let queues = setup.block.deactivate();
                    assert_eq!(queues.len(), 1);
                    // What was taken is completed: the rings agree.
                    let state = queues[0].save();
                    assert_eq!(state.next_avail, state.next_used);
                    setup
                        .block
                        .activate(setup.guest.activation_with(queues, FLUSH))
                        .unwrap();
                }
            }
            setup.queue.kick();
            // The driver's side fails the test if a chain is used twice.
            while setup.queue.in_flight() > 0 {
                setup.queue.wait(&setup.guest);
            }
            for request in 0..100 {
                assert_eq!(
                    setup.on_file(request * 4096, 4096),
                    pattern(request * round, 4096)
                );
            }
            setup.guest.free_all_but_queue(&setup.queue);
        }
    }
}

#[test]
fn another_driver_can_take_over_after_a_reset() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        assert_eq!(setup.write(0, &[7; 512]), OK);
        assert_eq!(setup.block.deactivate().len(), 1);
        assert!(setup.block.deactivate().is_empty());
        setup.block.reset();
        setup.queue = DriverQueue::new(&mut setup.guest, 16, false);
        // Without FLUSH: writes are made stable one by one, and still succeed.
        let activation = setup.guest.activation(&[&setup.queue], 0);
        setup.block.activate(activation).unwrap();
        setup.layout = Layout::Direct;
        assert_eq!(setup.read(0, 512), (OK, vec![7; 512]));
        assert_eq!(setup.write(1, &[8; 512]), OK);
        assert_eq!(setup.on_file(512, 512), [8; 512]);
    }
}

#[test]
fn the_configuration_space_tells_the_disk() {
    let setup = Setup::new(Kind::Plain, 0x1_0000_0001);
    let mut config = [0xee; 64];
    setup.block.read_config(0, &mut config);
    assert_eq!(config[..8], 0x1_0000_0001u64.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(
        config[36..57],
        [
            [255, 255, 255, 255],
            [16, 0, 0, 0],
            [8, 0, 0, 0],
            [255, 255, 255, 255],
            [1, 0, 0, 0]
        ]
        .concat()
        .into_iter()
        .chain([1])
        .collect::<Vec<u8>>()[..]
    );
    assert_eq!(config[60..], [0xee; 4]);
}

#[test]
fn two_devices_cannot_have_one_disk() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let open = || BlockConfig {
        id: "data".into(),
        file: File::options().read(true).write(true).open(file.path()).unwrap(),
        layers: vec![],
        read_only: false,
    };
    let first = Block::new(open()).unwrap();
    assert_eq!(first.name(), "block data");
    assert!(matches!(Block::new(open()), Err(BlockError::InUse(_))));
    drop(first);
    Block::new(open()).unwrap();
}
