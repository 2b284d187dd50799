//! How often to save: the shortest interval whose cost stays within what the caller accepts.
//!
//! The model is that of Strati, Friedman and Klimovic, "PCcheck: Persistent Concurrent Checkpointing for ML", ASPLOS
//! 2025, which chooses the interval so that N checkpoints in flight keep up with training at a bounded slowdown. With
//!
//! - `t` the time of one iteration without saves, `f` the interval in iterations,
//! - `Tw` the time to durable of one save while N are in flight: N * bytes / bandwidth, since they share the medium,
//! - `s` the time for which one save keeps the trainer from updating (at most its time to copied),
//! - `q` the largest acceptable run time over the run time without saves,
//!
//! one save comes out every `Tw / N`, so `f` iterations and their save take `P = max(f * t + s, Tw / N)`, and
//! `P <= q * f * t` gives
//!
//! ```text
//! f >= Tw / (N * q * t)      the medium keeps up
//! f >= s / ((q - 1) * t)     the trainer is not held up too long
//! ```
//!
//! A crash loses the work since the newest durable save began: at most `Tw + P`, and at a random moment `Tw + P / 2`.
//! The stall term and the losses are this crate's additions to the paper's bound. Integer arithmetic throughout.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Stats;

const OP: &str = "tune";
const PPM: u128 = 1_000_000;
const NS_PER_S: u128 = 1_000_000_000;

/// What a run is like, and what it may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Payload bytes of one save.
    pub state_bytes: u64,
    /// One iteration without saves.
    pub iteration: Duration,
    /// Durable bytes per second of all saves in flight together.
    pub durable_bytes_per_s: u64,
    /// How long one save keeps the trainer from updating.
    pub stall: Duration,
    /// N: saves that may be in flight at once.
    pub max_in_flight: u32,
    /// Largest acceptable run time over the run time without saves, in millionths; at least 1,000,000.
    pub max_slowdown_ppm: u64,
}

/// How often to save, and what that costs and saves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Smallest number of iterations between saves.
    pub interval_iterations: u64,
    /// From begin to durable of one save among N.
    pub durable: Duration,
    /// Predicted run time over the run time without saves, in millionths.
    pub slowdown_ppm: u64,
    /// Work lost by a crash at a random moment, on average.
    pub expected_lost: Duration,
    /// Most work that a crash loses.
    pub worst_lost: Duration,
}

/// The shortest interval for a workload. Pure.
///
/// # Errors
///
/// `InvalidArgument` for a zero size, time, bandwidth or N, for a slowdown below 1, and for one of exactly 1 where every
/// save holds the trainer up.
pub fn tune(workload: &Workload) -> Result<Tuning> {
    let w = workload;
    let positive = |name: &str, value: u128| match value {
        0 => Err(invalid(format!("{name} is 0"))),
        value => Ok(value),
    };
    let state = positive("state_bytes", w.state_bytes.into())?;
    let t = positive("the iteration's time", ns(w.iteration))?;
    let bandwidth = positive("durable_bytes_per_s", w.durable_bytes_per_s.into())?;
    let n = positive("max_in_flight", w.max_in_flight.into())?;
    let (q, s) = (u128::from(w.max_slowdown_ppm), ns(w.stall));
    if q < PPM {
        return Err(invalid(format!("max_slowdown_ppm is {q}, expected at least {PPM}")));
    }
    if q == PPM && s > 0 {
        let message =
            format!("max_slowdown_ppm is {PPM}, but every save holds the trainer up for {:?}", w.stall);
        return Err(invalid(message).advise("accept a slowdown above 1000000"));
    }
    // One save comes out every `turn` = Tw / N.
    let turn = (state * NS_PER_S).div_ceil(bandwidth);
    let keeps_up = ratio(turn, PPM, q, t);
    let not_held_up = match s {
        0 => 0,
        _ => ratio(s, PPM, q - PPM, t),
    };
    let interval = keeps_up.max(not_held_up).max(1);
    let alone = interval.saturating_mul(t);
    let period = alone.saturating_add(s).max(turn);
    let durable = turn.saturating_mul(n);
    Ok(Tuning {
        interval_iterations: u64::try_from(interval).unwrap_or(u64::MAX),
        durable: duration(durable),
        slowdown_ppm: u64::try_from(ratio(period, PPM, alone, 1)).unwrap_or(u64::MAX),
        expected_lost: duration(durable.saturating_add(period / 2)),
        worst_lost: duration(durable.saturating_add(period)),
    })
}

/// Durable bytes per second that a store's own saves got, over the time in which any was in flight.
///
/// # Errors
///
/// `InvalidState` before its first durable save.
pub fn measured_bandwidth(stats: &Stats) -> Result<u64> {
    match (u128::from(stats.durable_bytes) * NS_PER_S).checked_div(stats.busy_ns.into()) {
        Some(bandwidth) if bandwidth > 0 => Ok(u64::try_from(bandwidth).unwrap_or(u64::MAX)),
        _ => Err(Error::new(ErrorKind::InvalidState, OP, "no save of this store is durable yet")
            .advise("save once and wait for durable, or give the bandwidth")),
    }
}

