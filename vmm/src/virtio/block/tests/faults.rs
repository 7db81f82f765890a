//! When the host's file fails.

use super::*;
use crate::virtio::block::operation::StepKind;
use std::io;

/// A disk on which no byte can be written: the host's own "disk full" device.
fn full(kind: Kind) -> Setup {
    let file = File::options().read(true).write(true).open("/dev/full").unwrap();
    Setup::over(kind, file, 1024, false, Layout::Indirect, true)
}

#[test]
fn a_full_host_disk_is_an_io_error_told_once_and_reads_go_on() {
    for kind in KINDS {
        let mut setup = full(kind);
        for _ in 0..5 {
            assert_eq!(setup.write(8, &[1; 4096]), IOERR);
        }
        assert_eq!(setup.read(8, 4096), (OK, vec![0; 4096]));
        // It was told: the same trouble is no news.
        let error = io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(setup.block.disk().note_trouble(StepKind::Write, &error), None);
        assert!(!setup.guest.interrupt.needs_reset());
    }
}

#[test]
fn after_a_failed_sync_no_flush_succeeds_even_for_another_driver() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        assert_eq!(setup.flush(), OK);
        setup.block.disk().distrust();
        for _ in 0..2 {
            assert_eq!(setup.flush(), IOERR);
            assert_eq!(setup.write(0, &[1; 512]), OK);
            let queues = setup.block.deactivate();
            setup
                .block
                .activate(setup.guest.activation_with(queues, FLUSH))
                .unwrap();
        }
        // Without FLUSH each write vouches for itself, so it fails.
        let queues = setup.block.deactivate();
        setup
            .block
            .activate(setup.guest.activation_with(queues, 0))
            .unwrap();
        assert_eq!(setup.write(0, &[2; 512]), IOERR);
    }
}

#[test]
fn a_sync_that_fails_is_remembered() {
    for kind in KINDS {
        // fdatasync of a character device fails with EINVAL.
        let mut setup = full(kind);
        assert!(setup.block.disk().is_reliable());
        assert_eq!(setup.flush(), IOERR);
        assert!(!setup.block.disk().is_reliable());
        assert_eq!(setup.flush(), IOERR);
    }
}

#[test]
fn a_file_that_was_cut_short_is_an_io_error() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 64);
        assert_eq!(setup.write(0, &[7; 64 * 512]), OK);
        setup.file.set_len(10 * 512).unwrap();
        assert_eq!(setup.read(9, 1024).0, IOERR);
        assert_eq!(setup.read(0, 512), (OK, vec![7; 512]));
    }
}
