//! Formatting and opening a region, and the first save after opening beside the next ones.

use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Store};
use pccheck::store::FormatOptions;
use pccheck::Result;
use serde_json::{json, Value};

use super::figures::{ms, ratio, us, Spread};
use super::memory::HugeBlock;
use super::{open_options, Bed, Scratch, Setting, WAIT};
use crate::commands::medium_name;
use crate::table::Table;
use crate::units;

/// Saves after the first; their median is what it is compared with.
const LATER: usize = 3;

/// What happened from format to the saves after reopening.
pub struct Measured {
    setting: Setting,
    medium: &'static str,
    region_bytes: u64,
    format: Duration,
    format_prewritten: Duration,
    rounds: Vec<Round>,
}

struct Round {
    /// Opening a region with checkpoints, recovery included.
    open: Duration,
    /// Touching as much memory as the staging pool has.
    touch: Duration,
    first: Duration,
    later: Duration,
}

impl Round {
    fn beyond_touch(&self) -> Duration {
        self.open.saturating_sub(self.touch)
    }
}

pub fn run(bed: &mut Bed, setting: &Setting) -> Result<Measured> {
    let region = Scratch::new(&bed.dir, "region");
    let payload_bytes = crate::commands::format::payload_for_state(bed.state.bytes().len() as u64);
    let options = FormatOptions {
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, payload_bytes)
    };
    let began = Instant::now();
    format_region(&region.path, &options)?;
    let format = began.elapsed();
    let began = Instant::now();
    format_region(&region.path, &FormatOptions { prewrite: true, force: true, ..options })?;
    let format_prewritten = began.elapsed();
    let mut rounds = Vec::new();
    let mut step = 0;
    let mut medium = "";
    // The first life has no checkpoints to recover: it does not count.
    for life in 0..=bed.repeat {
        let began = Instant::now();
        drop(HugeBlock::new(setting.staging_bytes as usize)?);
        let touch = began.elapsed();
        let began = Instant::now();
        let store = Store::open(&region.path, &open_options(setting))?;
        let open = began.elapsed();
        let mut times = Vec::new();
        for _ in 0..=LATER {
            bed.state.change();
            step += 1;
            let shapes = bed.state.shapes();
            let tensors = bed.state.tensors(&shapes);
            let began = Instant::now();
            store.save(step, &tensors, &[], WAIT)?.wait_durable(WAIT)?;
            times.push(began.elapsed());
        }
        let first = times.remove(0);
        times.sort();
        if life > 0 {
            rounds.push(Round { open, touch, first, later: times[LATER / 2] });
            bed.bar.inc(1);
        }
        medium = medium_name(store.medium_info().kind);
    }
    let region_bytes = std::fs::metadata(&region.path).map_or(0, |metadata| metadata.len());
    Ok(Measured { setting: *setting, medium, region_bytes, format, format_prewritten, rounds })
}

pub fn table(results: &[Measured]) -> String {
    let mut text = String::from(
        "\nFormatting, opening with recovery (beyond: what touching the pool does not explain), and the first\n\
         save after opening over later ones\n",
    );
    let columns =
        ["region", "pool", "format", "prewritten", "open ms", "beyond ms", "first/later [95%]", "<medium"];
    let mut rows = Table::new(&columns);
    for m in results {
        let spread =
            |time: fn(&Round) -> Duration| Spread::of(m.rounds.iter().map(|round| ms(time(round)))).text(0);
        rows.row(vec![
            units::size(m.region_bytes),
            units::size(m.setting.staging_bytes),
            units::time(m.format),
            units::time(m.format_prewritten),
            spread(|round| round.open),
            spread(Round::beyond_touch),
            m.ratio().interval_text(),
            m.medium.to_string(),
        ]);
    }
    text += &rows.render();
    text
}

impl Measured {
    fn ratio(&self) -> Spread {
        Spread::of(self.rounds.iter().map(|round| ratio(round.first, round.later)))
    }

    pub fn json(&self) -> Value {
        let rounds: Vec<Value> = self
            .rounds
            .iter()
            .map(|round| {
                json!({
                    "open_us": us(round.open),
                    "touch_us": us(round.touch),
                    "first_us": us(round.first),
                    "later_us": us(round.later),
                })
            })
            .collect();
        json!({
            "state_bytes": self.setting.state_bytes,
            "region_bytes": self.region_bytes,
            "staging_bytes": self.setting.staging_bytes,
            "medium": self.medium,
            "format_us": us(self.format),
            "format_prewritten_us": us(self.format_prewritten),
            "first_over_later": self.ratio().json(),
            "rounds": rounds,
        })
    }
}
