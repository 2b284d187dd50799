//! The network and everything else that training carries from one iteration to the next.
//!
//! A perceptron of 64 - H - H - 10 units with Adam. [`Network`] is the *whole* state: weights, Adam's two running
//! averages, the step, the random number generator and the order of the samples. Restore it, and training goes on
//! bit for bit as if nothing had happened. What is computed anew in each iteration lives in
//! [`Gradients`](super::training::Gradients) and is no state.

use pccheck::{Error, ErrorKind, Result};
use twox_hash::XxHash3_128;

use super::data::{CLASSES, PIXELS};

/// Hidden widths are multiples of this.
pub const WIDTH_STEP: usize = 16;
/// Widest hidden layer that is built: 52 GB of state.
pub const WIDTH_MAX: usize = 1 << 16;

const LAYERS: usize = 3;
const STEP: usize = 0;
const RANDOM: usize = 1;
const POSITION: usize = 2;
const COUNTERS: usize = 3;

/// Values that are trained, with Adam's averages of their gradients and of the squares.
pub(super) struct Parameter {
    pub(super) values: Vec<f32>,
    pub(super) means: Vec<f32>,
    pub(super) squares: Vec<f32>,
}

impl Parameter {
    fn zeros(count: usize) -> Result<Self> {
        Ok(Parameter { values: zeros(count)?, means: zeros(count)?, squares: zeros(count)? })
    }
}

/// One dense layer; weights are `[outputs][inputs]`.
pub(super) struct Layer {
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    pub(super) weight: Parameter,
    pub(super) bias: Parameter,
}

/// The whole state of training.
pub struct Network {
    width: usize,
    pub(super) layers: [Layer; LAYERS],
    counters: [u64; COUNTERS],
    /// The samples of this pass over the training data, in the order of their use.
    pub(super) order: Vec<u64>,
}

/// The values of one tensor of the state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values<'a> {
    /// 32-bit floating point.
    F32(&'a [f32]),
    /// Unsigned 64-bit integers.
    U64(&'a [u64]),
}

/// One tensor of the state, to be saved.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    /// Unique name, such as `fc1.weight` or `fc1.weight.exp_avg`.
    pub name: String,
    /// Extent of each dimension, slowest first.
    pub shape: Vec<u64>,
    /// The values, contiguous and in the machine's byte order.
    pub values: Values<'a>,
}

impl Tensor<'_> {
    /// Address of the first value; stays the same as long as the network lives.
    pub fn pointer(&self) -> *const u8 {
        match self.values {
            Values::F32(values) => values.as_ptr().cast(),
            Values::U64(values) => values.as_ptr().cast(),
        }
    }

    /// Size of the values in bytes.
    pub fn bytes(&self) -> usize {
        match self.values {
            Values::F32(values) => size_of_val(values),
            Values::U64(values) => size_of_val(values),
        }
    }
}

/// The values of one tensor of the state, to be overwritten.
#[derive(Debug, PartialEq)]
pub enum ValuesMut<'a> {
    /// 32-bit floating point.
    F32(&'a mut [f32]),
    /// Unsigned 64-bit integers.
    U64(&'a mut [u64]),
}

/// One tensor of the state, to be restored.
#[derive(Debug, PartialEq)]
pub struct TensorMut<'a> {
    /// As in [`Tensor`].
    pub name: String,
    /// As in [`Tensor`].
    pub shape: Vec<u64>,
    /// Where the values go, in the machine's byte order.
    pub values: ValuesMut<'a>,
}

impl TensorMut<'_> {
    /// Address of the first value.
    pub fn pointer(&mut self) -> *mut u8 {
        match &mut self.values {
            ValuesMut::F32(values) => values.as_mut_ptr().cast(),
            ValuesMut::U64(values) => values.as_mut_ptr().cast(),
        }
    }

    /// Size of the values in bytes.
    pub fn bytes(&self) -> usize {
        match &self.values {
            ValuesMut::F32(values) => size_of_val(*values),
            ValuesMut::U64(values) => size_of_val(*values),
        }
    }
}

