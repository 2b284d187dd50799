//! One iteration of training, in its two halves: compute gradients, then update.
//!
//! The first half only reads the [`Network`], and the borrow checker knows it: a checkpoint may copy the state
//! meanwhile. The second half changes every tensor, so the copy must be finished before.

use pccheck::Result;

use super::data::{Samples, CLASSES, PIXELS};
use super::kernels::{self, AdamStep};
use super::network::{zeros, Network, Random};

/// Learning rate up to [`RATE_WIDTH`]; beyond, it falls as the width grows, because an output sums over more weights,
/// all of which move.
const LEARNING_RATE: f32 = 1e-3;
const RATE_WIDTH: usize = 512;
/// Batch up to [`BATCH_WIDTH`]; beyond, it falls as the width grows, so that an iteration stays short.
const BATCH_SAMPLES_MAX: usize = 32;
const BATCH_SAMPLES_MIN: usize = 8;
const BATCH_WIDTH: usize = 1024;
/// Noise added to each pixel of a training sample, at most, so that no two passes show the same picture.
const NOISE_MAX: f32 = 0.1;
/// Samples of one forward pass when testing.
const TEST_BATCH_SAMPLES: usize = 32;

/// What one iteration computes: gradients, and the activations on the way to them.
///
/// Nothing in here is state: a new one does as well.
pub struct Gradients {
    samples: usize,
    threads: usize,
    activations: Activations,
    /// Per layer the gradients of weights and biases.
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    hidden_gradients: [Vec<f32>; 2],
    /// The generator as the batch left it; becomes state at the update.
    random: Random,
}

/// The values of all units for one batch.
struct Activations {
    pixels: Vec<f32>,
    hidden: [Vec<f32>; 2],
    logits: Vec<f32>,
    scratch: Vec<f32>,
}

impl Activations {
    fn new(width: usize, samples: usize) -> Result<Self> {
        let hidden = || zeros(samples * width);
        Ok(Activations {
            pixels: zeros(samples * PIXELS)?,
            hidden: [hidden()?, hidden()?],
            logits: zeros(samples * CLASSES)?,
            scratch: hidden()?,
        })
    }

    /// Computes hidden units and logits of the first `samples` samples in `pixels`.
    fn forward(&mut self, network: &Network, samples: usize, threads: usize) {
        let mut input = &self.pixels[..samples * PIXELS];
        let [hidden1, hidden2] = &mut self.hidden;
        let outputs = [hidden1, hidden2, &mut self.logits];
        for (index, (layer, output)) in network.layers.iter().zip(outputs).enumerate() {
            let output = &mut output[..samples * layer.outputs];
            let (weight, bias) = (&layer.weight.values, &layer.bias.values);
            kernels::forward(output, &mut self.scratch, weight, bias, input, layer.inputs, threads);
            if index + 1 < network.layers.len() {
                kernels::relu(output);
            }
            input = output;
        }
    }
}

impl Gradients {
    /// Room for the gradients of `network`: a third of its state, and the activations of one batch.
    pub fn new(network: &Network) -> Result<Self> {
        let width = network.width();
        let samples = (BATCH_SAMPLES_MAX * BATCH_WIDTH / width).clamp(BATCH_SAMPLES_MIN, BATCH_SAMPLES_MAX);
        // The kernels take samples by fours.
        let samples = samples.next_multiple_of(4);
        let mut layers = Vec::new();
        for layer in &network.layers {
            layers.push((zeros(layer.weight.values.len())?, zeros(layer.outputs)?));
        }
        Ok(Gradients {
            samples,
            threads: available_threads(),
            activations: Activations::new(width, samples)?,
            layers,
            hidden_gradients: [zeros(samples * width)?, zeros(samples * width)?],
            random: Random::default(),
        })
    }
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get())
}

