//! Counters of one store since it was opened.

use crate::sync::atomic::{AtomicU64, Ordering};

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
    /// Saves in flight now.
    pub in_flight: u32,
    /// Quarantined slots now.
    pub quarantined_slots: u32,
    /// Slots that saves may use now: free, being written, or reclaimable.
    pub claimable_slots: u32,
    /// Generation of the newest checkpoint, 0 where there is none.
    pub newest_generation: u64,
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
}

impl Metrics {
    pub fn saves_begun(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    pub fn saves_durable(&self, bytes: u64, superseded: bool) {
        self.durable.fetch_add(1, Ordering::Relaxed);
        self.superseded.fetch_add(u64::from(superseded), Ordering::Relaxed);
        self.durable_bytes.fetch_add(bytes, Ordering::Relaxed);
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
            ..Stats::default()
        }
    }
}