/// Lists a network's tensors; one body for the shared and the exclusive view.
macro_rules! list_tensors {
    ($network:expr, $tensor:ident, $values:ident, $iter:ident, [$($reference:tt)+]) => {{
        let mut tensors = Vec::new();
        for (index, layer) in $network.layers.$iter().enumerate() {
            let (outputs, inputs) = (layer.outputs as u64, layer.inputs as u64);
            for (part, shape, parameter) in [
                ("weight", vec![outputs, inputs], $($reference)+ layer.weight),
                ("bias", vec![outputs], $($reference)+ layer.bias),
            ] {
                let name = format!("fc{}.{part}", index + 1);
                for (name, values) in [
                    (format!("{name}.exp_avg"), $($reference)+ parameter.means),
                    (format!("{name}.exp_avg_sq"), $($reference)+ parameter.squares),
                    (name, $($reference)+ parameter.values),
                ] {
                    tensors.push($tensor { name, shape: shape.clone(), values: $values::F32(values) });
                }
            }
        }
        let counters = $($reference)+ $network.counters[..];
        for (name, values) in [("trainer.counters", counters), ("trainer.order", $($reference)+ $network.order)] {
            let shape = vec![values.len() as u64];
            tensors.push($tensor { name: name.to_string(), shape, values: $values::U64(values) });
        }
        tensors
    }};
}

impl Network {
    /// The width whose state comes closest to `bytes`, within [`WIDTH_STEP`] and [`WIDTH_MAX`].
    pub fn width_for_state_bytes(bytes: u64) -> usize {
        // 4 bytes times 3 times (H^2 + 76 H + 10) parameters, solved for H; the sample order is negligible.
        let linear = (PIXELS + 2 + CLASSES) as f64;
        let width = ((bytes as f64 / 12.0 + linear * linear / 4.0).sqrt() - linear / 2.0).max(0.0);
        ((width / WIDTH_STEP as f64).round() as usize * WIDTH_STEP).clamp(WIDTH_STEP, WIDTH_MAX)
    }

    /// A new network with hidden layers of `width` units, a multiple of [`WIDTH_STEP`] up to [`WIDTH_MAX`], to be
    /// trained on `samples` samples. The same `seed` always gives the same network and the same training.
    ///
    /// Errors with [`ErrorKind::OutOfMemory`].
    pub fn new(width: usize, samples: usize, seed: u64) -> Result<Network> {
        let mut network = Network::blank(width, samples)?;
        let mut random = Random(seed);
        for layer in &mut network.layers {
            // Uniform with the variance of He et al., 2015: activations keep their size from layer to layer.
            let bound = (6.0 / layer.inputs as f32).sqrt();
            layer.weight.values.fill_with(|| bound * random.signed_unit());
            // Touched here, so that the first update takes no longer than the others.
            layer.weight.means.fill(0.0);
            layer.weight.squares.fill(0.0);
        }
        network.start_pass(&mut random);
        network.counters[RANDOM] = random.0;
        Ok(network)
    }

    /// A network of zeros, which a checkpoint is to be read into; then call [`Network::check`].
    pub fn blank(width: usize, samples: usize) -> Result<Network> {
        if !(WIDTH_STEP..=WIDTH_MAX).contains(&width) || !width.is_multiple_of(WIDTH_STEP) {
            let message =
                format!("expected a width in multiples of {WIDTH_STEP} up to {WIDTH_MAX}, found {width}");
            return Err(Error::new(ErrorKind::InvalidArgument, "make network", message));
        }
        let layer = |inputs: usize, outputs: usize| -> Result<Layer> {
            let weight = Parameter::zeros(inputs * outputs)?;
            Ok(Layer { inputs, outputs, weight, bias: Parameter::zeros(outputs)? })
        };
        let layers = [layer(PIXELS, width)?, layer(width, width)?, layer(width, CLASSES)?];
        Ok(Network { width, layers, counters: [0; COUNTERS], order: vec![0; samples] })
    }

    /// Units in each hidden layer.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Iterations trained so far.
    pub fn step(&self) -> u64 {
        self.counters[STEP]
    }