impl Network {
    /// First half of an iteration: the gradients of the next batch. Reads the state and changes nothing in it.
    ///
    /// Returns the mean cross-entropy of the batch in nats. `train` has as many samples as the network was made for.
    pub fn forward_backward(&self, gradients: &mut Gradients, train: &Samples) -> f32 {
        let (samples, threads) = (gradients.samples, gradients.threads);
        let mut random = self.random();
        for (place, pixels) in gradients.activations.pixels.chunks_exact_mut(PIXELS).enumerate() {
            for (noisy, pixel) in pixels.iter_mut().zip(train.pixels(self.sample_at(place))) {
                *noisy = pixel + NOISE_MAX * random.signed_unit();
            }
        }
        gradients.random = random;
        gradients.activations.forward(self, samples, threads);

        let Activations { pixels, hidden: [hidden1, hidden2], logits, .. } = &mut gradients.activations;
        let mut loss = 0.0;
        for (place, logits) in logits.chunks_exact_mut(CLASSES).enumerate() {
            loss += kernels::softmax_cross_entropy(logits, train.label(self.sample_at(place)), samples);
        }
        let [gradient1, gradient2] = &mut gradients.hidden_gradients;
        let [(weight1, bias1), (weight2, bias2), (weight3, bias3)] = &mut gradients.layers[..] else {
            unreachable!("a network has three layers");
        };
        let width = self.width();
        kernels::weight_gradient(weight3, bias3, logits, hidden2, width, threads);
        kernels::input_gradient(gradient2, logits, &self.layers[2].weight.values, width, threads);
        kernels::relu_gradient(gradient2, hidden2);
        kernels::weight_gradient(weight2, bias2, gradient2, hidden1, width, threads);
        kernels::input_gradient(gradient1, gradient2, &self.layers[1].weight.values, width, threads);
        kernels::relu_gradient(gradient1, hidden1);
        kernels::weight_gradient(weight1, bias1, gradient1, pixels, PIXELS, threads);
        loss / samples as f32
    }

    /// Second half of an iteration: one Adam step with the gradients that [`Network::forward_backward`] left, and
    /// on to the next batch. Changes every tensor of the state.
    pub fn update(&mut self, gradients: &Gradients) {
        let rate = LEARNING_RATE * (RATE_WIDTH as f32 / self.width() as f32).min(1.0);
        let adam = AdamStep::new(self.step() + 1, rate);
        for (layer, (weight, bias)) in self.layers.iter_mut().zip(&gradients.layers) {
            for (parameter, gradient) in [(&mut layer.weight, weight), (&mut layer.bias, bias)] {
                let (means, squares) = (&mut parameter.means, &mut parameter.squares);
                adam.apply(&mut parameter.values, means, squares, gradient, gradients.threads);
            }
        }
        self.advance(gradients.samples, gradients.random);
    }

