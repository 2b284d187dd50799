//! One tensor out of a large checkpoint: how many bytes are read for it, and how long that takes.

use std::fs;
use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Select, Store};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};
use serde_json::{json, Value};

use super::figures::{ms, us, Spread};
use super::{open_options, Bed, Scratch, Setting, WAIT};
use crate::commands::medium_name;
use crate::table::Table;
use crate::units;

/// A tensor that was read, repeatedly.
pub struct Measured {
    setting: Setting,
    medium: &'static str,
    tensor_bytes: u64,
    /// Bytes that came from the device for it; none where the kernel does not say.
    read_bytes: Option<u64>,
    rounds: Vec<Duration>,
}

pub fn run(bed: &mut Bed, setting: &Setting) -> Result<Vec<Measured>> {
    let region = Scratch::new(&bed.dir, "region");
    let payload_bytes = crate::commands::format::payload_for_state(bed.state.bytes().len() as u64);
    let options = FormatOptions {
        medium: setting.medium.into(),
        ..FormatOptions::new(setting.in_flight + 1, payload_bytes)
    };
    format_region(&region.path, &options)?;
    let shapes = bed.state.shapes();
    let tensors = bed.state.tensors(&shapes);
    Store::open(&region.path, &open_options(setting))?.save(1, &tensors, &[], WAIT)?.wait_durable(WAIT)?;
    let store = Store::open(&region.path, &OpenOptions { read_only: true, ..open_options(setting) })?;
    let mut results = Vec::new();
    // A large one and a small one, from the middle.
    for tensor in &tensors[tensors.len() / 2..][..2] {
        let mut rounds = Vec::new();
        let mut read_bytes = None;
        for _ in 0..bed.repeat {
            let into = &mut bed.copy[..tensor.data.len()];
            into.fill(0);
            let before = bytes_read();
            let began = Instant::now();
            let opened = store.open_checkpoint(Select::Newest, false)?;
            opened.checkpoint.read_tensors(&mut [(tensor.name, &mut *into)])?;
            rounds.push(began.elapsed());
            read_bytes = before.zip(bytes_read()).map(|(before, after)| after - before);
            if *into != *tensor.data {
                return Err(Error::new(ErrorKind::Internal, "bench", "what was read is not what was saved"));
            }
            bed.bar.inc(1);
        }
        results.push(Measured {
            setting: *setting,
            medium: medium_name(store.medium_info().kind),
            tensor_bytes: tensor.data.len() as u64,
            read_bytes,
            rounds,
        });
    }
    Ok(results)
}

/// Bytes that this process has had read from devices.
fn bytes_read() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("read_bytes: "))?.trim().parse().ok()
}

pub fn table(results: &[Measured]) -> String {
    let mut text = String::from("\nOne tensor of a checkpoint, found, read and verified\n");
    let mut rows = Table::new(&["checkpoint", "tensor", "read from the device", "ms", "<medium"]);
    for m in results {
        rows.row(vec![
            units::size(m.setting.state_bytes),
            units::size(m.tensor_bytes),
            m.read_bytes.map_or("unknown".to_string(), units::size),
            Spread::of(m.rounds.iter().map(|&time| ms(time))).text(1),
            m.medium.to_string(),
        ]);
    }
    text += &rows.render();
    text
}

impl Measured {
    pub fn json(&self) -> Value {
        json!({
            "state_bytes": self.setting.state_bytes,
            "tensor_bytes": self.tensor_bytes,
            "read_bytes": self.read_bytes,
            "medium": self.medium,
            "rounds_us": self.rounds.iter().map(|&time| us(time)).collect::<Vec<_>>(),
        })
    }
}
