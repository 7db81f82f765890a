//! Random work on a chain against an array that cannot be wrong, with crashes.

use super::*;
use crate::{commit, create, merge};
use proptest::prelude::*;
use proptest::sample::Index;

const SECTOR: u64 = 512;
/// Six clusters and a part of one.
const SECTORS: u64 = 6 * 128 + 3;
const SIZE: u64 = SECTORS * SECTOR;

#[derive(Clone, Debug)]
enum Step {
    Write { from: Index, count: u64, value: u8 },
    Empty { from: Index, count: u64, kept: bool },
    Flush,
    Push,
    Reopen,
    Crash { seed: u64, in_flush: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let count = || prop_oneof![1u64..20, 100u64..300];
    prop_oneof![
        6 => (any::<Index>(), count(), 1u8..).prop_map(|(from, count, value)| Step::Write { from, count, value }),
        3 => (any::<Index>(), count(), any::<bool>())
            .prop_map(|(from, count, kept)| Step::Empty { from, count, kept }),
        2 => Just(Step::Flush),
        2 => Just(Step::Push),
        1 => Just(Step::Reopen),
        2 => (any::<u64>(), any::<bool>()).prop_map(|(seed, in_flush)| Step::Crash { seed, in_flush }),
    ]
}

fn layer() -> Arc<File> {
    let file = tempfile::tempfile().unwrap();
    create(&file, SIZE).unwrap();
    Arc::new(file)
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

struct World {
    chain: Chain,
    /// What each sector is filled with.
    now: Vec<u8>,
    /// What each may be filled with after a crash: what was there at the last flush, and what was written since.
    may: Vec<Vec<u8>>,
    /// The top as it was then.
    durable: Vec<u8>,
    /// Nobody else has the base, so that layers are written to it.
    alone: bool,
    /// What was frozen, and what was in it.
    frozen: Vec<(Vec<Arc<File>>, Vec<u8>)>,
}

impl World {
    fn new(base_length: u64, alone: bool) -> Self {
        let base = tempfile::tempfile().unwrap();
        let mut now = vec![0; SECTORS as usize];
        for (sector, value) in now.iter_mut().enumerate().take((base_length / SECTOR) as usize) {
            // Some of it is holes.
            if sector / 128 % 2 == 0 {
                *value = 200 + (sector % 50) as u8;
                base.write_all_at(&[*value; 512], sector as u64 * SECTOR).unwrap();
            }
        }
        base.set_len(base_length).unwrap();
        let top = layer();
        let durable = content(&top);
        let mut chain = Chain::open(Arc::new(base), vec![top]).unwrap();
        chain.make_writable().unwrap();
        let may = now.iter().map(|value| vec![*value]).collect();
        Self {
            chain,
            now,
            may,
            durable,
            alone,
            frozen: vec![],
        }
    }

    fn sectors(from: Index, count: u64) -> Range<u64> {
        let from = from.index(SECTORS as usize) as u64;
        from..(from + count).min(SECTORS)
    }

    fn note(&mut self, sectors: Range<u64>, value: u8) {
        for sector in sectors.start as usize..sectors.end as usize {
            self.now[sector] = value;
            self.may[sector].push(value);
        }
    }

    fn write(&mut self, sectors: Range<u64>, value: u8) {
        let (at, length) = (sectors.start * SECTOR, (sectors.end - sectors.start) * SECTOR);
        self.chain.prepare_write(at, length).unwrap();
        let top = &self.chain.files()[self.chain.top()];
        top.write_all_at(&vec![value; length as usize], self.chain.start() + at)
            .unwrap();
        self.note(sectors, value);
    }

    fn empty(&mut self, sectors: Range<u64>, kept: bool) {
        let (at, length) = (sectors.start * SECTOR, (sectors.end - sectors.start) * SECTOR);
        let whole = self.chain.prepare_empty(at, length).unwrap();
        let first = self.chain.start() + at;
        punch(&self.chain.files()[self.chain.top()], first..first + length).unwrap();
        self.chain.emptied(whole, kept);
        self.note(sectors, 0);
    }

    fn flush(&mut self) {
        self.chain.flush().unwrap();
        assert!(self.chain.is_written());
        self.is_durable();
    }

    fn is_durable(&mut self) {
        self.durable = content(&self.chain.files()[self.chain.top()]);
        self.may = self.now.iter().map(|value| vec![*value]).collect();
    }

    fn push(&mut self) {
        self.flush();
        let files = self.chain.files().to_vec();
        let merged = (files.len() > 4).then(|| {
            let between: Vec<File> = files[1..files.len() - 1]
                .iter()
                .map(|file| file.try_clone().unwrap())
                .collect();
            if self.alone {
                commit(&between, &files[0]).unwrap();
                // There is no difference yet.
                self.check();
                return layer();
            }
            let into = tempfile::tempfile().unwrap();
            merge(&between, &into).unwrap();
            Arc::new(into)
        });
        self.chain.push(layer(), merged).unwrap();
        if !self.alone {
            self.frozen.push((files, self.now.clone()));
        }
        self.is_durable();
    }

    fn reopen(&mut self) {
        let files = self.chain.files().to_vec();
        self.chain = Chain::open(files[0].clone(), files[1..].to_vec()).unwrap();
        self.chain.make_writable().unwrap();
    }

    /// The host loses its power: of what was not synced, some is on the disk.
    fn crash(&mut self, seed: u64, in_flush: bool) {
        let mut random = seed;
        let mut coin = || {
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            random >> 62 & 1 == 1
        };
        let top = self.chain.files()[self.chain.top()].clone();
        let start = self.chain.start() as usize;
        let mut after = self.durable.clone();
        if in_flush {
            // The data is synced, and the map is being written.
            let changes = self.chain.take_changes();
            let unwritten = content(&top);
            changes
                .iter()
                .for_each(|changes| self.chain.write_changes(changes).unwrap());
            let written = content(&top);
            after = written.clone();
            for at in (0..start).filter(|_| coin()) {
                after[at] = unwritten[at];
            }
        } else {
            let now = content(&top);
            for at in (start..now.len()).step_by(512).filter(|_| coin()) {
                after[at..at + 512].copy_from_slice(&now[at..at + 512]);
            }
        }
        top.write_all_at(&after, 0).unwrap();
        self.reopen();
        for sector in 0..SECTORS as usize {
            let is = self.sector(sector);
            assert!(
                self.may[sector].contains(&is),
                "sector {sector} is {is} and not of {:?}",
                self.may[sector]
            );
            self.now[sector] = is;
        }
        self.is_durable();
    }

    fn sector(&self, sector: usize) -> u8 {
        let mut bytes = [0; 512];
        self.chain.read_at(&mut bytes, sector as u64 * SECTOR).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == bytes[0]),
            "sector {sector} is torn"
        );
        bytes[0]
    }

