//! Medians, spreads and intervals of repeated measurements.

use std::time::Duration;

use serde_json::{json, Value};

/// How sure an interval is.
const CONFIDENCE: f64 = 0.95;

/// Median, least and greatest of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Where the median of further repetitions would lie with 95% certainty; none of fewer than six.
    pub interval: Option<(f64, f64)>,
}

impl Spread {
    /// Of these figures; zeros where there are none.
    pub fn of(figures: impl Iterator<Item = f64>) -> Spread {
        let mut sorted: Vec<f64> = figures.collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        };
        Spread {
            median,
            min: sorted.first().copied().unwrap_or(0.0),
            max: sorted.last().copied().unwrap_or(0.0),
            interval: interval_rank(sorted.len()).map(|rank| (sorted[rank], sorted[sorted.len() - 1 - rank])),
        }
    }

    /// Median (least-greatest).
    pub fn text(&self, digits: usize) -> String {
        let Spread { median, min, max, .. } = self;
        format!("{median:.digits$} ({min:.digits$}-{max:.digits$})")
    }

    /// Median [interval]; the spread where there are too few for one.
    pub fn interval_text(&self) -> String {
        match self.interval {
            Some((low, high)) => format!("{:.2} [{low:.2}-{high:.2}]", self.median),
            None => self.text(2),
        }
    }

    pub fn json(&self) -> Value {
        let interval = self.interval.map(|(low, high)| [low, high]);
        json!({ "median": self.median, "min": self.min, "max": self.max, "interval_95": interval })
    }
}

/// How many figures lie below the interval of the median, and as many above it: each figure is as likely below the
/// true median as above it, whatever their distribution.
fn interval_rank(count: usize) -> Option<usize> {
    let mut ways = 0.5f64.powi(count as i32);
    let mut below = 0.0;
    let mut rank = None;
    for fewer in 0..count / 2 {
        // Probability that at most `fewer` figures lie below the true median.
        below += ways;
        if below > (1.0 - CONFIDENCE) / 2.0 {
            break;
        }
        rank = Some(fewer);
        ways *= (count - fewer) as f64 / (fewer + 1) as f64;
    }
    rank
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub fn us(time: Duration) -> u64 {
    time.as_micros() as u64
}

/// `above / below`; 0 where nothing was measured below.
pub fn over(above: f64, below: f64) -> f64 {
    match below > 0.0 {
        true => above / below,
        false => 0.0,
    }
}

/// One time over another.
pub fn ratio(above: Duration, below: Duration) -> f64 {
    over(above.as_secs_f64(), below.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_stand_in_the_middle() {
        let spread = |figures: &[f64]| {
            let Spread { median, min, max, .. } = Spread::of(figures.iter().copied());
            (median, min, max)
        };
        assert_eq!(spread(&[3.0, 1.0, 2.0]), (2.0, 1.0, 3.0));
        assert_eq!(spread(&[4.0, 1.0]), (2.5, 1.0, 4.0));
        assert_eq!(spread(&[]), (0.0, 0.0, 0.0));
    }

    #[test]
    fn intervals_are_those_of_the_sign_test() {
        // Ranks as in any table of the sign test at 5%, from 0.
        let known =
            [(1, None), (5, None), (6, Some(0)), (8, Some(0)), (9, Some(1)), (15, Some(3)), (25, Some(7))];
        for (count, rank) in known {
            assert_eq!(interval_rank(count), rank, "{count} figures");
        }
        let spread = Spread::of((1..=15).map(f64::from));
        assert_eq!(spread.interval, Some((4.0, 12.0)));
    }
}
