//! What a soak did, as a table and as JSON, and how far it is.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::beside::Seen;
use super::reports::Said;

#[derive(Default, Serialize)]
pub struct Totals {
    pub seed: u64,
    pub seconds: u64,
    pub regions: u64,
    pub on_failing_disks: u64,
    pub lives: u64,
    pub begun: u64,
    pub durable: u64,
    pub cancelled: u64,
    pub failed: u64,
    pub faults_met: u64,
    pub repaired: u64,
    pub pinned: u64,
    pub exports: u64,
    pub checkpoints_verified: u64,
    pub verified_bytes: u64,
    pub losses: u64,
}

impl Totals {
    pub fn new(seed: u64) -> Totals {
        Totals { seed, ..Totals::default() }
    }

    /// Takes in what a saver said, and what was seen beside it.
    pub fn add(&mut self, said: &Said, seen: &Seen, faults_met: u64) {
        let count =
            |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
        self.lives += 1;
        self.begun += said.began.len() as u64;
        self.durable += said.durable.len() as u64;
        self.cancelled += said.cancelled;
        self.failed += said.failed;
        self.repaired += said.repaired;
        self.pinned += said.pinned.len() as u64;
        self.faults_met += faults_met;
        self.exports += count(&seen.exports);
        self.checkpoints_verified += count(&seen.checkpoints);
        self.verified_bytes += count(&seen.bytes);
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("JSON")
    }

    pub fn table(&self) -> String {
        let rows = [
            ("seconds", self.seconds),
            ("regions", self.regions),
            ("regions on disks that fail", self.on_failing_disks),
            ("savers ended (killed, terminated, stopped)", self.lives),
            ("saves begun", self.begun),
            ("saves reported durable", self.durable),
            ("saves cancelled", self.cancelled),
            ("saves that faults cost", self.failed),
            ("faults of the disk", self.faults_met),
            ("slots repaired", self.repaired),
            ("pins", self.pinned),
            ("exports by the tool", self.exports),
            ("checkpoints verified", self.checkpoints_verified),
            ("MiB verified", self.verified_bytes >> 20),
            ("losses", self.losses),
        ];
        let lines = rows.map(|(what, count)| format!("{what:<44} {count:>12}"));
        format!("{}\n{:<44} {:>20}", lines.join("\n"), "PCC_SOAK_SEED", self.seed)
    }
}

/// A bar on a terminal, nothing elsewhere.
pub struct Progress {
    bar: ProgressBar,
    began: Instant,
}

impl Progress {
    pub fn new(lasts: Duration) -> Progress {
        let style = ProgressStyle::with_template("{bar:30} {elapsed} of {len} s, {msg}");
        let bar = ProgressBar::new(lasts.as_secs());
        bar.set_style(style.expect("a template"));
        Progress { bar, began: Instant::now() }
    }

    pub fn show(&self, totals: &Totals) {
        self.bar.set_position(self.began.elapsed().as_secs());
        self.bar.set_message(format!("{} savers ended, {} saves durable", totals.lives, totals.durable));
    }

    pub fn end(self) {
        self.bar.finish_and_clear();
    }
}
