//! Whole saves and restores of one setting, each beside its ceiling, in turns.

mod report;

use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::MediumInfo;
use pccheck::save::Save;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

pub use report::{json, tables};

use super::ceiling::{self, Mode, Plain};
use super::memory::{Resident, State};
use super::{open_options, Bed, Scratch, Setting, WAIT};

/// What one repetition took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Round {
    /// Mean over the saves of the repetition, from begin to copied.
    pub copied: Duration,
    /// From the first begin to the last durable.
    pub durable: Duration,
    /// Plain writing of as many bytes as were saved, durable.
    pub plain_write: Duration,
    /// Plain copying of the state once.
    pub plain_copy: Duration,
    /// Restoring the newest checkpoint, every chunk verified.
    pub restore: Duration,
    /// Plain reading of as many bytes.
    pub plain_read: Duration,
    /// Processor time of the saves.
    pub cpu: Duration,
    /// Processor time of hashing and copying the state once.
    pub plain_cpu: Duration,
}

/// All that was measured of one setting.
pub struct Measurement {
    /// The setting.
    pub setting: Setting,
    /// Bytes of the state, as saved.
    pub state_bytes: u64,
    /// What the medium gave.
    pub medium: MediumInfo,
    /// Opening the store: staging pool and recovery.
    pub open: Duration,
    /// The first save: copied and durable.
    pub first: (Duration, Duration),
    /// The repetitions.
    pub rounds: Vec<Round>,
    /// Most memory beyond what was there before the store was opened; none where the kernel does not say.
    pub extra_bytes: Option<u64>,
    /// How the plain transfers were done.
    pub write_mode: Mode,
    /// As above.
    pub read_mode: Mode,
    /// Whether the plain transfers bypassed the page cache.
    pub plain_direct: bool,
}

/// Measures one setting in a region of its own.
pub fn run(bed: &mut Bed, setting: &Setting) -> Result<Measurement> {
    let region = Scratch::new(&bed.dir, "region");
    let state_bytes = bed.state.bytes().len() as u64;
    let payload_bytes = crate::commands::format::payload_for_state(state_bytes);
    let options = FormatOptions {
        prewrite: true,
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, payload_bytes)
    };
    format_region(&region.path, &options)?;
    let before = Resident::reset_peak().then(Resident::now).flatten();
    let began = Instant::now();
    // Plain writing goes to the slots behind the engine's back: it may believe in nothing that it wrote there.
    let store = Store::open(&region.path, &OpenOptions { rewrite_every: 1, ..open_options(setting) })?;
    let open = began.elapsed();
    let first = save_all(&store, 0, &bed.state, 1)?;
    // Into every slot once, before anything counts.
    for _ in 0..setting.in_flight {
        bed.state.change();
        save_all(&store, 0, &bed.state, 1)?;
    }
    let mut plain = bed.plain.within(&region.path, places(&store)?.1)?;
    plain.choose_writing(bed.state.bytes())?;
    let mut rounds = (0..bed.repeat)
        .map(|number| save_round(&store, setting, number, bed, &mut plain))
        .collect::<Result<Vec<Round>>>()?;
    plain.go_to(vec![places(&store)?.0]);
    plain.choose_reading(&mut bed.copy)?;
    for (number, round) in rounds.iter_mut().enumerate() {
        restore_round(&store, number as u32, bed, &plain, round)?;
    }
    let peak = Resident::peak();
    Ok(Measurement {
        setting: *setting,
        state_bytes,
        medium: store.medium_info(),
        open,
        first,
        rounds,
        extra_bytes: before.zip(peak).map(|(before, peak)| peak.saturating_sub(before)),
        write_mode: plain.write_mode,
        read_mode: plain.read_mode,
        plain_direct: plain.direct,
    })
}

/// Begins `count` saves, each when the one before is copied; mean time to copied, and time until all are durable.
fn save_all(store: &Store, step: u64, state: &State, count: u32) -> Result<(Duration, Duration)> {
    let shapes = state.shapes();
    let tensors = state.tensors(&shapes);
    let began = Instant::now();
    let saves: Vec<Save> =
        (0..count).map(|_| store.save(step, &tensors, &[], WAIT)).collect::<Result<_>>()?;
    let copied = began.elapsed() / count;
    for save in &saves {
        save.wait_durable(WAIT)?;
    }
    Ok((copied, began.elapsed()))
}

/// Where the newest checkpoint lies in the region, and where the slots that the next saves take.
fn places(store: &Store) -> Result<(u64, Vec<u64>)> {
    let layout = store.region().layout();
    let newest = store.checkpoints()?.first().map_or(0, |newest| newest.record.slot);
    let others = (0..layout.slot_count).filter(|&slot| slot != newest);
    Ok((layout.slot_offset(newest), others.map(|slot| layout.slot_offset(slot)).collect()))
}

/// Save, plain writing to where saves go, and plain copying with hashing, in an order that turns.
fn save_round(
    store: &Store,
    setting: &Setting,
    number: u32,
    bed: &mut Bed,
    plain: &mut Plain,
) -> Result<Round> {
    let mut round = Round::default();
    for turn in 0..3 {
        match (turn + number) % 3 {
            0 => {
                bed.state.change();
                let before = ceiling::process_time();
                (round.copied, round.durable) =
                    save_all(store, u64::from(number) + 1, &bed.state, setting.in_flight)?;
                round.cpu = ceiling::process_time() - before;
            }
            1 => {
                plain.go_to(places(store)?.1);
                round.plain_write = plain.write(bed.state.bytes(), setting.in_flight as usize)?;
            }
            _ => {
                let before = ceiling::process_time();
                ceiling::hash(bed.state.bytes(), setting.chunk_bytes as usize, 1);
                ceiling::copy(bed.state.bytes(), &mut bed.copy, 1);
                round.plain_cpu = ceiling::process_time() - before;
                round.plain_copy = ceiling::copy(bed.state.bytes(), &mut bed.copy, setting.writers as usize);
            }
        }
        bed.bar.inc(1);
    }
    Ok(round)
}

/// Restore and plain reading, in an order that turns.
fn restore_round(store: &Store, number: u32, bed: &mut Bed, plain: &Plain, round: &mut Round) -> Result<()> {
    for turn in 0..2 {
        match (turn + number) % 2 {
            0 => {
                let began = Instant::now();
                store.restore(Select::Newest, |checkpoint| {
                    checkpoint.read_tensors(&mut bed.state.destinations(&mut bed.copy))
                })?;
                round.restore = began.elapsed();
                if &bed.copy[..] != bed.state.bytes() {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "bench",
                        "what was restored is not what was saved",
                    ));
                }
            }
            _ => round.plain_read = plain.read(&mut bed.copy)?,
        }
        bed.bar.inc(1);
    }
    Ok(())
}
