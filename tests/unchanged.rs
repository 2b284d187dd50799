//! Chunks that a save finds in their places: a regression here writes what need not be written, or leaves out what must.
//! What crashes make of it is in tests/crash.

mod common;

use std::os::unix::fs::FileExt;

use common::{disk, disk_is_dax, region_in, save_bytes, save_one, Region, WAIT};
use pccheck::engine::{Select, Store};
use pccheck::format::BLOCK_BYTES;
use pccheck::medium::{Durability, Requested};
use pccheck::save::{Durable, Save};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 9;

fn options(medium: Requested) -> OpenOptions {
    OpenOptions {
        medium,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: CHUNK as u64,
        staging_bytes: 4 * CHUNK as u64,
        rewrite_every: 1000,
        ..OpenOptions::default()
    }
}

fn region() -> Region {
    region_in(disk(), &FormatOptions::new(2, ((CHUNKS + 4) * CHUNK) as u64))
}

fn open(region: &Region, change: impl FnOnce(&mut OpenOptions)) -> Store {
    let mut options = options(Requested::Direct);
    change(&mut options);
    Store::open(&region.path, &options).expect("open")
}

/// Pseudo-random bytes, so that no two chunks are alike.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len).map(|_| next() as u8).collect()
}

fn durable(save: Save) -> Durable {
    save.wait_durable(WAIT).expect("durable")
}

/// Saves the state and returns how many of its chunks were not written.
fn unchanged(store: &Store, step: u64, state: &[u8]) -> u64 {
    let before = store.stats().unchanged_bytes;
    durable(save_one(store, step, state, &[]).expect("begin"));
    (store.stats().unchanged_bytes - before).div_ceil(CHUNK as u64)
}

fn restored(store: &Store, len: usize) -> (u64, Vec<u8>) {
    let mut found = vec![0; len];
    let restored = store
        .restore(Select::Newest, |checkpoint| checkpoint.read_tensors(&mut [("w", &mut found)]))
        .expect("restore");
    (restored.checkpoint.record().step, found)
}

/// A state whose payload (the header's block and the data) is `CHUNKS` chunks.
fn whole_state() -> Vec<u8> {
    bytes(1, CHUNKS * CHUNK - BLOCK_BYTES as usize)
}

#[test]
fn what_did_not_change_is_not_written_and_what_did_is() {
    let region = region();
    let store = open(&region, |_| {});
    let mut state = whole_state();
    let all = CHUNKS as u64;
    assert_eq!((unchanged(&store, 1, &state), unchanged(&store, 2, &state)), (0, 0), "two fresh slots");
    assert_eq!((unchanged(&store, 3, &state), unchanged(&store, 4, &state)), (all, all));
    // Changed for the slot of step 3, then for that of step 4.
    state[3 * CHUNK] ^= 1;
    assert_eq!((unchanged(&store, 5, &state), unchanged(&store, 6, &state)), (all - 1, all - 1));
    assert_eq!(restored(&store, state.len()), (6, state.clone()));
    state[0] ^= 1;
    *state.last_mut().expect("a byte") ^= 1;
    assert_eq!((unchanged(&store, 7, &state), unchanged(&store, 8, &state)), (all - 2, all - 2));
    assert_eq!(restored(&store, state.len()), (8, state.clone()));
    drop(store);
    // The next process knows it from the chunk tables.
    let store = open(&region, |_| {});
    assert_eq!(unchanged(&store, 9, &state), all);
    drop(store);
    let store = open(&region, |options| options.rewrite_every = 1);
    assert_eq!((unchanged(&store, 10, &state), unchanged(&store, 11, &state)), (0, 0), "switched off");
    drop(store);
    let store = open(&region, |options| options.chunk_bytes /= 2);
    assert_eq!(unchanged(&store, 12, &state), 0, "other chunks");
    assert_eq!(restored(&store, state.len()), (12, state));
}

#[test]
fn shorter_and_longer_states_write_what_lies_elsewhere() {
    let region = region();
    let store = open(&region, |_| {});
    let state = whole_state();
    let lengths =
        [state.len(), state.len() - 1, 5 * CHUNK, state.len(), 3, state.len() - 2 * CHUNK + 17, state.len()];
    for (step, &len) in lengths.iter().cycle().take(40).enumerate() {
        durable(save_one(&store, step as u64, &state[..len], &[]).expect("begin"));
        assert_eq!(restored(&store, len), (step as u64, state[..len].to_vec()), "{len} bytes");
    }
    assert!(store.stats().unchanged_bytes > 0);
}