    fn check(&self) {
        let all = read(&self.chain);
        assert!(
            all == self.now,
            "{:?}",
            (0..all.len()).find(|sector| all[*sector] != self.now[*sector])
        );
        for (files, then) in &self.frozen {
            // What was frozen has not changed, whoever reads it.
            match &files[1..] {
                [] => {}
                layers => {
                    let chain = Chain::open(files[0].clone(), layers.to_vec()).unwrap();
                    assert_eq!(&read(&chain), then);
                }
            }
        }
        let mut data = vec![false; SECTORS as usize];
        for extent in self.chain.extents().unwrap() {
            for sector in extent.start / SECTOR..extent.end.div_ceil(SECTOR).min(SECTORS) {
                data[sector as usize] = true;
            }
        }
        assert!((0..data.len()).all(|sector| data[sector] || self.now[sector] == 0));
    }
}

fn read(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_chain_is_a_disk_that_keeps_what_was_flushed(
        base in prop_oneof![Just(SIZE), 1..SECTORS - 1],
        alone: bool,
        steps in proptest::collection::vec(step(), 1..50),
    ) {
        let mut world = World::new(if base == SIZE { SIZE } else { base * SECTOR }, alone);
        for step in steps {
            match step {
                Step::Write { from, count, value } => world.write(World::sectors(from, count), value),
                Step::Empty { from, count, kept } => world.empty(World::sectors(from, count), kept),
                Step::Flush => world.flush(),
                Step::Push => world.push(),
                Step::Reopen => {
                    world.flush();
                    world.reopen();
                }
                Step::Crash { seed, in_flush } => world.crash(seed, in_flush),
            }
            world.check();
        }
    }
}

