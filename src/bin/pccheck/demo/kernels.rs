//! The inner loops of training: dense layers forwards and backwards, and Adam.
//!
//! Every sum is taken in one fixed order, whatever the number of threads and however wide the machine's
//! vectors: threads share out results, never the terms of one sum. So two runs agree bit for bit, and so does a
//! run that is killed and resumed. The loops have the shapes that the compiler turns into vector code.
//!
//! Layouts: weights are `[outputs][inputs]`; activations and their gradients are `[samples][features]`.

/// Independent partial sums of a dot product. Part of the arithmetic, not a hint: it fixes the order of additions.
const LANES: usize = 8;
/// Columns of one pass over the weights in [`input_gradient`], so that the sums stay in the first-level cache.
const COLUMN_BLOCK: usize = 256;
/// Multiply-adds below which starting a thread costs more than it saves.
const PARALLEL_OPS_MIN: usize = 1 << 18;
/// Smaller values of Adam's averages become zero: below the normal range every operation is many times slower.
const AVERAGE_MIN: f32 = 1e-30;

/// Items that one thread takes, when `items` of `ops_each` multiply-adds are shared out evenly.
fn share(items: usize, ops_each: usize, threads: usize) -> usize {
    let useful = (items.saturating_mul(ops_each) / PARALLEL_OPS_MIN).clamp(1, threads.max(1));
    items.div_ceil(useful).max(1)
}

/// Runs every job, all but the last on threads of their own.
fn run_jobs<J: Send>(mut jobs: Vec<J>, work: impl Fn(J) + Sync) {
    let last = jobs.pop();
    std::thread::scope(|scope| {
        for job in jobs {
            let work = &work;
            scope.spawn(move || work(job));
        }
        if let Some(job) = last {
            work(job);
        }
    });
}

/// Dot products of one row with four vectors of its length, a multiple of [`LANES`].
fn dot4(row: &[f32], vectors: [&[f32]; 4]) -> [f32; 4] {
    let vectors = vectors.map(|vector| &vector[..row.len()]);
    let mut sums = [[0.0f32; LANES]; 4];
    for (block, weights) in row.chunks_exact(LANES).enumerate() {
        for (sum, vector) in sums.iter_mut().zip(vectors) {
            let values = &vector[block * LANES..][..LANES];
            for lane in 0..LANES {
                sum[lane] += weights[lane] * values[lane];
            }
        }
    }
    sums.map(|s| ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])))
}

/// `sum += factors[0] * a + factors[1] * b + factors[2] * c + factors[3] * d`, element by element.
fn add_scaled4(sum: &mut [f32], factors: [f32; 4], a: &[f32], b: &[f32], c: &[f32], d: &[f32]) {
    let n = sum.len();
    let (a, b, c, d) = (&a[..n], &b[..n], &c[..n], &d[..n]);
    for i in 0..n {
        sum[i] += (factors[0] * a[i] + factors[1] * b[i]) + (factors[2] * c[i] + factors[3] * d[i]);
    }
}

/// Adds `factor(k) * vector(k)` for every `k` below `count` to `sum`, four at a time.
fn add_scaled<'a>(
    sum: &mut [f32],
    count: usize,
    factor: impl Fn(usize) -> f32,
    vector: impl Fn(usize) -> &'a [f32],
) {
    for k in (0..count).step_by(4) {
        // Beyond the end the last vector stands in, times zero.
        let at = |ahead: usize| vector((k + ahead).min(count - 1));
        let by = |ahead: usize| if k + ahead < count { factor(k + ahead) } else { 0.0 };
        add_scaled4(sum, [by(0), by(1), by(2), by(3)], at(0), at(1), at(2), at(3));
    }
}

/// A dense layer: `output[s][o] = bias[o] + sum over i of weight[o][i] * input[s][i]`.
///
/// `inputs` is a multiple of 8. `scratch` gets as many values as `output`, in no order that matters.
pub fn forward(
    output: &mut [f32],
    scratch: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    input: &[f32],
    inputs: usize,
    threads: usize,
) {
    debug_assert_eq!(inputs % LANES, 0);
    let outputs = bias.len();
    let samples = input.len() / inputs;
    let rows = share(outputs, samples * inputs, threads);
    // Each thread owns whole rows `[outputs][samples]` of the scratch space; they are turned round at the end.
    let scratch = &mut scratch[..outputs * samples];
    let jobs = scratch.chunks_mut(rows * samples).zip(weight.chunks(rows * inputs)).collect();
    run_jobs(jobs, |(sums, weights): (&mut [f32], &[f32])| {
        for (sums, row) in sums.chunks_exact_mut(samples).zip(weights.chunks_exact(inputs)) {
            for (quad, sums) in sums.chunks_mut(4).enumerate() {
                let sample =
                    |ahead: usize| &input[(quad * 4 + ahead.min(sums.len() - 1)) * inputs..][..inputs];
                let dots = dot4(row, [sample(0), sample(1), sample(2), sample(3)]);
                sums.copy_from_slice(&dots[..sums.len()]);
            }
        }
    });
    for (sample, output) in output.chunks_exact_mut(outputs).enumerate() {
        for (o, value) in output.iter_mut().enumerate() {
            *value = scratch[o * samples + sample] + bias[o];
        }
    }
}