    /// All tensors of the state, for saving. They stay unchanged, and in their places, until
    /// [`Network::update`] or [`Network::tensors_mut`].
    pub fn tensors(&self) -> Vec<Tensor<'_>> {
        list_tensors!(self, Tensor, Values, iter, [&])
    }

    /// All tensors of the state, for restoring, in the order of [`Network::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<TensorMut<'_>> {
        list_tensors!(self, TensorMut, ValuesMut, iter_mut, [&mut])
    }

    /// Whether restored tensors can be trained on: the sample order must be an order, and hold the position.
    pub fn check(&self) -> Result<()> {
        let corrupt = |message: String| Err(Error::new(ErrorKind::Corrupt, "restore network", message));
        let mut seen = vec![false; self.order.len()];
        for &sample in &self.order {
            match usize::try_from(sample).ok().and_then(|sample| seen.get_mut(sample)) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return corrupt(format!(
                        "expected trainer.order to name each of {} samples once, found a surplus {sample}",
                        self.order.len()
                    ))
                }
            }
        }
        if self.counters[POSITION] >= self.order.len() as u64 {
            return corrupt(format!(
                "expected a position below {} in trainer.counters, found {}",
                self.order.len(),
                self.counters[POSITION]
            ));
        }
        Ok(())
    }

    /// XXH3-128 over the names, shapes and bytes of all tensors: equal digests mean bit-identical states.
    pub fn digest(&self) -> u128 {
        let mut hasher = XxHash3_128::new();
        let mut buffer = Vec::with_capacity(DIGEST_BLOCK * size_of::<u64>());
        for tensor in self.tensors() {
            hasher.write(format!("{} {:?}\n", tensor.name, tensor.shape).as_bytes());
            match tensor.values {
                Values::F32(values) => values.chunks(DIGEST_BLOCK).for_each(|block| {
                    buffer.clear();
                    buffer.extend(block.iter().flat_map(|value| value.to_le_bytes()));
                    hasher.write(&buffer);
                }),
                Values::U64(values) => values.iter().for_each(|value| hasher.write(&value.to_le_bytes())),
            }
        }
        hasher.finish_128()
    }

    /// The generator as it was after the last update.
    pub(super) fn random(&self) -> Random {
        Random(self.counters[RANDOM])
    }

    /// Which sample the next batch takes at place `place`. A batch goes round at the end of the order.
    pub(super) fn sample_at(&self, place: usize) -> usize {
        let position = (self.counters[POSITION] as usize + place) % self.order.len();
        self.order[position] as usize
    }

    /// Notes that a batch of `samples` was learnt, with `random` as the generator was left; starts a new pass
    /// when the samples are used up.
    pub(super) fn advance(&mut self, samples: usize, mut random: Random) {
        self.counters[STEP] += 1;
        self.counters[POSITION] += samples as u64;
        if self.counters[POSITION] >= self.order.len() as u64 {
            self.start_pass(&mut random);
        }
        self.counters[RANDOM] = random.0;
    }

    /// Shuffles the samples (Fisher and Yates) and goes to the first.
    fn start_pass(&mut self, random: &mut Random) {
        self.order.iter_mut().zip(0..).for_each(|(sample, index)| *sample = index);
        for last in (1..self.order.len()).rev() {
            self.order.swap(last, random.below(last as u64 + 1) as usize);
        }
        self.counters[POSITION] = 0;
    }
}

/// Values that are turned into bytes at a time for the digest.
const DIGEST_BLOCK: usize = 1 << 14;

/// Zeros on the heap, or an error that says how many bytes were wanted. Fresh pages are not touched yet.
pub(super) fn zeros(count: usize) -> Result<Vec<f32>> {
    // Asked first, because `vec!` would abort; and `vec!` in the end, because it leaves zeroing to the kernel: a
    // restore then touches each page once, and from several threads.
    Vec::<f32>::new().try_reserve_exact(count).map_err(|_| {
        let message = format!("expected {} bytes of memory, found too little", count.saturating_mul(4));
        Error::new(ErrorKind::OutOfMemory, "make network", message).advise("ask for a smaller state")
    })?;
    Ok(vec![0.0; count])
}

