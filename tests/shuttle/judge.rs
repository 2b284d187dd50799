//! What power loss leaves of a schedule, at any of its barriers.

use std::collections::{BTreeMap, BTreeSet};

use pccheck::format::{decode_table, SlotRecord};
use pccheck::medium::sim::{for_each_crash_image, EnumerateOptions, Image, Note, SimMedium};
use pccheck::recovery::{read_region, DecisionTable, Verdict};

use crate::world::{label, split, Content, Setup};

/// What had been promised.
#[derive(Default)]
struct Promises {
    issued: BTreeSet<u64>,
    /// Generation to step.
    acknowledged: BTreeMap<u64, u64>,
    /// Steps that may go.
    given_up: BTreeSet<u64>,
    /// Steps that must not be found.
    gone: BTreeSet<u64>,
    pinned: BTreeSet<u64>,
    /// Held checkpoints below this generation may be reclaimed.
    floor: u64,
}

impl Promises {
    fn of(notes: &[Note]) -> Promises {
        let mut promises = Promises::default();
        for note in notes {
            let Note::Other { label, value } = *note else { panic!("unknown note {note:?}") };
            let (generation, step) = split(value);
            match label {
                label::ISSUED => drop(promises.issued.insert(step)),
                // Its commit may have been too late to be cancelled: it goes all the same.
                label::ACKNOWLEDGED if promises.given_up.contains(&step) => {}
                label::ACKNOWLEDGED => drop(promises.acknowledged.insert(generation, step)),
                label::CANCELLED | label::UNCONFIRMED => drop(promises.gone.insert(step)),
                label::CONFIRMING => drop(promises.gone.remove(&step)),
                label::PINNED => drop(promises.pinned.insert(step)),
                label::UNPINNING => drop(promises.pinned.remove(&step)),
                label::ABANDONING => {
                    promises.given_up.insert(step);
                    promises.acknowledged.retain(|_, acknowledged| *acknowledged != step);
                    promises.pinned.remove(&step);
                }
                label::ABANDONED => drop(promises.gone.insert(step)),
                label::MARKING => promises.floor = promises.floor.max(generation),
                _ => panic!("unknown note {label}"),
            }
        }
        promises
    }

    /// Whether the checkpoints that were found, generation to step and pin, are what was promised. They may be more.
    fn hold(&self, setup: &Setup, found: &BTreeMap<u64, (u64, bool)>) -> Result<(), String> {
        for (generation, (step, pinned)) in found {
            if !self.issued.contains(step) {
                return Err(format!("step {step} was found before it began"));
            }
            if self.gone.contains(step) {
                return Err(format!("step {step} (generation {generation}) must not be there"));
            }
            if self.pinned.contains(step) && !pinned {
                return Err(format!("step {step} (generation {generation}) is not pinned"));
            }
        }
        for (generation, step) in &self.acknowledged {
            if found.contains_key(generation) {
                continue;
            }
            let newer = found.range(generation..).count();
            let kept = newer < setup.keep as usize;
            let held = setup.hold && *generation >= self.floor;
            if kept || held || self.pinned.contains(step) {
                return Err(format!(
                    "step {step} (generation {generation}) was durable and is lost; {newer} newer ones are there"
                ));
            }
        }
        Ok(())
    }
}

/// Judges what each barrier's images leave: nothing pending kept, everything, or all but one block of it.
pub fn lose_power(setup: &Setup, sim: &SimMedium) {
    let options =
        EnumerateOptions { images_per_point: 2, samples_per_point: 0, ..EnumerateOptions::default() };
    for_each_crash_image(&sim.trace(), &options, |_, image| judge(setup, image))
        .unwrap_or_else(|finding| panic!("law: what was reported durable survives: {finding}"));
}

fn judge(setup: &Setup, image: &Image) -> Result<(), String> {
    let read = |offset: u64, dst: &mut [u8]| {
        image.read(offset, dst);
        Ok(())
    };
    let table = read_region(read, setup.layout().region_bytes()).map_err(|error| error.to_string())?;
    let mut found = BTreeMap::new();
    for record in table.checkpoints() {
        verify(setup, record, image)?;
        found.insert(record.generation, (record.step, is_pinned(&table, record)));
    }
    Promises::of(image.notes()).hold(setup, &found)
}

fn is_pinned(table: &DecisionTable, record: &SlotRecord) -> bool {
    let decision = &table.slots[record.slot as usize];
    decision.verdict == Verdict::Checkpoint && decision.pinned
}

/// Every byte of a committed slot is what was saved: recovery must not even need its hashes.
fn verify(setup: &Setup, record: &SlotRecord, image: &Image) -> Result<(), String> {
    let content = Content::of(record.step);
    let about = |what: &str| format!("step {} is committed in slot {}, but {what}", record.step, record.slot);
    let offset = setup.layout().slot_offset(record.slot);
    let mut payload = vec![0; record.payload_bytes as usize];
    image.read(offset, &mut payload);
    if payload != content.payload {
        return Err(about("its payload is not what was saved"));
    }
    let mut table = vec![0; record.table_bytes() as usize];
    image.read(offset + record.table_offset, &mut table);
    if table != content.table {
        return Err(about("its chunk table is not that of its payload"));
    }
    decode_table(&table, record).map(drop).map_err(|error| about(&error.to_string()))
}
