//! The README's Rust program, between the two marks; a test compares the lines.

use std::path::Path;

use pccheck::engine::{Select, Store, Tensor};
use pccheck::format::Dtype;
use pccheck::load::Checkpoint;
use pccheck::store::OpenOptions;

fn train(weights: &mut [u8], step: &mut u64) {
    *step += 1;
    for (i, weight) in weights.chunks_exact_mut(4).enumerate() {
        let value = f32::from_le_bytes(weight.try_into().expect("four bytes"));
        weight.copy_from_slice(&(value + (*step % 7) as f32 + i as f32).to_le_bytes());
    }
}

/// What the program ends with, in the words of those in the other languages.
pub fn run() -> pccheck::Result<String> {
    let mut weights = vec![0; 4000];
    let mut step = 0;
    // README
    let store = Store::open(Path::new("run.pcc"), &OpenOptions::default())?;
    if !store.checkpoints()?.is_empty() {
        let newest = |found: &Checkpoint| found.read_tensors(&mut [("weights", &mut weights)]);
        step = store.restore(Select::Newest, newest)?.checkpoint.record().step;
    }
    while step < 100 {
        train(&mut weights, &mut step);
        let state = [Tensor { name: "weights", dtype: Dtype::F32, shape: &[1000], data: &weights }];
        store.save(step, &state, &[], None)?; // copied: the state may change again
    }
    store.drain(None)?;
    // README
    let values = weights.chunks_exact(4).map(|w| f32::from_le_bytes(w.try_into().expect("four bytes")));
    Ok(format!("step {step}, sum {:.0}", values.map(f64::from).sum::<f64>()))
}
