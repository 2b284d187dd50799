//! Counters of one store since it was opened.

use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{now, Mutex};

/// A snapshot of the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Saves begun.
    pub saves_begun: u64,
    /// Saves that became durable, superseded ones included.
    pub saves_durable: u64,
    /// Durable saves that a newer checkpoint had made superfluous by then.
    pub saves_superseded: u64,
    /// Saves that failed.
    pub saves_failed: u64,
    /// Saves that were cancelled.
    pub saves_cancelled: u64,
    /// Payload bytes of durable saves.
    pub durable_bytes: u64,
    /// Those of them that were in their places already, and were not written.
    pub unchanged_bytes: u64,
    /// Those of them that cuFile wrote from the memory of a GPU, past host memory.
    pub direct_bytes: u64,
    /// Nanoseconds in which at least one save was in flight.
    pub busy_ns: u64,
    /// Sum over durable saves of the nanoseconds from begin to copied.
    pub copied_ns: u64,
    /// Sum over durable saves of the nanoseconds from begin to durable.
    pub durable_ns: u64,
    /// Saves in flight now.
    pub in_flight: u32,
    /// Quarantined slots now.
    pub quarantined_slots: u32,
    /// Slots that saves may use now: free, being written, or reclaimable.
    pub claimable_slots: u32,
    /// Generation of the newest checkpoint, 0 where there is none.
    pub newest_generation: u64,
}

/// Of a durable save: bytes of its payload, those of them that were not written, and those that cuFile wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SavedBytes {
    pub payload: u64,
    pub unchanged: u64,
    pub direct: u64,
}

/// The live counters. Relaxed throughout: each stands alone and orders nothing.
#[derive(Default)]
pub(crate) struct Metrics {
    begun: AtomicU64,
    durable: AtomicU64,
    superseded: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    durable_bytes: AtomicU64,
    unchanged_bytes: AtomicU64,
    direct_bytes: AtomicU64,
    copied_ns: AtomicU64,
    durable_ns: AtomicU64,
    busy: Mutex<Busy>,
}

/// The time in which saves were in flight, and since when they are.
#[derive(Default)]
struct Busy {
    saves: u32,
    since: Option<Instant>,
    total: Duration,
}

impl Busy {
    fn now(&self) -> Duration {
        self.total + self.since.map_or(Duration::ZERO, |since| now() - since)
    }
}

impl Metrics {
    pub fn saves_begun(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let mut busy = self.busy.lock();
        busy.saves += 1;
        busy.since.get_or_insert_with(now);
    }

    /// A save is no longer in flight, however it ended.
    pub fn saves_ended(&self) {
        let mut busy = self.busy.lock();
        busy.saves = busy.saves.saturating_sub(1);
        if busy.saves == 0 {
            busy.total = busy.now();
            busy.since = None;
        }
    }

    pub fn saves_durable(&self, bytes: SavedBytes, superseded: bool, copied: Duration, durable: Duration) {
        self.copied_ns.fetch_add(ns(copied), Ordering::Relaxed);
        self.durable_ns.fetch_add(ns(durable), Ordering::Relaxed);
        self.durable.fetch_add(1, Ordering::Relaxed);
        self.superseded.fetch_add(u64::from(superseded), Ordering::Relaxed);
        self.durable_bytes.fetch_add(bytes.payload, Ordering::Relaxed);
        self.unchanged_bytes.fetch_add(bytes.unchanged, Ordering::Relaxed);
        self.direct_bytes.fetch_add(bytes.direct, Ordering::Relaxed);
    }

    pub fn saves_failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    pub fn saves_cancelled(&self) {
        self.cancelled.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters; gauges are the store's to fill in.
    pub fn snapshot(&self) -> Stats {
        Stats {
            saves_begun: self.begun.load(Ordering::Relaxed),
            saves_durable: self.durable.load(Ordering::Relaxed),
            saves_superseded: self.superseded.load(Ordering::Relaxed),
            saves_failed: self.failed.load(Ordering::Relaxed),
            saves_cancelled: self.cancelled.load(Ordering::Relaxed),
            durable_bytes: self.durable_bytes.load(Ordering::Relaxed),
            unchanged_bytes: self.unchanged_bytes.load(Ordering::Relaxed),
            direct_bytes: self.direct_bytes.load(Ordering::Relaxed),
            busy_ns: ns(self.busy.lock().now()),
            copied_ns: self.copied_ns.load(Ordering::Relaxed),
            durable_ns: self.durable_ns.load(Ordering::Relaxed),
            ..Stats::default()
        }
    }
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