/// Sets negative values to zero.
pub fn relu(values: &mut [f32]) {
    for value in values {
        *value = value.max(0.0);
    }
}

/// Stops the gradient where the activation that [`relu`] gave is zero.
pub fn relu_gradient(gradient: &mut [f32], activation: &[f32]) {
    for (gradient, activation) in gradient.iter_mut().zip(activation) {
        *gradient = if *activation > 0.0 { *gradient } else { 0.0 };
    }
}

/// Turns the logits of one sample into the gradient of its cross-entropy, divided by `samples`; returns the
/// cross-entropy in nats.
pub fn softmax_cross_entropy(logits: &mut [f32], label: usize, samples: usize) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let label_logit = logits[label] - max;
    let mut total = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - max).exp();
        total += *logit;
    }
    let scale = 1.0 / (total * samples as f32);
    for value in logits.iter_mut() {
        *value *= scale;
    }
    logits[label] -= 1.0 / samples as f32;
    total.ln() - label_logit
}

/// Gradients of a dense layer's weights and biases from that of its output.
pub fn weight_gradient(
    weight: &mut [f32],
    bias: &mut [f32],
    output_gradient: &[f32],
    input: &[f32],
    inputs: usize,
    threads: usize,
) {
    let outputs = bias.len();
    let samples = input.len() / inputs;
    let rows = share(outputs, samples * inputs, threads);
    run_jobs(weight.chunks_mut(rows * inputs).enumerate().collect(), |(job, weights)| {
        for (row, sums) in weights.chunks_exact_mut(inputs).enumerate() {
            sums.fill(0.0);
            let output = job * rows + row;
            add_scaled(sums, samples, |s| output_gradient[s * outputs + output], |s| &input[s * inputs..]);
        }
    });
    for (output, sum) in bias.iter_mut().enumerate() {
        *sum = output_gradient.chunks_exact(outputs).map(|gradients| gradients[output]).sum();
    }
}

/// Gradient of a dense layer's input from that of its output.
pub fn input_gradient(
    input_gradient: &mut [f32],
    output_gradient: &[f32],
    weight: &[f32],
    inputs: usize,
    threads: usize,
) {
    let outputs = weight.len() / inputs;
    let samples = output_gradient.len() / outputs;
    // Each thread owns the same columns of every sample.
    let columns = share(inputs, samples * outputs, threads);
    let mut jobs: Vec<Vec<&mut [f32]>> = (0..inputs.div_ceil(columns)).map(|_| Vec::new()).collect();
    for sums in input_gradient.chunks_exact_mut(inputs) {
        for (job, part) in sums.chunks_mut(columns).enumerate() {
            jobs[job].push(part);
        }
    }
    run_jobs(jobs.into_iter().enumerate().collect(), |(job, mut parts)| {
        let width = parts.first().map_or(0, |part| part.len());
        for start in (0..width).step_by(COLUMN_BLOCK) {
            let end = (start + COLUMN_BLOCK).min(width);
            for part in &mut parts {
                part[start..end].fill(0.0);
            }
            let first = job * columns + start;
            for quad in (0..outputs).step_by(4) {
                let count = (outputs - quad).min(4);
                for (sample, part) in parts.iter_mut().enumerate() {
                    add_scaled(
                        &mut part[start..end],
                        count,
                        |o| output_gradient[sample * outputs + quad + o],
                        |o| &weight[(quad + o) * inputs + first..],
                    );
                }
            }
        }
    });
}

/// The constants of one Adam step (Kingma and Ba, 2015), with the bias corrections folded in.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep {
    mean_decay: f32,
    square_decay: f32,
    rate: f32,
    epsilon: f32,
}

impl AdamStep {
    /// Step number `step`, counted from 1, at learning rate `rate`.
    pub fn new(step: u64, rate: f32) -> Self {
        const MEAN_DECAY: f64 = 0.9;
        const SQUARE_DECAY: f64 = 0.999;
        const EPSILON: f64 = 1e-8;
        let mean_correction = 1.0 - MEAN_DECAY.powf(step as f64);
        let square_correction = (1.0 - SQUARE_DECAY.powf(step as f64)).sqrt();
        AdamStep {
            mean_decay: MEAN_DECAY as f32,
            square_decay: SQUARE_DECAY as f32,
            rate: (f64::from(rate) * square_correction / mean_correction) as f32,
            epsilon: (EPSILON * square_correction) as f32,
        }
    }

