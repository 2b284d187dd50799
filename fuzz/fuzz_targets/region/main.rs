//! Arbitrary regions are opened, read, written to and grown. Nothing panics, hangs or takes memory out of proportion; an
//! error is never one of the engine itself; what verifies is what was saved; opening for writing loses nothing of
//! that; and a save that was reported durable is what the next opening finds.
#![no_main]

mod image;

use std::path::Path;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use pccheck::engine::{grow_region, Opened, Select, Store, Tensor};
use pccheck::format::{chunk_hash, encode_table, table_hash, Dtype, SlotRecord, RAW_STREAM};
use pccheck::load::{Checkpoint, Part};
use pccheck::medium::{Durability, Requested};
use pccheck::store::OpenOptions;
use pccheck::{Error, ErrorKind};
use pccheck_fuzz::scratch;

use image::{golden_payloads, write_raw, Edit, Image};

/// Longer than anything takes here: libFuzzer's own limit is shorter.
const WAIT: Option<Duration> = Some(Duration::from_secs(60));
/// Largest payload that is read in one piece, to compare it.
const COMPARED_BYTES: u64 = 1 << 20;

#[derive(Arbitrary, Debug)]
enum Base {
    Golden,
    Striped,
    Raw(Vec<u8>),
}

/// How the region is opened for writing, and what is done with it.
#[derive(Arbitrary, Debug)]
struct Course {
    direct: bool,
    keep: u8,
    hold: bool,
    chunk_blocks: u8,
    run_id: u8,
    rewrite_every: u8,
    maintenance: Vec<Maintenance>,
    save_bytes: u16,
    grow: bool,
}

#[derive(Arbitrary, Debug)]
enum Maintenance {
    Pin(u8),
    Unpin(u8),
    Mark(u8),
    Abandon(u8),
    DiscardNewer(u8),
    Repair,
}

#[derive(Arbitrary, Debug)]
struct Input {
    base: Base,
    seal: bool,
    course: Course,
    edits: Vec<Edit>,
}

impl Course {
    fn options(&self) -> OpenOptions {
        let chunk_bytes = (u64::from(self.chunk_blocks) % 4 + 1).next_power_of_two() * 4096;
        OpenOptions {
            medium: if self.direct { Requested::Direct } else { Requested::Auto },
            required: Durability::Process,
            max_in_flight: 1,
            keep: u32::from(self.keep) % 3 + 1,
            hold: self.hold,
            run_id: u64::from(self.run_id),
            rewrite_every: u32::from(self.rewrite_every).max(1),
            chunk_bytes,
            staging_bytes: 4 * chunk_bytes,
            writers: 1,
            readers: 1,
            queue_depth: 4,
            lock_wait: Some(Duration::ZERO),
            ..OpenOptions::default()
        }
    }

    fn reading(&self) -> OpenOptions {
        OpenOptions { read_only: true, ..self.options() }
    }
}

/// An error is for what the region holds, never for a defect of the engine.
fn refused(error: &Error) {
    let never = [
        ErrorKind::Internal,
        ErrorKind::OutOfMemory,
        ErrorKind::Forked,
        ErrorKind::Device,
        ErrorKind::TimedOut,
    ];
    assert!(!never.contains(&error.kind()), "{error:?}");
}

/// The checkpoints that verify, newest first, after everything in them was read and compared.
fn verified(store: &Store) -> Vec<SlotRecord> {
    let infos = match store.checkpoints() {
        Ok(infos) => infos,
        Err(error) => {
            refused(&error);
            return Vec::new();
        }
    };
    let generations: Vec<u64> = infos.iter().map(|info| info.record.generation).collect();
    assert!(generations.windows(2).all(|pair| pair[0] > pair[1]), "{generations:?}");
    let opened = infos.into_iter().filter_map(|info| {
        match store.open_checkpoint(Select::Generation(info.record.generation), true) {
            Ok(opened) => {
                assert_eq!(*opened.checkpoint.record(), info.record);
                hold_against_record(&opened.checkpoint);
                Some(info.record)
            }
            // What is listed lies in the region: it is damaged, or held back for want of slots.
            Err(error) => {
                assert!([ErrorKind::Corrupt, ErrorKind::NoSlot].contains(&error.kind()), "{error:?}");
                None
            }
        }
    });
    opened.collect()
}

/// What is read hashes to what the record says, whoever made the record; the golden payloads are the golden bytes; and all
/// ways to read give the same.
fn hold_against_record(checkpoint: &Checkpoint) {
    let record = checkpoint.record();
    if record.payload_bytes > COMPARED_BYTES {
        return;
    }
    let mut payload = vec![0; record.payload_bytes as usize];
    checkpoint.read(&mut [Part { offset: 0, dst: &mut payload }]).expect("it was verified");
    let hashes: Vec<u128> = payload.chunks(record.chunk_bytes as usize).map(chunk_hash).collect();
    assert_eq!(
        table_hash(&encode_table(&hashes)),
        record.table_hash,
        "bytes that the record does not vouch for"
    );
    if let Some(golden) = golden_payloads().get(&record.table_hash) {
        assert!(payload == *golden, "the golden checkpoint came back changed");
    }
    for tensor in checkpoint.tensors() {
        let bytes = checkpoint.read_tensor(&tensor.name).expect("it was verified");
        assert_eq!(bytes, payload[tensor.offset as usize..][..tensor.bytes as usize], "{tensor:?}");
        assert!(tensor.offset >= record.header_bytes);
    }
}

