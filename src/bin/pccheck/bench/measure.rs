//! One setting: saves and restores, each beside its ceiling, in turns.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use pccheck::engine::{format_region_with_progress, Select, Store};
use pccheck::medium::{Durability, MediumInfo};
use pccheck::save::Save;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

use super::ceiling::{self, Mode, Plain};
use super::memory::{Resident, State};
use super::Setting;
use crate::units;

/// Longer than any disk takes for one save.
const WAIT: Option<Duration> = Some(Duration::from_secs(3600));

/// What one repetition took.
#[derive(Debug, Clone, Copy)]
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

/// Measures one setting in a region of its own at `path`.
pub fn run(
    path: &Path,
    setting: &Setting,
    repeat: u32,
    state: &mut State,
    copy: &mut [u8],
    plain: &Plain,
    bar: &ProgressBar,
) -> Result<Measurement> {
    bar.set_message(format!(
        "{}, {} in flight, pool {}",
        units::size(setting.state_bytes),
        setting.in_flight,
        units::size(setting.staging_bytes)
    ));
    let payload_bytes = crate::commands::format::payload_for_state(state.bytes().len() as u64);
    let options = FormatOptions {
        prewrite: true,
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, payload_bytes)
    };
    format_region_with_progress(path, &options, &mut |_, _| {})?;
    let before = Resident::reset_peak().then(Resident::now).flatten();
    let began = Instant::now();
    let store = Store::open(path, &open_options(setting))?;
    let open = began.elapsed();
    let first = save_all(&store, 0, state, 1)?;
    let mut saves = Vec::new();
    for round in 0..repeat {
        saves.push(save_round(&store, setting, round, state, copy, plain, bar)?);
    }
    let mut rounds = Vec::new();
    for (round, (copied, durable, plain_write, plain_copy)) in saves.into_iter().enumerate() {
        let (restore, plain_read) = restore_round(&store, round as u32, state, copy, plain, bar)?;
        rounds.push(Round { copied, durable, plain_write, plain_copy, restore, plain_read });
    }
    let peak = Resident::peak();
    Ok(Measurement {
        setting: *setting,
        state_bytes: state.bytes().len() as u64,
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

fn open_options(setting: &Setting) -> OpenOptions {
    OpenOptions {
        medium: setting.medium.into(),
        required: Durability::Process,
        max_in_flight: setting.in_flight,
        staging_bytes: setting.staging_bytes,
        chunk_bytes: setting.chunk_bytes,
        writers: setting.writers,
        ..OpenOptions::default()
    }
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

/// Save, plain writing and plain copying, in an order that turns.
fn save_round(
    store: &Store,
    setting: &Setting,
    round: u32,
    state: &mut State,
    copy: &mut [u8],
    plain: &Plain,
    bar: &ProgressBar,
) -> Result<(Duration, Duration, Duration, Duration)> {
    let mut engine = (Duration::ZERO, Duration::ZERO);
    let (mut write, mut copying) = (Duration::ZERO, Duration::ZERO);
    for turn in 0..3 {
        match (turn + round) % 3 {
            0 => {
                state.change();
                engine = save_all(store, u64::from(round) + 1, state, setting.in_flight)?;
            }
            1 => write = plain.write(state.bytes(), setting.in_flight as usize)?,
            _ => copying = ceiling::copy(state.bytes(), copy, setting.writers as usize),
        }
        bar.inc(1);
    }
    Ok((engine.0, engine.1, write, copying))
}

/// Restore and plain reading, in an order that turns.
fn restore_round(
    store: &Store,
    round: u32,
    state: &State,
    copy: &mut [u8],
    plain: &Plain,
    bar: &ProgressBar,
) -> Result<(Duration, Duration)> {
    let (mut restore, mut read) = (Duration::ZERO, Duration::ZERO);
    for turn in 0..2 {
        match (turn + round) % 2 {
            0 => {
                let began = Instant::now();
                store.restore(Select::Newest, |checkpoint| {
                    checkpoint.read_tensors(&mut state.destinations(copy))
                })?;
                restore = began.elapsed();
                if copy != state.bytes() {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "bench",
                        "what was restored is not what was saved",
                    ));
                }
            }
            _ => read = plain.read(copy)?,
        }
        bar.inc(1);
    }
    Ok((restore, read))
}
