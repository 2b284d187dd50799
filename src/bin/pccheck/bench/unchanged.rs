//! Saves of a state of which few chunks change, beside one hashing pass and plain writing of those chunks.

use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Store};
use pccheck::store::{FormatOptions, OpenOptions, MAX_REWRITE_EVERY};
use pccheck::Result;
use serde_json::{json, Value};

use super::ceiling;
use super::figures::{ms, ratio, us, Spread};
use super::{open_options, Bed, Scratch, Setting, WAIT};
use crate::commands::medium_name;
use crate::table::Table;
use crate::units;

/// One chunk in so many changes.
const ONE_IN: usize = 100;

/// Which chunks change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    /// One after the other, always the same.
    Together,
    /// All over the state, always the same.
    Scattered,
    /// All over the state, others each time: a slot, which holds the state of two saves ago, misses twice as many.
    Moving,
}

impl Where {
    const ALL: [Where; 3] = [Where::Together, Where::Scattered, Where::Moving];

    fn name(self) -> &'static str {
        match self {
            Where::Together => "contiguous",
            Where::Scattered => "scattered",
            Where::Moving => "moving",
        }
    }

    /// Chunks that change before save `number`, ascending.
    fn chunks(self, number: usize, count: usize) -> Vec<usize> {
        let changed = (count / ONE_IN).max(1);
        let apart = count / changed;
        match self {
            Where::Together => (count / 2..count / 2 + changed).collect(),
            Where::Scattered => (0..changed).map(|n| n * apart).collect(),
            Where::Moving => (0..changed).map(|n| n * apart + number % apart).collect(),
        }
    }
}

/// One way of changing, repeated.
pub struct Measured {
    setting: Setting,
    medium: &'static str,
    place: Where,
    /// Per repetition: the engine's time, hashing, writing by hand, bytes that the engine wrote.
    rounds: Vec<Round>,
}

struct Round {
    durable: Duration,
    hashing: Duration,
    writing: Duration,
    written_bytes: u64,
}

pub fn run(bed: &mut Bed, setting: &Setting) -> Result<Vec<Measured>> {
    let region = Scratch::new(&bed.dir, "region");
    let state_bytes = bed.state.bytes().len();
    let payload_bytes = crate::commands::format::payload_for_state(state_bytes as u64);
    let options = FormatOptions {
        prewrite: true,
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, payload_bytes)
    };
    format_region(&region.path, &options)?;
    // Never everything in between: that is a save like any other.
    let options = OpenOptions { rewrite_every: MAX_REWRITE_EVERY, ..open_options(setting) };
    let store = Store::open(&region.path, &options)?;
    let medium = medium_name(store.medium_info().kind);
    let slots = setting.in_flight as usize + 1;
    let chunk_bytes = setting.chunk_bytes as usize;
    let count = state_bytes / chunk_bytes;
    let mut results = Vec::new();
    let mut step = 0;
    for place in Where::ALL {
        let mut rounds = Vec::new();
        // Each slot has the state, and then learns what is steady, before anything counts.
        for number in 0..3 * slots + bed.repeat as usize {
            let changed = place.chunks(number, count);
            for &chunk in &changed {
                bed.state.change_at(chunk * chunk_bytes);
            }
            let missing = match place {
                // A slot lacks all that changed since it was saved into.
                Where::Moving => {
                    let since = number.saturating_sub(slots - 1)..=number;
                    let mut missing: Vec<usize> = since.flat_map(|n| place.chunks(n, count)).collect();
                    missing.sort_unstable();
                    missing
                }
                _ => changed,
            };
            let mut round = Round {
                durable: Duration::ZERO,
                hashing: Duration::ZERO,
                writing: Duration::ZERO,
                written_bytes: 0,
            };
            for turn in 0..2 {
                if (turn + number) % 2 == 0 {
                    step += 1;
                    let before = store.stats();
                    let shapes = bed.state.shapes();
                    let tensors = bed.state.tensors(&shapes);
                    let began = Instant::now();
                    store.save(step, &tensors, &[], WAIT)?.wait_durable(WAIT)?;
                    round.durable = began.elapsed();
                    let after = store.stats();
                    let unchanged = after.unchanged_bytes - before.unchanged_bytes;
                    round.written_bytes =
                        (after.durable_bytes - before.durable_bytes).saturating_sub(unchanged);
                } else {
                    round.hashing = ceiling::hash(bed.state.bytes(), chunk_bytes, setting.writers as usize);
                    let pieces: Vec<(u64, &[u8])> = missing
                        .iter()
                        .map(|&chunk| (chunk * chunk_bytes, (chunk + 1) * chunk_bytes))
                        .map(|(start, end)| (start as u64, &bed.state.bytes()[start..end]))
                        .collect();
                    round.writing = bed.plain.write_pieces(&pieces)?;
                }
            }
            if number >= 3 * slots {
                rounds.push(round);
                bed.bar.inc(1);
            }
        }
        results.push(Measured { setting: *setting, medium, place, rounds });
    }
    Ok(results)
}

pub fn table(results: &[Measured]) -> String {
    let mut text = format!(
        "\nOne chunk in {ONE_IN} changes between saves (moving: others each time): to durable; beside hashing\n\
         everything and then plain writing of what the slot lacks\n"
    );
    let columns =
        ["state", "<changes", "engine ms", "hashing ms", "writing ms", "written", "ratio [95%]", "<medium"];
    let mut rows = Table::new(&columns);
    for m in results {
        let spread = |time: fn(&Round) -> Duration| Spread::of(m.rounds.iter().map(|round| ms(time(round))));
        let written = Spread::of(m.rounds.iter().map(|round| round.written_bytes as f64));
        rows.row(vec![
            units::size(m.setting.state_bytes),
            m.place.name().to_string(),
            spread(|round| round.durable).text(1),
            format!("{:.1}", spread(|round| round.hashing).median),
            format!("{:.1}", spread(|round| round.writing).median),
            units::size(written.median as u64),
            m.ratio().interval_text(),
            m.medium.to_string(),
        ]);
    }
    text += &rows.render();
    text
}

impl Measured {
    fn ratio(&self) -> Spread {
        Spread::of(self.rounds.iter().map(|round| ratio(round.durable, round.hashing + round.writing)))
    }

    pub fn json(&self) -> Value {
        let rounds: Vec<Value> = self
            .rounds
            .iter()
            .map(|round| {
                json!({
                    "durable_us": us(round.durable),
                    "hashing_us": us(round.hashing),
                    "writing_us": us(round.writing),
                    "written_bytes": round.written_bytes,
                })
            })
            .collect();
        json!({
            "state_bytes": self.setting.state_bytes,
            "chunk_bytes": self.setting.chunk_bytes,
            "medium": self.medium,
            "changes": self.place.name(),
            "ratio": self.ratio().json(),
            "rounds": rounds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_chunk_in_a_hundred_changes() {
        for place in Where::ALL {
            for number in 0..500 {
                let chunks = place.chunks(number, 1024);
                assert_eq!(chunks.len(), 10, "{place:?}");
                assert!(
                    chunks.windows(2).all(|two| two[0] < two[1]) && chunks[9] < 1024,
                    "{place:?}: {chunks:?}"
                );
            }
        }
        assert_ne!(Where::Moving.chunks(1, 1024), Where::Moving.chunks(2, 1024));
    }
}
