//! The oracle: what the notes say must hold of whatever a crash left.

use std::collections::BTreeSet;

use pccheck::format::SlotRecord;
use pccheck::medium::sim::Note;
use pccheck::recovery::{read_region, DecisionTable, Verdict};
use pccheck::Error;

use crate::world::{label, Content, Setup};

/// What had been promised when the crash came.
#[derive(Debug, Default)]
pub struct Promises {
    pub issued: u64,
    /// Durable, and neither discarded nor about to be.
    acknowledged: BTreeSet<u64>,
    /// Must never be found.
    gone: BTreeSet<u64>,
    pinned: BTreeSet<u64>,
    /// Not confirmed: must not be found yet.
    unconfirmed: BTreeSet<u64>,
    marked: u64,
    /// Held checkpoints below this may be reclaimed.
    floor: u64,
    pub watched: bool,
}

impl Promises {
    pub fn of(notes: &[Note]) -> Promises {
        let mut promises = Promises::default();
        notes.iter().for_each(|note| promises.add(note));
        promises
    }

    fn add(&mut self, note: &Note) {
        match *note {
            Note::Issued { generation, .. } => self.issued = self.issued.max(generation),
            Note::Acknowledged { generation } => {
                self.acknowledged.insert(generation);
            }
            Note::Discarded { newer_than } => self.gone.extend(newer_than + 1..=self.issued),
            Note::Other { label: label::CANCELLED, value } => {
                self.gone.insert(value);
            }
            Note::Other { label: label::PINNED, value } => {
                self.pinned.insert(value);
            }
            Note::Other { label: label::UNPINNING, value } => {
                self.pinned.remove(&value);
            }
            Note::Other { label: label::UNCONFIRMED, value } => {
                self.unconfirmed.insert(value);
            }
            Note::Other { label: label::CONFIRMING, value } => {
                self.unconfirmed.remove(&value);
            }
            Note::Other { label: label::DISCARDING, value } => {
                self.acknowledged.retain(|&generation| generation <= value);
                self.pinned.retain(|&generation| generation <= value);
            }
            Note::Other { label: label::ABANDONING, value } => {
                self.acknowledged.remove(&value);
                self.pinned.remove(&value);
            }
            Note::Other { label: label::ABANDONED, value } => {
                self.gone.insert(value);
            }
            Note::Other { label: label::MARKING, value } => self.floor = self.floor.max(value),
            Note::Other { label: label::MARKED, value } => self.marked = self.marked.max(value),
            Note::Other { label: label::WATCH, .. } => self.watched = true,
            Note::Other { label, .. } => panic!("unknown note {label}"),
        }
    }

    /// Whether the checkpoints `found` (all verified) are what was promised. They may be more.
    fn hold(&self, setup: &Setup, found: &BTreeSet<u64>) -> Result<(), String> {
        let newest = found.last().copied().unwrap_or(0);
        let least = self.acknowledged.last().copied().unwrap_or(0);
        if newest < least || newest > self.issued {
            return Err(format!("recovered {newest}, acknowledged {least}, issued {}", self.issued));
        }
        if let Some(back) = found.intersection(&self.gone).next() {
            return Err(format!("generation {back} was discarded or cancelled, and came back"));
        }
        if let Some(early) = found.intersection(&self.unconfirmed).next() {
            return Err(format!("generation {early} was found before it was confirmed"));
        }
        for &lost in self.acknowledged.difference(found) {
            let newer = found.range(lost..).count();
            if newer < setup.keep as usize {
                return Err(format!(
                    "generation {lost} was durable and is lost; only {newer} newer ones are readable, keep is {}",
                    setup.keep
                ));
            }
            if self.pinned.contains(&lost) {
                return Err(format!("generation {lost} was pinned and is lost"));
            }
            if setup.hold && lost >= self.floor {
                return Err(format!("generation {lost} was held (global mark {}) and is lost", self.floor));
            }
        }
        Ok(())
    }
}

/// What a crash left.
pub struct Seen {
    pub table: DecisionTable,
    /// Highest generation that was issued.
    pub issued: u64,
    /// Recovery had to pass over something newer than what it returns, or over a damaged record.
    pub fell_back: bool,
}

/// Judges the bytes that `read` gives against `notes`. `None`: no region yet, and nothing was saved into it.
pub fn judge(
    setup: &Setup,
    notes: &[Note],
    read: impl Fn(u64, &mut [u8]) -> Result<(), Error>,
) -> Result<Option<Seen>, String> {
    let promises = Promises::of(notes);
    let read = |offset: u64, dst: &mut [u8]| setup.read(offset, dst, &read);
    let table = match read_region(read, setup.layout().region_bytes()) {
        Ok(table) => table,
        Err(_) if promises.issued == 0 => return Ok(None),
        Err(e) => return Err(format!("recovery fails: {e}")),
    };
    if table.control.is_none() {
        return Err("both control blocks are lost".into());
    }
    if table.next_generation <= promises.issued {
        let (next, issued) = (table.next_generation, promises.issued);
        return Err(format!("the next save would be {next}, but {issued} was issued"));
    }
    let mut found = BTreeSet::new();
    for record in table.checkpoints() {
        verify(setup, record, &read)?;
        found.insert(record.generation);
    }
    promises.hold(setup, &found)?;
    for decision in table.slots.iter().filter(|decision| decision.verdict == Verdict::Checkpoint) {
        let generation = decision.record.as_ref().map_or(0, |record| record.generation);
        if promises.pinned.contains(&generation) && !decision.pinned {
            return Err(format!("the pin of generation {generation} is lost"));
        }
    }
    let mark = table.control.as_ref().and_then(|control| control.global).map_or(0, |mark| mark.generation);
    if mark < promises.marked && !promises.gone.contains(&promises.marked) {
        return Err(format!("the global mark was durable at {}, found {mark}", promises.marked));
    }
    let newest = found.last().copied().unwrap_or(0);
    let fell_back = table.slots.iter().any(|decision| {
        matches!(decision.verdict, Verdict::Rejected(_))
            || decision.record.as_ref().is_some_and(|record| record.generation > newest)
    });
    Ok(Some(Seen { table, issued: promises.issued, fell_back }))
}

/// Every byte of a committed slot is what was saved: recovery must not even need its hashes.
fn verify(
    setup: &Setup,
    record: &SlotRecord,
    read: &impl Fn(u64, &mut [u8]) -> Result<(), Error>,
) -> Result<(), String> {
    let (generation, slot) = (record.generation, record.slot);
    let content = Content::of(setup, generation);
    let about = |what: String| format!("generation {generation} is committed in slot {slot}, but {what}");
    if record.step != content.step || record.payload_bytes != content.payload.len() as u64 {
        return Err(about(format!("its record says step {}, {} bytes", record.step, record.payload_bytes)));
    }
    let offset = setup.layout().slot_offset(slot);
    let mut bytes = vec![0; content.payload.len()];
    read(offset, &mut bytes).map_err(|e| about(e.to_string()))?;
    if bytes != content.payload {
        let at = bytes.iter().zip(&content.payload).position(|(found, saved)| found != saved);
        return Err(about(format!("byte {at:?} of its payload is not what was saved")));
    }
    let mut table = vec![0; record.table_bytes() as usize];
    read(offset + record.table_offset, &mut table).map_err(|e| about(e.to_string()))?;
    if table != content.table {
        return Err(about("its chunk table is not that of its payload".into()));
    }
    pccheck::format::decode_table(&table, record).map(drop).map_err(|e| about(e.to_string()))
}
