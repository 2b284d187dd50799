//! What a checkpoint of a step must hold: a function of the step alone, so that the parent can check what a dead
//! child wrote.

use pccheck::engine::{Select, Store};
use pccheck::load::Checkpoint;

/// Largest payload of any step.
pub const PAYLOAD_BYTES: u64 = 1 << 20;

/// Every so many steps a raw stream is saved instead of tensors.
const RAW_EVERY: u64 = 5;

/// Most bytes of a tensor.
const TENSOR_BYTES: u64 = 90_000;

/// Name of the one tensor of a raw stream.
const RAW_NAME: &str = "raw";

/// Random numbers that depend on the seed alone.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// Whether a step is saved as a raw stream.
pub fn is_raw(step: u64) -> bool {
    step % RAW_EVERY == RAW_EVERY - 1
}

/// Names and bytes of the tensors of a step.
pub fn tensors_of(step: u64) -> Vec<(String, Vec<u8>)> {
    let mut random = Random(step.wrapping_mul(0xD6E8_FEB8_6659_FD93));
    if is_raw(step) {
        let len = random.below(3 * TENSOR_BYTES) as usize + 1;
        return vec![(RAW_NAME.to_string(), random.bytes(len))];
    }
    let count = 1 + random.below(4);
    (0..count)
        .map(|index| {
            let len = random.below(TENSOR_BYTES) as usize;
            (format!("layer.{index}"), random.bytes(len))
        })
        .collect()
}

/// Holds a checkpoint against what its step must have saved.
pub fn check(checkpoint: &Checkpoint) -> Result<(), String> {
    let step = checkpoint.record().step;
    let expected = tensors_of(step);
    if checkpoint.tensors().len() != expected.len() {
        return Err(format!("step {step} has {} tensors", checkpoint.tensors().len()));
    }
    if checkpoint.metadata().get("step") != Some(&step.to_string()) {
        return Err(format!("step {step} has the metadata {:?}", checkpoint.metadata()));
    }
    for (name, bytes) in expected {
        let found = checkpoint.read_tensor(&name).map_err(|error| format!("step {step}: {error}"))?;
        if found != bytes {
            return Err(format!("tensor {name:?} of step {step} came back changed"));
        }
    }
    Ok(())
}

/// Holds every listed checkpoint against what its step must have saved. Generation and step, newest first.
pub fn check_all(store: &Store) -> Result<Vec<(u64, u64)>, String> {
    let listed = store.checkpoints().map_err(|error| format!("list: {error}"))?;
    let mut found = Vec::with_capacity(listed.len());
    for info in &listed {
        let (generation, step) = (info.record.generation, info.record.step);
        let about = |what: String| format!("generation {generation}: {what}");
        let opened = store.open_checkpoint(Select::Generation(generation), true);
        check(&opened.map_err(|error| about(error.to_string()))?.checkpoint).map_err(about)?;
        found.push((generation, step));
    }
    Ok(found)
}