#[test]
fn a_write_is_read_from_the_top_and_the_rest_from_below() {
    let mut world = World::new(SIZE, false);
    assert_eq!(
        world.chain.runs(0, SIZE),
        [Run {
            file: 0,
            at: 0,
            length: SIZE
        }]
    );
    world.write(130..131, 7);
    let start = world.chain.start();
    assert_eq!(
        world.chain.runs(0, 3 * CLUSTER),
        [
            Run {
                file: 0,
                at: 0,
                length: CLUSTER
            },
            Run {
                file: 1,
                at: start + CLUSTER,
                length: CLUSTER
            },
            Run {
                file: 0,
                at: 2 * CLUSTER,
                length: CLUSTER
            },
        ]
    );
    assert_eq!(
        world.chain.runs(512, 512),
        [Run {
            file: 0,
            at: 512,
            length: 512
        }]
    );
    world.check();
}

#[test]
fn what_is_empty_takes_no_space_in_the_top() {
    use std::os::unix::fs::MetadataExt;
    let mut world = World::new(SIZE, false);
    world.write(0..SECTORS, 5);
    world.flush();
    let top = world.chain.files()[1].clone();
    let full = top.metadata().unwrap().blocks();
    world.empty(0..SECTORS, false);
    world.flush();
    assert!(top.metadata().unwrap().blocks() + 6 * 128 <= full);
    // The part of a cluster at the end is none as a whole.
    assert_eq!(world.chain.runs(0, SIZE).len(), 1);
    world.check();
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let file = |size| {
        let file = tempfile::tempfile().unwrap();
        create(&file, size).unwrap();
        Arc::new(file)
    };
    let base = Arc::new(tempfile::tempfile().unwrap());
    base.set_len(SIZE).unwrap();
    let open = |layers| Chain::open(base.clone(), layers).unwrap_err();
    assert!(matches!(open(vec![]), (0, LayerError::Count(0))));
    assert!(matches!(
        open(vec![file(SIZE); crate::MOST_FILES]),
        (0, LayerError::Count(_))
    ));
    assert!(matches!(
        open(vec![file(SIZE), file(SIZE - 512)]),
        (1, LayerError::Order { .. })
    ));
    assert!(matches!(
        open(vec![file(SIZE), base.clone()]),
        (1, LayerError::Magic)
    ));
    let mut chain = Chain::open(base.clone(), vec![file(SIZE)]).unwrap();
    for wrong in [file(SIZE + 512), base] {
        assert!(chain.push(wrong, None).is_err());
        assert_eq!(chain.top(), 1);
    }
}

/// The list of a disk's files is changed after its layers were merged into the base, and there may be no time for that.
#[test]
fn a_disk_that_grew_is_the_same_when_its_merge_into_the_base_was_cut_short() {
    let base = Arc::new(tempfile::tempfile().unwrap());
    base.write_all_at(&[1; 512], 0).unwrap();
    base.set_len(SIZE).unwrap();
    let grown = SIZE + 3 * CLUSTER;
    let mut layers = vec![];
    for (size, written) in [(SIZE, 130), (grown, SECTORS + 200)] {
        let layer = Arc::new(tempfile::tempfile().unwrap());
        create(&layer, size).unwrap();
        layers.push(layer);
        let mut chain = Chain::open(base.clone(), layers.clone()).unwrap();
        chain.make_writable().unwrap();
        chain.prepare_write(written * SECTOR, SECTOR).unwrap();
        let top = &chain.files()[chain.top()];
        top.write_all_at(&[2; 512], chain.start() + written * SECTOR)
            .unwrap();
        chain.flush().unwrap();
    }
    let content = || {
        let chain = Chain::open(base.clone(), layers.clone()).unwrap();
        let mut bytes = vec![0; grown as usize];
        chain.read_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = content();
    let files: Vec<File> = layers.iter().map(|layer| layer.try_clone().unwrap()).collect();
    base.set_len(grown).unwrap();
    assert!(content() == before, "the base was made longer");
    commit(&files, &base).unwrap();
    assert!(content() == before, "the base has all that layers have");
}