fn state(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) ^ (at >> 8)) as u8).collect()
}

fn maintain(store: &Store, course: &Course) {
    let generations: Vec<u64> = match store.checkpoints() {
        Ok(infos) => infos.into_iter().map(|info| info.record.generation).collect(),
        Err(error) => return refused(&error),
    };
    let generation = |index: u8| generations.get(usize::from(index) % 4).copied().unwrap_or(index.into());
    for maintenance in course.maintenance.iter().take(4) {
        let result = match *maintenance {
            Maintenance::Pin(index) => store.pin(generation(index)),
            Maintenance::Unpin(index) => store.unpin(generation(index)),
            Maintenance::Mark(step) => store.mark_global(99, u64::from(step)).map(drop),
            Maintenance::Abandon(step) => store.abandon(99, u64::from(step), WAIT).map(drop),
            Maintenance::DiscardNewer(index) => store.discard_newer(generation(index)).map(drop),
            Maintenance::Repair => store.repair(WAIT).map(drop),
        };
        result.unwrap_or_else(|error| refused(&error));
    }
}

/// Saves; the generation, where it became durable.
fn save(store: &Store, data: &[u8]) -> Option<u64> {
    let shape = [data.len() as u64];
    let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &shape, data };
    let durable = store
        .save(77, &[tensor], &[("made", "by the fuzzer")], Some(Duration::ZERO))
        .and_then(|save| save.wait_durable(WAIT));
    match durable {
        Ok(durable) => Some(durable.generation),
        Err(error) => {
            refused(&error);
            None
        }
    }
}

fn is_the_save(opened: &Opened, generation: u64, data: &[u8]) {
    assert_eq!(opened.checkpoint.record().generation, generation, "another checkpoint is the newest");
    assert_eq!(opened.checkpoint.read_tensor("w").expect("the save is whole"), data);
    assert_eq!(opened.checkpoint.metadata()["made"], "by the fuzzer");
}

/// Everything that a writer does; the save that became durable.
fn write(path: &Path, course: &Course, before: &[SlotRecord]) -> Option<(u64, Vec<u8>)> {
    let store = match Store::open(path, &course.options()) {
        Ok(store) => store,
        Err(error) => {
            refused(&error);
            return None;
        }
    };
    for record in before {
        match store.open_checkpoint(Select::Generation(record.generation), true) {
            Ok(opened) => assert_eq!(opened.checkpoint.record(), record),
            // More readers than slots to spare.
            Err(error) => assert_eq!(error.kind(), ErrorKind::NoSlot, "opening lost {record:?}: {error}"),
        }
    }
    maintain(&store, course);
    let next = store.recovered().next_generation;
    let data = state(course.save_bytes.into());
    let generation = save(&store, &data)?;
    assert!(generation >= next, "generation {generation} may have been used");
    let opened = store.open_checkpoint(Select::Newest, true).expect("there is a newest checkpoint");
    is_the_save(&opened, generation, &data);
    let untouched = course.maintenance.is_empty();
    if let Some(kept) = before.first().filter(|_| untouched && course.options().keep > 1) {
        let listed = store.recovered().checkpoints().next().map(|record| record.generation);
        // The newest of all that are listed is kept; it may be one that does not verify.
        if listed == Some(kept.generation) {
            let found = store.open_checkpoint(Select::Generation(kept.generation), true);
            found.unwrap_or_else(|error| panic!("{kept:?} was to be kept: {error}"));
        }
    }
    Some((generation, data))
}

fn run(input: &Input) {
    let path = match &input.base {
        Base::Raw(bytes) => write_raw(bytes, scratch()),
        base => {
            let mut image = Image::golden(matches!(base, Base::Striped));
            input.edits.iter().take(16).for_each(|edit| image.edit(edit));
            if input.seal {
                image.seal_all();
            }
            image.write_to(scratch())
        }
    };
    let course = &input.course;
    let before = match Store::open(&path, &course.reading()) {
        Ok(store) => verified(&store),
        Err(error) => {
            refused(&error);
            Vec::new()
        }
    };
    let saved = write(&path, course, &before);
    if let Some((generation, data)) = &saved {
        let store = Store::open(&path, &course.reading()).expect("what was saved into can be opened");
        let opened = store.open_checkpoint(Select::Newest, true).expect("the durable save is there");
        is_the_save(&opened, *generation, data);
        assert_eq!(opened.checkpoint.record().flags & RAW_STREAM, 0);
        verified(&store);
    }
    if course.grow {
        match grow_region(&path, 6, 1 << 20, Some(Duration::ZERO)) {
            Ok(_) => {
                let store = Store::open(&path, &course.reading()).expect("what was grown can be opened");
                assert_eq!(store.region().layout().slot_count, 6);
                let found = verified(&store);
                if let Some((generation, data)) = &saved {
                    let opened =
                        store.open_checkpoint(Select::Newest, true).expect("the durable save is there");
                    is_the_save(&opened, *generation, data);
                } else {
                    assert!(before.len() <= found.len(), "growing lost a checkpoint");
                }
            }
            Err(error) => refused(&error),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    run(&input);
});
