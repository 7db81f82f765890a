//! A disk of several files.

use super::*;
use crate::virtio::block::operation::StepKind;
use crate::virtio::block::{BlockConfig, BlockError};
use lighter_disk::CLUSTER;
use std::path::Path;

const SECTORS: u64 = 4 * 128;

/// A new layer of a disk of `sectors`.
pub(super) fn layer(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    lighter_disk::create(&file, sectors * 512).unwrap();
    file
}

fn open(path: &Path, write: bool) -> File {
    File::options().read(true).write(write).open(path).unwrap()
}

/// Files of a disk with a base and a layer, by name.
fn files(folder: &Path) -> [std::path::PathBuf; 2] {
    let paths = ["base", "layer"].map(|name| folder.join(name));
    File::create(&paths[0]).unwrap().set_len(SECTORS * 512).unwrap();
    lighter_disk::create(&File::create(&paths[1]).unwrap(), SECTORS * 512).unwrap();
    paths
}

fn config([base, layer]: &[std::path::PathBuf; 2]) -> BlockConfig {
    BlockConfig {
        id: "data".into(),
        file: open(base, false),
        layers: vec![open(layer, true)],
        read_only: false,
    }
}

/// A running device over them.
fn over(paths: &[std::path::PathBuf; 2], features: u64) -> Setup {
    let mut block = Block::new(config(paths)).unwrap();
    let mut guest = Guest::new(64);
    let queue = DriverQueue::new(&mut guest, QUEUE_SIZE, true);
    block.activate(guest.activation(&[&queue], features)).unwrap();
    Setup {
        guest,
        queue,
        block,
        file: open(&paths[0], false),
        layout: Layout::Indirect,
    }
}

#[test]
fn what_was_frozen_does_not_change_and_is_read_through() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, SECTORS);
        assert_eq!(setup.write(0, &pattern(1, 3 * CLUSTER as usize)), OK);
        let before = setup.on_file(0, SECTORS as usize * 512);
        setup.add_layer(None).unwrap();
        assert_eq!(setup.on_file(0, before.len()), before);
        // Parts of the first two clusters; the third is emptied as a whole.
        assert_eq!(setup.write(100, &pattern(2, 60 * 512)), OK);
        assert_eq!(setup.empty(abi::VIRTIO_BLK_T_DISCARD, &[range(256, 128, 0)]), OK);
        setup.add_layer(None).unwrap();
        assert_eq!(setup.write(4, &pattern(3, 512)), OK);
        let mut wanted = before.clone();
        wanted[100 * 512..160 * 512].copy_from_slice(&pattern(2, 60 * 512));
        wanted[256 * 512..384 * 512].fill(0);
        wanted[4 * 512..5 * 512].copy_from_slice(&pattern(3, 512));
        // One request, over all files.
        assert_eq!(setup.read(0, wanted.len()), (OK, wanted.clone()));
        assert_eq!(setup.on_file(0, wanted.len()), wanted);
        let mut base = vec![0; before.len()];
        setup.file.read_exact_at(&mut base, 0).unwrap();
        assert!(base == before, "the base has changed");
    }
}

#[test]
fn a_flush_makes_the_map_last_and_the_end_of_the_device_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(folder.path());
    let map = || {
        let mut map = vec![0; 4];
        open(&paths[1], false).read_exact_at(&mut map, 4096).unwrap();
        map
    };
    // With FLUSH, and without: then each write is one.
    for (features, sector) in [(FLUSH, 0), (0, 128)] {
        let mut setup = over(&paths, features);
        let before = map();
        assert_eq!(setup.write(sector, &pattern(sector, 512)), OK);
        if features == FLUSH {
            assert_eq!(map(), before);
            assert_eq!(setup.flush(), OK);
        }
        assert_eq!(map()[sector as usize / 128], 1);
        assert_eq!(setup.write(256 + sector, &pattern(9, 512)), OK);
        setup.block.deactivate();
        assert_eq!(map()[2 + sector as usize / 128], 1);
    }
    let mut setup = over(&paths, FLUSH);
    for sector in [0, 128] {
        assert_eq!(setup.read(sector, 512), (OK, pattern(sector, 512)));
        assert_eq!(setup.read(256 + sector, 512), (OK, pattern(9, 512)));
    }
}