    /// Share of the first `samples_max` samples in `test` that the network classifies rightly.
    ///
    /// Costs two multiply-adds per weight and sample: limit the samples of networks of gigabytes.
    pub fn test_accuracy(&self, test: &Samples, samples_max: usize) -> Result<f64> {
        let count = test.len().min(samples_max);
        let mut activations = Activations::new(self.width(), TEST_BATCH_SAMPLES)?;
        let mut right = 0;
        for start in (0..count).step_by(TEST_BATCH_SAMPLES) {
            let samples = TEST_BATCH_SAMPLES.min(count - start);
            for (place, pixels) in activations.pixels.chunks_exact_mut(PIXELS).take(samples).enumerate() {
                pixels.copy_from_slice(test.pixels(start + place));
            }
            activations.forward(self, samples, available_threads());
            for (place, logits) in activations.logits.chunks_exact(CLASSES).take(samples).enumerate() {
                let best = (0..CLASSES).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                right += usize::from(best == Some(test.label(start + place)));
            }
        }
        Ok(right as f64 / count as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::Dataset;
    use super::super::network::{Values, ValuesMut};
    use super::*;

    fn train(network: &mut Network, dataset: &Dataset, iterations: usize, threads: usize) -> Vec<f32> {
        let mut gradients = Gradients::new(network).unwrap();
        gradients.threads = threads;
        let mut losses = Vec::new();
        for _ in 0..iterations {
            losses.push(network.forward_backward(&mut gradients, &dataset.train));
            network.update(&gradients);
        }
        losses
    }

    fn f32_tensor(network: &Network, index: usize) -> (String, Vec<f32>) {
        let tensor = network.tensors().swap_remove(index);
        match tensor.values {
            Values::F32(values) => (tensor.name, values.to_vec()),
            Values::U64(_) => panic!("{} is not f32", tensor.name),
        }
    }

    fn set(network: &mut Network, index: usize, at: usize, value: f32) {
        match &mut network.tensors_mut()[index].values {
            ValuesMut::F32(values) => values[at] = value,
            ValuesMut::U64(_) => panic!("tensor {index} is not f32"),
        }
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let dataset = Dataset::embedded().unwrap();
        let mut network = Network::new(32, dataset.train.len(), 5).unwrap();
        train(&mut network, &dataset, 10, 1);
        let mut gradients = Gradients::new(&network).unwrap();
        network.forward_backward(&mut gradients, &dataset.train);
        let analytic: Vec<Vec<f32>> =
            gradients.layers.iter().flat_map(|(weight, bias)| [weight.clone(), bias.clone()]).collect();
        for (parameter, analytic) in analytic.iter().enumerate() {
            // Per parameter the state has three tensors, the values last.
            let index = parameter * 3 + 2;
            let (name, values) = f32_tensor(&network, index);
            let mut largest: Vec<usize> = (0..analytic.len()).collect();
            largest.sort_by(|&a, &b| analytic[b].abs().total_cmp(&analytic[a].abs()));
            for &at in largest.iter().take(8) {
                // Small, lest many units pass the kink of the ReLU; large, lest rounding of the loss count.
                let nudge = 1e-3;
                let mut loss_at = |value: f32| {
                    set(&mut network, index, at, value);
                    f64::from(network.forward_backward(&mut gradients, &dataset.train))
                };
                let slope =
                    (loss_at(values[at] + nudge) - loss_at(values[at] - nudge)) / (2.0 * f64::from(nudge));
                set(&mut network, index, at, values[at]);
                let (found, error) = (f64::from(analytic[at]), (f64::from(analytic[at]) - slope).abs());
                assert!(
                    error < 0.02 * slope.abs() + 3e-4,
                    "{name}[{at}]: gradient {found}, loss slopes by {slope}"
                );
            }
        }
    }

    #[test]
    fn the_network_learns_to_read_digits() {
        let dataset = Dataset::embedded().unwrap();
        let mut network = Network::new(64, dataset.train.len(), 1).unwrap();
        let before = network.test_accuracy(&dataset.test, usize::MAX).unwrap();
        let losses = train(&mut network, &dataset, 300, 2);
        let after = network.test_accuracy(&dataset.test, usize::MAX).unwrap();
        let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
        assert!(before < 0.3 && after > 0.9, "accuracy went from {before} to {after}");
        let (first, last) = (mean(&losses[..10]), mean(&losses[290..]));
        assert!((1.5..3.5).contains(&first) && last < 0.4, "loss went from {first} to {last}");
        assert!(network.test_accuracy(&dataset.test, 50).unwrap() > 0.8);
    }

    #[test]
    fn runs_agree_bit_for_bit_whatever_the_threads() {
        let dataset = Dataset::embedded().unwrap();
        let run = |seed, threads| {
            let mut network = Network::new(192, dataset.train.len(), seed).unwrap();
            let losses: Vec<u32> =
                train(&mut network, &dataset, 12, threads).into_iter().map(f32::to_bits).collect();
            (network.digest(), losses)
        };
        let first = run(3, 1);
        assert_eq!(first, run(3, 1));
        assert_eq!(first, run(3, 2));
        assert_eq!(first, run(3, 5));
        assert_ne!(first.0, run(4, 1).0);
    }

    /// The state as a checkpoint would hold it.
    fn saved(network: &Network) -> Vec<(Vec<f32>, Vec<u64>)> {
        let copy = |tensor: super::super::network::Tensor| match tensor.values {
            Values::F32(values) => (values.to_vec(), vec![]),
            Values::U64(values) => (vec![], values.to_vec()),
        };
        network.tensors().into_iter().map(copy).collect()
    }

    #[test]
    fn a_restored_network_goes_on_as_if_nothing_had_happened() {
        let dataset = Dataset::embedded().unwrap();
        let samples = dataset.train.len();
        let mut network = Network::new(48, samples, 9).unwrap();
        // 60 more iterations reach beyond the end of a pass, so that the samples are shuffled again.
        train(&mut network, &dataset, 20, 1);
        let state = saved(&network);
        let mut gradients = Gradients::new(&network).unwrap();
        network.forward_backward(&mut gradients, &dataset.train);
        assert_eq!(saved(&network), state, "the state changed while it could have been copied");
        let expected = (train(&mut network, &dataset, 60, 1), network.digest());

        let restore = |leave_out: Option<usize>| {
            let mut restored = Network::blank(48, samples).unwrap();
            for (index, (tensor, (floats, integers))) in
                restored.tensors_mut().into_iter().zip(&state).enumerate()
            {
                match tensor.values {
                    _ if leave_out == Some(index) => {}
                    ValuesMut::F32(values) => values.copy_from_slice(floats),
                    ValuesMut::U64(values) => values.copy_from_slice(integers),
                }
            }
            restored
        };
        let mut restored = restore(None);
        restored.check().unwrap();
        assert_eq!(restored.step(), 20);
        assert_eq!((train(&mut restored, &dataset, 60, 1), restored.digest()), expected);
        for index in 0..state.len() {
            let mut partial = restore(Some(index));
            train(&mut partial, &dataset, 60, 1);
            assert_ne!(partial.digest(), expected.1, "tensor {index} is not needed");
        }
    }
}