/// Mean time to copied of a store's durable saves; zero before the first.
pub fn measured_stall(stats: &Stats) -> Duration {
    Duration::from_nanos(stats.copied_ns.checked_div(stats.saves_durable).unwrap_or(0))
}

/// `a * b / (c * d)`, rounded up. At most one of the products is near the limit: 2^127 is reached by none that fits
/// a `Duration` of a century.
fn ratio(a: u128, b: u128, c: u128, d: u128) -> u128 {
    a.saturating_mul(b).div_ceil(c.saturating_mul(d).max(1))
}

fn ns(duration: Duration) -> u128 {
    duration.as_nanos()
}

fn duration(ns: u128) -> Duration {
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, OP, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 GB at 1 GB/s, iterations of 100 ms, 5% slower at most.
    fn workload() -> Workload {
        Workload {
            state_bytes: 1_000_000_000,
            iteration: Duration::from_millis(100),
            durable_bytes_per_s: 1_000_000_000,
            stall: Duration::ZERO,
            max_in_flight: 2,
            max_slowdown_ppm: 1_050_000,
        }
    }

    #[test]
    fn the_medium_bounds_the_interval() {
        // Tw = 2 s, so f >= 2 / (2 * 1.05 * 0.1) = 9.52.
        let tuning = tune(&workload()).unwrap();
        assert_eq!(tuning.interval_iterations, 10);
        assert_eq!(tuning.durable, Duration::from_secs(2));
        assert_eq!(tuning.slowdown_ppm, 1_000_000);
        assert_eq!(tuning.expected_lost, Duration::from_millis(2500));
        assert_eq!(tuning.worst_lost, Duration::from_secs(3));
    }

    #[test]
    fn the_stall_bounds_the_interval() {
        // f >= 0.1 / (0.05 * 0.1) = 20.
        let tuning = tune(&Workload { stall: Duration::from_millis(100), ..workload() }).unwrap();
        assert_eq!(tuning.interval_iterations, 20);
        assert_eq!(tuning.slowdown_ppm, 1_050_000);
    }

    #[test]
    fn the_interval_is_the_smallest_that_keeps_within_the_slowdown() {
        for stall_ms in [0, 1, 7, 50] {
            for iteration_ms in [1, 30, 999, 5000] {
                for max_slowdown_ppm in [1_001_000, 1_050_000, 2_000_000] {
                    let w = Workload {
                        iteration: Duration::from_millis(iteration_ms),
                        stall: Duration::from_millis(stall_ms),
                        max_slowdown_ppm,
                        ..workload()
                    };
                    let f = u128::from(tune(&w).unwrap().interval_iterations);
                    let within = |f: u128| {
                        let (alone, turn) = (f * ns(w.iteration), NS_PER_S);
                        (alone + ns(w.stall)).max(turn) * PPM <= alone * u128::from(max_slowdown_ppm)
                    };
                    assert!(within(f), "{f} iterations are too few for {w:?}");
                    assert!(f == 1 || !within(f - 1), "{f} iterations are too many for {w:?}");
                }
            }
        }
    }

    #[test]
    fn impossible_workloads_are_refused_and_extreme_ones_do_not_overflow() {
        let ok = workload();
        for bad in [
            Workload { state_bytes: 0, ..ok },
            Workload { iteration: Duration::ZERO, ..ok },
            Workload { durable_bytes_per_s: 0, ..ok },
            Workload { max_in_flight: 0, ..ok },
            Workload { max_slowdown_ppm: 999_999, ..ok },
            Workload { max_slowdown_ppm: 1_000_000, stall: Duration::from_nanos(1), ..ok },
        ] {
            assert_eq!(tune(&bad).unwrap_err().kind(), ErrorKind::InvalidArgument, "{bad:?}");
        }
        let extreme = Workload {
            state_bytes: u64::MAX,
            iteration: Duration::from_nanos(1),
            durable_bytes_per_s: 1,
            stall: Duration::from_nanos(u64::MAX),
            max_in_flight: u32::MAX,
            max_slowdown_ppm: 1_000_001,
        };
        assert_eq!(tune(&extreme).unwrap().interval_iterations, u64::MAX);
    }

    #[test]
    fn measurements_come_from_the_stats() {
        let stats = Stats {
            saves_durable: 4,
            durable_bytes: 3_000,
            busy_ns: 1_500,
            copied_ns: 40,
            ..Stats::default()
        };
        assert_eq!(measured_bandwidth(&stats).unwrap(), 2_000_000_000);
        assert_eq!(measured_stall(&stats), Duration::from_nanos(10));
        assert_eq!(measured_bandwidth(&Stats::default()).unwrap_err().kind(), ErrorKind::InvalidState);
        assert_eq!(measured_stall(&Stats::default()), Duration::ZERO);
    }
}