/// Flips a byte on the medium, in chunk `chunk` of the newest checkpoint. Returns its slot.
fn damage_newest(region: &Region, store: &Store, chunk: usize) -> u32 {
    let newest = store.checkpoints().expect("list")[0].record.clone();
    let offset = store.region().layout().slot_offset(newest.slot) + (chunk * CHUNK) as u64 + 5000;
    let file = std::fs::File::options().read(true).write(true).open(&region.path).expect("open the file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], offset).expect("write");
    file.sync_all().expect("sync");
    newest.slot
}

#[test]
fn damage_that_nobody_has_seen_goes_with_the_next_rewrite() {
    const EVERY: u32 = 4;
    let region = region();
    let store = open(&region, |options| options.rewrite_every = EVERY);
    let state = whole_state();
    (1..=2).for_each(|step| assert_eq!(unchanged(&store, step, &state), 0));
    let slot = damage_newest(&region, &store, 2);
    let mut verdicts = Vec::new();
    for step in 3..3 + 2 * u64::from(EVERY) {
        let save = durable(save_one(&store, step, &state, &[]).expect("begin"));
        if save.slot == slot {
            // Through another store, so that this one does not learn of it.
            let other = open(&region, |options| options.read_only = true);
            let found = other.open_checkpoint(Select::Generation(save.generation), true);
            verdicts.push(found.err().map(|error| error.kind()));
        }
    }
    let corrupt = Some(ErrorKind::Corrupt);
    assert_eq!(
        verdicts,
        [corrupt, corrupt, None, None],
        "found by whoever reads it, gone after {EVERY} saves"
    );
}

#[test]
fn every_nth_save_into_a_slot_writes_everything() {
    const EVERY: u32 = 4;
    let region = region();
    let store = open(&region, |options| options.rewrite_every = EVERY);
    let state = whole_state();
    let found: Vec<u64> = (0..24).map(|step| unchanged(&store, step, &state)).collect();
    for slot in 0..2 {
        let of_slot: Vec<bool> = found.iter().skip(slot).step_by(2).map(|&chunks| chunks > 0).collect();
        let expected: Vec<bool> = (1..=12).map(|save| save > 1 && save % EVERY != 0).collect();
        assert_eq!(of_slot, expected, "slot {slot}");
    }
}

#[test]
fn damage_that_was_found_is_written_over_by_the_next_save() {
    let region = region();
    let store = open(&region, |_| {});
    let state = whole_state();
    (1..=2).for_each(|step| assert_eq!(unchanged(&store, step, &state), 0));
    let slot = damage_newest(&region, &store, 2);
    assert_eq!(restored(&store, state.len()), (1, state.clone()), "the older one");
    let mut rewritten = false;
    for step in 3..7 {
        let before = store.stats().unchanged_bytes;
        let save = durable(save_one(&store, step, &state, &[]).expect("begin"));
        rewritten |= save.slot == slot && store.stats().unchanged_bytes == before;
        assert_eq!(restored(&store, state.len()), (step, state.clone()));
    }
    assert!(rewritten, "the damaged slot was believed");
}

/// Any sequence of saves, cancellations, streams and changes gives back what was saved last.
#[test]
fn random_lives_read_what_they_saved() {
    let dax = disk_is_dax().then_some(Requested::Dax);
    for medium in [Requested::Direct, Requested::Mmap].into_iter().chain(dax) {
        let mut random = Random(7);
        let region = region_in(disk(), &FormatOptions::new(4, ((CHUNKS + 4) * CHUNK) as u64));
        let mut tensors: Vec<(String, Vec<u8>)> = (0..4)
            .map(|i| (format!("t{i}"), bytes(i, (1 + i as usize) * CHUNK / 2 + 100 * i as usize)))
            .collect();
        let mut options = OpenOptions { max_in_flight: 2, rewrite_every: 5, ..options(medium) };
        for life in 0..5 {
            options.writers = 1 + life % 3;
            let store = Store::open(&region.path, &options).expect("open");
            for turn in 0..30 {
                let step = u64::from(life) * 100 + turn;
                match random.below(10) {
                    0 => tensors.reverse(),
                    1 => {
                        let len = tensors[0].1.len();
                        tensors[0].1.resize(len * 2 % (2 * CHUNK) + 1, 3);
                    }
                    2..=5 => {
                        let tensor = random.below(4) as usize;
                        let at = random.below(tensors[tensor].1.len() as u64) as usize;
                        tensors[tensor].1[at] ^= 1 << random.below(8);
                    }
                    _ => {}
                }
                match random.below(8) {
                    0 => {
                        let save = save_bytes(&store, step, &tensors, &[]).expect("begin");
                        save.cancel();
                        let _ = save.wait_durable(WAIT);
                    }
                    1 => stream(&store, step, &tensors, random.below(3) > 0),
                    _ => {
                        durable(save_bytes(&store, step, &tensors, &[]).expect("begin"));
                        assert_newest(&store, &tensors);
                    }
                }
            }
            assert!(store.stats().unchanged_bytes > 0, "{medium:?}");
            drop(store);
        }
    }
}

/// A raw save in odd pieces from the back, so that half-filled chunks are spilled; committed or given up.
fn stream(store: &Store, step: u64, tensors: &[(String, Vec<u8>)], commit: bool) {
    let data: Vec<u8> = tensors.iter().flat_map(|(_, data)| data.iter().copied()).collect();
    let mut raw = store.begin_raw(step, data.len() as u64, &[], WAIT).expect("begin");
    let starts: Vec<usize> = (0..data.len()).step_by(CHUNK / 3).collect();
    for &at in starts.iter().rev() {
        raw.write_at(at as u64, &data[at..(at + CHUNK / 3).min(data.len())]).expect("write");
    }
    if !commit {
        return;
    }
    durable(raw.commit().expect("commit"));
    let mut found = vec![0; data.len()];
    store
        .restore(Select::Newest, |checkpoint| checkpoint.read_tensors(&mut [("raw", &mut found)]))
        .expect("restore");
    assert!(found == data, "step {step}: the stream is not what was written");
}

fn assert_newest(store: &Store, tensors: &[(String, Vec<u8>)]) {
    let mut found: Vec<(String, Vec<u8>)> =
        tensors.iter().map(|(name, data)| (name.clone(), vec![0; data.len()])).collect();
    let restored = store.restore(Select::Newest, |checkpoint| {
        let mut wanted: Vec<(&str, &mut [u8])> =
            found.iter_mut().map(|(name, data)| (name.as_str(), &mut data[..])).collect();
        checkpoint.read_tensors(&mut wanted)
    });
    let step = restored.expect("restore").checkpoint.record().step;
    assert!(found == tensors, "step {step}: what was restored is not what was saved");
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}
