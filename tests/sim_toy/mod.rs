//! A protocol small enough to enumerate in full: two slots, one record block and a two-block payload each.

use std::ops::Range;

use pccheck::medium::sim::{Classifier, Note, RecordClass, SimMedium};
use pccheck::medium::{Barrier, Medium};

pub const BLOCK: usize = 4096;
/// Slots stand 2 MiB apart, as in the real format: the simulator must not care.
pub const SLOT_STRIDE: u64 = 2 << 20;
pub const REGION_BYTES: u64 = 3 * SLOT_STRIDE;
const PAYLOAD_BYTES: usize = 2 * BLOCK;
const WRITING: u64 = 1;
const COMMITTED: u64 = 2;

fn record_offset(slot: u64) -> u64 {
    slot * BLOCK as u64
}

pub fn payload_range(slot: u64) -> Range<u64> {
    let from = (slot + 1) * SLOT_STRIDE;
    from..from + PAYLOAD_BYTES as u64
}

fn checksum(generation: u64, state: u64) -> u64 {
    (generation ^ 0x1234_5678_9abc_def1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(state as u32)
}

fn record(generation: u64, state: u64) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    for (at, word) in [generation, state, checksum(generation, state)].into_iter().enumerate() {
        block[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
    }
    block
}

fn parse(block: &[u8]) -> Option<(u64, u64)> {
    let word = |at: usize| u64::from_le_bytes(block[8 * at..8 * at + 8].try_into().expect("8 bytes"));
    let (generation, state) = (word(0), word(1));
    let valid = (state == WRITING || state == COMMITTED) && word(2) == checksum(generation, state);
    valid.then_some((generation, state))
}

/// Few words differ between generations, so that the set of images stays small.
pub fn payload(generation: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAYLOAD_BYTES];
    for at in [0, 2048, BLOCK, BLOCK + 512] {
        bytes[at..at + 8].copy_from_slice(&(generation.wrapping_mul(0x0101_0101) + at as u64).to_le_bytes());
    }
    bytes
}

/// One save: the order of steps of the real protocol. `copy` stores the payload.
pub fn save_with(sim: &SimMedium, generation: u64, copy: impl FnOnce(&SimMedium, u64, &[u8])) {
    let slot = generation % 2;
    let range = payload_range(slot);
    sim.note(Note::Issued { generation, fingerprint: 0 });
    sim.write_durable(record_offset(slot), &record(generation, WRITING), Barrier::WritingMark).expect("mark");
    copy(sim, range.start, &payload(generation));
    sim.persist(range.start, range.end - range.start, Barrier::Payload).expect("persist payload");
    sim.write_durable(record_offset(slot), &record(generation, COMMITTED), Barrier::Commit).expect("commit");
    sim.note(Note::Acknowledged { generation });
}

/// A save whose payload is stored and fenced by a thread of its own, as the engine's writers do.
pub fn save(sim: &SimMedium, generation: u64) {
    save_with(sim, generation, |sim, offset, bytes| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sim.copy(offset, bytes).expect("copy");
                sim.fence(Barrier::Chunk).expect("fence");
            });
        });
    });
}

/// Newest committed generation; an error when any committed slot does not hold what was saved.
pub fn recover(sim: &SimMedium) -> Result<Option<u64>, String> {
    let mut newest = None;
    for slot in 0..2 {
        let mut block = [0; BLOCK];
        sim.read(record_offset(slot), &mut block).map_err(|error| error.to_string())?;
        let Some((generation, COMMITTED)) = parse(&block) else { continue };
        let mut found = vec![0; PAYLOAD_BYTES];
        sim.read(payload_range(slot).start, &mut found).map_err(|error| error.to_string())?;
        if found != payload(generation) {
            return Err(format!(
                "generation {generation} is committed, but its payload is not what was saved"
            ));
        }
        newest = newest.max(Some(generation));
    }
    Ok(newest)
}

/// Recovery must return a generation in [newest acknowledged, newest issued].
pub fn judge(sim: &SimMedium, notes: &[Note]) -> Result<Option<u64>, String> {
    let acknowledged = notes.iter().filter_map(|note| match note {
        Note::Acknowledged { generation } => Some(*generation),
        _ => None,
    });
    let issued = notes.iter().filter_map(|note| match note {
        Note::Issued { generation, .. } => Some(*generation),
        _ => None,
    });
    let (least, most) = (acknowledged.max(), issued.max());
    let found = recover(sim)?;
    if found < least || found > most {
        return Err(format!("recovered {found:?}, acknowledged {least:?}, issued {most:?}"));
    }
    Ok(found)
}

/// Open after a process died: what is seen becomes durable before it is trusted.
pub fn reopen(sim: &SimMedium) -> Result<Option<u64>, String> {
    sim.persist(0, REGION_BYTES, Barrier::Open).map_err(|error| error.to_string())?;
    let found = recover(sim)?;
    if let Some(generation) = found {
        sim.note(Note::Acknowledged { generation });
    }
    Ok(found)
}

/// The toy's format, for the oracle.
pub struct ToyFormat;

impl Classifier for ToyFormat {
    fn record(&self, offset: u64, block: &[u8]) -> Option<RecordClass> {
        if offset >= SLOT_STRIDE {
            return None;
        }
        Some(match parse(block) {
            Some((_, COMMITTED)) => {
                RecordClass::Commit { refers_to: vec![payload_range(offset / BLOCK as u64)] }
            }
            Some(_) => RecordClass::Writing,
            None => RecordClass::Other,
        })
    }

    fn guard(&self, offset: u64) -> Option<u64> {
        (offset >= SLOT_STRIDE).then(|| record_offset(offset / SLOT_STRIDE - 1))
    }
}
