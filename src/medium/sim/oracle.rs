//! Judges a trace without a crash: does any record promise what is not yet durable?

use std::collections::BTreeMap;
use std::ops::Range;

use super::content::BLOCK;
use super::replay::Replay;
use super::trace::{Event, SimModel, Trace};
use crate::format::BLOCK_BYTES;
use crate::medium::Barrier;

/// What a block that may hold a record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordClass {
    /// Its slot is being written: its payload means nothing.
    Writing,
    /// A checkpoint: every byte in these ranges of the region is part of it.
    Commit {
        /// Payload, chunk table, and whatever else recovery will read because of this record.
        refers_to: Vec<Range<u64>>,
    },
    /// Neither (empty, damaged, or a record that promises nothing).
    Other,
}

/// Tells the oracle what the format means.
pub trait Classifier {
    /// What `block`, at `offset`, says; `None` where no record can stand.
    fn record(&self, offset: u64, block: &[u8]) -> Option<RecordClass>;

    /// Offset of the record that must durably say [`RecordClass::Writing`] before the block at `offset` may
    /// be written; `None` where there is no such rule.
    fn guard(&self, offset: u64) -> Option<u64> {
        let _ = offset;
        None
    }
}

/// Which law a step broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Law {
    /// A commit record is written only when all that it refers to is durable.
    CommitAfterPayload,
    /// A slot's payload is written only while its durable record says `writing`.
    PayloadUnderWriting,
    /// No two copies into one block are under way at once: their order would be undefined.
    OneWriterPerBlock,
}

/// A step that broke a law.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Index of the event.
    pub event: usize,
    /// The law.
    pub law: Law,
    /// What was expected and found.
    pub message: String,
}

/// The two calls that a barrier can be issued by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// [`crate::medium::Medium::fence`].
    Fence,
    /// [`crate::medium::Medium::persist`] or [`crate::medium::Medium::write_durable`].
    Persist,
}

/// How often a barrier took effect, and how often there was nothing for it to order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BarrierUse {
    /// Times it was carried out.
    pub total: u64,
    /// Times it made nothing durable: a warning.
    pub idle: u64,
}

/// What the oracle found.
#[derive(Debug, Clone, Default)]
pub struct OracleReport {
    /// Broken laws, in the order of the trace.
    pub violations: Vec<Violation>,
    /// Use of each barrier. Fences are absent where they order nothing on the medium (all but pmem).
    pub barriers: BTreeMap<(Verb, Barrier), BarrierUse>,
}

/// Walks `trace` and holds every step against the laws.
pub fn check_trace(trace: &Trace, classifier: &dyn Classifier) -> OracleReport {
    let mut replay = Replay::new(trace, false);
    let mut report = OracleReport::default();
    for (event, step) in trace.events.iter().enumerate() {
        match step {
            Event::Copy { offset, data, .. } => {
                for at in (0..data.len()).step_by(BLOCK) {
                    let broken =
                        check_block(&mut replay, classifier, offset + at as u64, &data[at..at + BLOCK]);
                    let named = |(law, message)| Violation { event, law, message };
                    report.violations.extend(broken.into_iter().map(named));
                }
            }
            Event::Fence { barrier, .. } if trace.model == SimModel::Pmem => {
                count(&mut report, (Verb::Fence, *barrier), replay.covered_by(step).is_empty());
            }
            Event::PersistDone { barrier, .. } => {
                count(&mut report, (Verb::Persist, *barrier), replay.covered_by(step).is_empty());
            }
            _ => {}
        }
        replay.apply(step);
    }
    report
}

fn count(report: &mut OracleReport, key: (Verb, Barrier), idle: bool) {
    let used = report.barriers.entry(key).or_default();
    used.total += 1;
    used.idle += u64::from(idle);
}

fn check_block(
    replay: &mut Replay,
    classifier: &dyn Classifier,
    offset: u64,
    block: &[u8],
) -> Vec<(Law, String)> {
    let mut broken = Vec::new();
    if replay.is_in_flight(offset / BLOCK_BYTES) {
        let message =
            format!("the block at byte {offset} is written while another copy into it is under way");
        broken.push((Law::OneWriterPerBlock, message));
    }
    if let Some(RecordClass::Commit { refers_to }) = classifier.record(offset, block) {
        for range in refers_to {
            if let Some(byte) = replay.first_uncertain(&range) {
                let message = format!(
                    "the record at byte {offset} commits bytes {}..{}, but byte {byte} is not durable",
                    range.start, range.end
                );
                broken.push((Law::CommitAfterPayload, message));
            }
        }
    }
    if let Some(guard) = classifier.guard(offset) {
        let record = replay.durable.get(guard / BLOCK_BYTES);
        let class = classifier.record(guard, record.bytes());
        if class != Some(RecordClass::Writing) {
            let message = format!(
                "byte {offset} is written while the durable record at byte {guard} says {class:?}, not writing"
            );
            broken.push((Law::PayloadUnderWriting, message));
        }
    }
    broken
}
