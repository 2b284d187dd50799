//! The smallest save: what the protocol costs beside its flushes and writes, done by hand.

use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Store, Tensor};
use pccheck::format::Dtype;
use pccheck::store::FormatOptions;
use pccheck::Result;
use serde_json::{json, Value};

use super::ceiling::ByHand;
use super::figures::{ratio, us, Spread};
use super::{open_options, Bed, Scratch, Setting, WAIT};
use crate::commands::medium_name;
use crate::table::Table;

/// Bytes of the state.
const STATE_BYTES: usize = 4096;
/// Saves in each repetition; their median counts.
const SAVES: u32 = 20;

/// From begin to durable, beside the same by hand.
pub struct Measured {
    setting: Setting,
    medium: &'static str,
    /// Per repetition: the engine's, and by hand.
    rounds: Vec<(Duration, Duration)>,
}

pub fn run(bed: &mut Bed, setting: &Setting) -> Result<Measured> {
    let region = Scratch::new(&bed.dir, "region");
    let by_hand = Scratch::new(&bed.dir, "by-hand");
    let options = FormatOptions {
        prewrite: true,
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, 1 << 20)
    };
    format_region(&region.path, &options)?;
    let store = Store::open(&region.path, &open_options(setting))?;
    let mut by_hand = ByHand::new(&by_hand.path)?;
    let mut state = vec![0u8; STATE_BYTES];
    let mut step = 0u64;
    let mut save = || -> Result<Duration> {
        step += 1;
        state[..8].copy_from_slice(&step.to_le_bytes());
        let shape = [STATE_BYTES as u64];
        let tensor = Tensor { name: "state", dtype: Dtype::U8, shape: &shape, data: &state };
        let began = Instant::now();
        store.save(step, &[tensor], &[], WAIT)?.wait_durable(WAIT)?;
        Ok(began.elapsed())
    };
    // Both slots are taken for the first time.
    for _ in 0..=setting.in_flight {
        save()?;
        by_hand.save()?;
    }
    let mut rounds = Vec::new();
    for _ in 0..bed.repeat {
        let (mut engine, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..SAVES {
            engine.push(save()?);
            plain.push(by_hand.save()?);
        }
        rounds.push((median(engine), median(plain)));
        bed.bar.inc(1);
    }
    Ok(Measured { setting: *setting, medium: medium_name(store.medium_info().kind), rounds })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

pub fn table(results: &[Measured]) -> String {
    let mut text = format!(
        "\nA state of {STATE_BYTES} bytes, from begin to durable; beside mark, payload, flush and commit by hand\n"
    );
    let mut rows = Table::new(&["N", "engine us", "by hand us", "ratio [95%]", "<medium"]);
    for m in results {
        let micros = |times: Duration| times.as_secs_f64() * 1e6;
        rows.row(vec![
            m.setting.in_flight.to_string(),
            Spread::of(m.rounds.iter().map(|round| micros(round.0))).text(0),
            Spread::of(m.rounds.iter().map(|round| micros(round.1))).text(0),
            m.ratio().interval_text(),
            m.medium.to_string(),
        ]);
    }
    text += &rows.render();
    text
}

impl Measured {
    fn ratio(&self) -> Spread {
        Spread::of(self.rounds.iter().map(|&(engine, plain)| ratio(engine, plain)))
    }

    pub fn json(&self) -> Value {
        let rounds: Vec<Value> = self
            .rounds
            .iter()
            .map(|&(engine, plain)| json!({ "engine_us": us(engine), "by_hand_us": us(plain) }))
            .collect();
        json!({
            "state_bytes": STATE_BYTES,
            "in_flight": self.setting.in_flight,
            "medium": self.medium,
            "ratio": self.ratio().json(),
            "rounds": rounds,
        })
    }
}