    /// Updates values with the running means of their gradients and of the squares.
    pub fn apply(
        self,
        values: &mut [f32],
        means: &mut [f32],
        squares: &mut [f32],
        gradients: &[f32],
        threads: usize,
    ) {
        let part = share(values.len(), 1, threads);
        let parts = values.chunks_mut(part).zip(means.chunks_mut(part));
        let parts = parts.zip(squares.chunks_mut(part).zip(gradients.chunks(part)));
        run_jobs(parts.collect(), |((values, means), (squares, gradients))| {
            for (((value, mean), square), gradient) in
                values.iter_mut().zip(means).zip(squares).zip(gradients)
            {
                let m = *mean + (1.0 - self.mean_decay) * (gradient - *mean);
                let v = *square + (1.0 - self.square_decay) * (gradient * gradient - *square);
                *mean = if m.abs() < AVERAGE_MIN { 0.0 } else { m };
                *square = if v < AVERAGE_MIN { 0.0 } else { v };
                *value -= self.rate * *mean / (square.sqrt() + self.epsilon);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reproducible values from -1 to 1.
    fn values(count: usize, seed: u32) -> Vec<f32> {
        let scramble =
            |i: usize| (i as u32 + 1).wrapping_mul(2654435761).wrapping_add(seed).wrapping_mul(40503);
        (0..count).map(|i| (scramble(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn assert_close(got: &[f32], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert!((f64::from(*got) - expected).abs() < 1e-3, "at {index}: got {got}, expected {expected}");
        }
    }

    /// Sizes with remainders of every kind, and one that is shared out among threads.
    const SIZES: [(usize, usize, usize); 4] = [(1, 8, 1), (7, 24, 10), (4, 264, 33), (6, 520, 260)];

    #[test]
    fn layers_agree_with_the_plain_sums_for_any_number_of_threads() {
        for (samples, inputs, outputs) in SIZES {
            let (input, weight) = (values(samples * inputs, 1), values(outputs * inputs, 2));
            let (bias, delta) = (values(outputs, 3), values(samples * outputs, 4));
            let product = |a: f32, b: f32| f64::from(a) * f64::from(b);
            let mut expected = [vec![], vec![], vec![], vec![]];
            for s in 0..samples {
                for o in 0..outputs {
                    let sum: f64 =
                        (0..inputs).map(|i| product(weight[o * inputs + i], input[s * inputs + i])).sum();
                    expected[0].push(sum + f64::from(bias[o]));
                }
                for i in 0..inputs {
                    let terms = (0..outputs).map(|o| product(weight[o * inputs + i], delta[s * outputs + o]));
                    expected[1].push(terms.sum());
                }
            }
            for o in 0..outputs {
                for i in 0..inputs {
                    let terms = (0..samples).map(|s| product(delta[s * outputs + o], input[s * inputs + i]));
                    expected[2].push(terms.sum());
                }
                expected[3].push((0..samples).map(|s| f64::from(delta[s * outputs + o])).sum());
            }
            let mut first: Option<[Vec<f32>; 4]> = None;
            for threads in [1, 2, 3, 16] {
                let mut got = expected.each_ref().map(|expected| vec![f32::NAN; expected.len()]);
                let [output, input_delta, weight_delta, bias_delta] = &mut got;
                let mut scratch = vec![f32::NAN; output.len()];
                forward(output, &mut scratch, &weight, &bias, &input, inputs, threads);
                input_gradient(input_delta, &delta, &weight, inputs, threads);
                weight_gradient(weight_delta, bias_delta, &delta, &input, inputs, threads);
                got.iter().zip(&expected).for_each(|(got, expected)| assert_close(got, expected));
                assert_eq!(
                    first.get_or_insert_with(|| got.clone()),
                    &got,
                    "{threads} threads changed the result"
                );
            }
        }
    }

    #[test]
    fn adam_moves_each_value_by_the_rate_at_first_and_forgets_vanishing_averages() {
        let (mut values, mut means, mut squares) = (vec![1.0, 1.0, 1.0], vec![0.0; 3], vec![0.0; 3]);
        AdamStep::new(1, 0.01).apply(&mut values, &mut means, &mut squares, &[3.0, -0.5, 0.0], 1);
        assert_close(&values, &[0.99, 1.01, 1.0]);
        assert_close(&means, &[0.3, -0.05, 0.0]);
        assert_close(&squares, &[0.009, 0.00025, 0.0]);
        for step in 2..2000 {
            AdamStep::new(step, 0.0).apply(&mut values, &mut means, &mut squares, &[0.0; 3], 1);
        }
        assert_eq!(means, [0.0; 3]);
    }

    #[test]
    fn cross_entropy_of_equal_logits_is_the_logarithm_of_their_number() {
        let mut logits = [700.0; 10];
        let loss = softmax_cross_entropy(&mut logits, 3, 2);
        assert!((loss - 10f32.ln()).abs() < 1e-6, "{loss}");
        let expected: Vec<f64> = (0..10).map(|class| if class == 3 { -0.45 } else { 0.05 }).collect();
        assert_close(&logits, &expected);
    }
}