/// Pseudo-random numbers by SplitMix64 (Steele, Lea and Flood, 2014). Its state is this one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform from 0 to `bound`, exclusive; the bias is below `bound` / 2^64.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// Uniform from -1, inclusive, to 1, exclusive.
    pub(super) fn signed_unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLES: usize = 100;

    #[test]
    fn state_size_is_about_what_was_asked_for() {
        for bytes in [10_000_000u64, 64 << 20, 1 << 30, 4 << 30, 40 << 30] {
            let width = Network::width_for_state_bytes(bytes);
            let state_bytes = 12 * (width * width + 76 * width + 10);
            let ratio = state_bytes as f64 / bytes as f64;
            assert!((0.98..1.02).contains(&ratio), "{bytes}: width {width} has {state_bytes} bytes");
        }
        assert_eq!(Network::width_for_state_bytes(0), WIDTH_STEP);
        assert_eq!(Network::width_for_state_bytes(u64::MAX), WIDTH_MAX);
        let network = Network::new(Network::width_for_state_bytes(1_000_000), SAMPLES, 1).unwrap();
        let width = network.width();
        let expected = 12 * (width * width + 76 * width + 10) + 8 * (SAMPLES + COUNTERS);
        let state_bytes: usize = network.tensors().iter().map(|tensor| tensor.bytes()).sum();
        assert_eq!(state_bytes, expected);
        assert_eq!(Network::new(17, SAMPLES, 1).err().unwrap().kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn tensors_have_unique_names_and_whole_shapes_and_both_views_agree() {
        let mut network = Network::new(32, SAMPLES, 1).unwrap();
        let mut views = Vec::new();
        for tensor in network.tensors() {
            let item_bytes = if matches!(tensor.values, Values::F32(_)) { 4 } else { 8 };
            assert_eq!(tensor.shape.iter().product::<u64>() * item_bytes, tensor.bytes() as u64);
            views.push((tensor.name.clone(), tensor.shape.clone(), tensor.bytes(), tensor.pointer()));
        }
        let names: std::collections::BTreeSet<_> = views.iter().map(|view| view.0.clone()).collect();
        assert_eq!((names.len(), views.len()), (20, 20));
        for (mut tensor, view) in network.tensors_mut().into_iter().zip(views) {
            let pointer = tensor.pointer().cast_const();
            assert_eq!((tensor.name.clone(), tensor.shape.clone(), tensor.bytes(), pointer), view);
        }
    }

    #[test]
    fn digest_sees_every_tensor() {
        let mut network = Network::new(16, SAMPLES, 1).unwrap();
        assert_eq!(network.digest(), Network::new(16, SAMPLES, 1).unwrap().digest());
        assert_ne!(network.digest(), Network::new(16, SAMPLES, 2).unwrap().digest());
        let count = network.tensors().len();
        let mut digests = std::collections::BTreeSet::from([network.digest()]);
        for index in 0..count {
            match &mut network.tensors_mut()[index].values {
                ValuesMut::F32(values) => values[values.len() - 1] += 1.0,
                ValuesMut::U64(values) => values[values.len() - 1] += 1,
            }
            assert!(digests.insert(network.digest()), "tensor {index} does not count");
        }
    }

    #[test]
    fn restored_nonsense_is_an_error() {
        let mut network = Network::new(16, SAMPLES, 1).unwrap();
        network.check().unwrap();
        network.counters[POSITION] = SAMPLES as u64;
        assert!(network.check().unwrap_err().message().contains("position below 100"));
        network.counters[POSITION] = 0;
        let first = network.order[0];
        network.order[0] = network.order[1];
        assert!(network.check().unwrap_err().message().contains("surplus"));
        network.order[0] = u64::MAX;
        assert!(network.check().unwrap_err().message().contains("surplus"));
        network.order[0] = first;
        network.check().unwrap();
        assert_eq!(Network::blank(16, SAMPLES).unwrap().check().unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