#[test]
fn many_flushes_and_writes_at_once_are_all_answered() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, 128 * 128);
        setup.add_layer(None).unwrap();
        for round in 0..3 {
            for request in 0..u64::from(QUEUE_SIZE) {
                let type_ = match request % 2 {
                    0 => abi::VIRTIO_BLK_T_OUT,
                    _ => abi::VIRTIO_BLK_T_FLUSH,
                };
                let mut buffers = vec![setup.guest.readable(&header(type_, request / 2 * 128 + round))];
                if request % 2 == 0 {
                    buffers.push(setup.guest.readable(&pattern(request + round, 512)));
                }
                buffers.push(setup.guest.writable(1));
                setup.queue.add(&buffers, Layout::Indirect);
            }
            setup.queue.kick();
            while setup.queue.in_flight() > 0 {
                setup.queue.wait(&setup.guest);
            }
            setup.guest.free_all_but_queue(&setup.queue);
        }
        assert_eq!(setup.flush(), OK);
        assert!(setup.block.disk().layers().unwrap().is_written());
        for cluster in 0..128 {
            assert_eq!(
                setup.read(cluster * 128 + 2, 512),
                (OK, pattern(cluster * 2 + 2, 512))
            );
        }
    }
}

#[test]
fn frozen_files_are_shared_and_the_top_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let paths = files(folder.path());
    let mut first = Block::new(config(&paths)).unwrap();
    assert!(matches!(Block::new(config(&paths)), Err(BlockError::InUse(_))));
    let another = || {
        let path = folder.path().join("another");
        lighter_disk::create(&File::create(&path).unwrap(), SECTORS * 512).unwrap();
        open(&path, true)
    };
    let through = |layers| {
        Block::new(BlockConfig {
            id: "data".into(),
            file: open(&paths[0], false),
            layers,
            read_only: false,
        })
    };
    // The base is frozen, and the layer becomes so.
    drop(through(vec![another()]).unwrap());
    assert!(through(vec![open(&paths[1], false), another()]).is_err());
    first.add_layer(layer(SECTORS), None).unwrap();
    drop(through(vec![open(&paths[1], false), another()]).unwrap());
    assert!(matches!(
        through(vec![open(&paths[1], true)]),
        Err(BlockError::InUse(_))
    ));
}

#[test]
fn what_cannot_be_a_layer_is_refused_and_changes_nothing() {
    let mut setup = Setup::new(Kind::Best, SECTORS);
    assert_eq!(setup.write(0, &[7; 512]), OK);
    let while_it_runs = setup.block.add_layer(layer(SECTORS), None);
    assert!(
        matches!(while_it_runs, Err(BlockError::Busy(_))),
        "{while_it_runs:?}"
    );
    let queues = setup.block.deactivate();
    let raw = tempfile::tempfile().unwrap();
    raw.set_len(SECTORS * 512).unwrap();
    for wrong in [raw, layer(SECTORS + 1), layer(SECTORS - 1)] {
        assert!(matches!(
            setup.block.add_layer(wrong, None),
            Err(BlockError::Layer { .. })
        ));
    }
    let activation = setup.guest.activation_with(queues, FLUSH);
    setup.block.activate(activation).unwrap();
    assert_eq!(setup.read(0, 512), (OK, vec![7; 512]));
    assert_eq!(setup.write(1, &[8; 512]), OK);
    assert_eq!(setup.on_file(0, 1024), [[7; 512], [8; 512]].concat());
    setup.add_layer(None).unwrap();
    assert_eq!(setup.on_file(0, 1024), [[7; 512], [8; 512]].concat());
}

#[test]
fn merged_layers_take_the_place_of_those_before() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, SECTORS);
        for round in 0..4 {
            assert_eq!(setup.write(round * 100, &pattern(round, 50 * 512)), OK);
            setup.add_layer(None).unwrap();
        }
        let before = setup.on_file(0, SECTORS as usize * 512);
        let between: Vec<File> = {
            let chain = setup.block.disk().layers().unwrap();
            assert_eq!(chain.files().len(), 5);
            chain.files()[1..4]
                .iter()
                .map(|file| file.try_clone().unwrap())
                .collect()
        };
        let merged = tempfile::tempfile().unwrap();
        lighter_disk::merge(&between, &merged).unwrap();
        assert_eq!(setup.write(500, &[5; 512]), OK);
        setup.add_layer(Some(merged)).unwrap();
        assert_eq!(setup.block.disk().files().len(), 4);
        assert_eq!(setup.read(0, 500 * 512), (OK, before[..500 * 512].to_vec()));
        assert_eq!(setup.read(500, 512), (OK, vec![5; 512]));
        assert_eq!(setup.write(0, &[6; 512]), OK);
        assert_eq!(
            setup.read(0, 1024),
            (OK, [&[6; 512], &before[512..1024]].concat())
        );
    }
}

#[test]
fn after_a_failed_sync_no_flush_of_layers_succeeds() {
    let mut setup = Setup::new(Kind::Best, SECTORS);
    setup.add_layer(None).unwrap();
    assert_eq!(setup.write(0, &[1; 512]), OK);
    let error = std::io::Error::from_raw_os_error(libc::EIO);
    assert!(setup.block.disk().note_trouble(StepKind::Sync, &error).is_some());
    setup.block.disk().distrust();
    assert_eq!(setup.flush(), IOERR);
    assert_eq!(setup.read(0, 512), (OK, vec![1; 512]));
}
