//! Which bytes of a trace are durable, and which may still be lost, step by step.

use std::collections::{BTreeMap, HashMap};

use super::choices::BlockChoices;
use super::content::{blocks_of, BlockBytes, Content, BLOCK};
use super::trace::{Event, LeftBehind, Note, OpId, SimModel, ThreadTag, Trace};
use crate::format::BLOCK_BYTES;
use crate::sync::Arc;

/// Where one version of a block stands on its way to the medium.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Submitted: may land at any moment.
    InFlight,
    /// Completed: a persist that begins now covers it.
    Completed,
    /// Its copy or its persist failed: it may be on the medium, but nothing makes it durable.
    Unknown,
}

/// One content that a block may have after a crash.
#[derive(Clone)]
pub(super) struct Version {
    pub(super) bytes: BlockBytes,
    pub(super) op: OpId,
    /// Who stored it; `None` for a process that has died.
    pub(super) owner: Option<ThreadTag>,
    pub(super) phase: Phase,
}

/// The versions of one block that are not older than its durable content, oldest first.
#[derive(Default)]
struct Pending {
    versions: Vec<Version>,
    choices: Option<Arc<BlockChoices>>,
}

impl Pending {
    fn choices(&mut self, model: SimModel, tear_unchanged: bool, durable: &BlockBytes) -> Arc<BlockChoices> {
        let choices = self.choices.get_or_insert_with(|| {
            let versions = self.versions.iter().map(|version| version.bytes.clone());
            Arc::new(BlockChoices::new(model, tear_unchanged, durable.clone(), versions))
        });
        Arc::clone(choices)
    }
}

/// What a barrier is about to make durable: versions by block.
type Covered = Vec<(u64, OpId)>;

/// The state after some prefix of a trace.
pub(super) struct Replay {
    model: SimModel,
    tear_unchanged: bool,
    pub(super) durable: Content,
    pending: BTreeMap<u64, Pending>,
    /// Blocks of each copy that has not ended.
    in_flight: BTreeMap<OpId, std::ops::Range<u64>>,
    persists: HashMap<OpId, Covered>,
    pub(super) notes: Vec<Note>,
}

impl Replay {
    /// The state before the first event.
    pub(super) fn new(trace: &Trace, tear_unchanged: bool) -> Self {
        let mut next_op = 0;
        let mut pending = BTreeMap::new();
        for (index, versions) in &trace.start.pending {
            let versions = versions.iter().map(|left| {
                next_op += 1;
                let op = OpId(next_op);
                let phase = if left.persistable { Phase::Completed } else { Phase::Unknown };
                Version { bytes: left.bytes.clone(), op, owner: None, phase }
            });
            pending.insert(*index, Pending { versions: versions.collect(), choices: None });
        }
        Replay {
            model: trace.model,
            tear_unchanged,
            durable: trace.start.durable.clone(),
            pending,
            in_flight: BTreeMap::new(),
            persists: HashMap::new(),
            notes: trace.start.notes.clone(),
        }
    }

    /// Takes one step.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Copy { op, thread, offset, data } => {
                for at in (0..data.len()).step_by(BLOCK) {
                    let pending = self.pending.entry((offset + at as u64) / BLOCK_BYTES).or_default();
                    pending.choices = None;
                    pending.versions.push(Version {
                        bytes: BlockBytes::part_of(data, at),
                        op: *op,
                        owner: Some(*thread),
                        phase: Phase::InFlight,
                    });
                }
                self.in_flight.insert(*op, blocks_of(*offset, data.len() as u64));
            }
            Event::CopyCompleted { op } => self.end_copy(*op, Phase::Completed),
            Event::CopyFailed { op } => self.end_copy(*op, Phase::Unknown),
            Event::Fence { .. } => {
                let covered = self.covered_by(event);
                self.make_durable(&covered);
            }
            Event::PersistBegan { op, thread, offset, len, .. } => {
                let covered = self.covered_by_persist(*thread, *offset, *len);
                self.persists.insert(*op, covered);
            }
            Event::PersistDone { op, .. } => {
                let covered = self.persists.remove(op).unwrap_or_default();
                self.make_durable(&covered);
            }
            Event::PersistFailed { op } => {
                self.persists.remove(op);
                let completed = |version: &&mut Version| version.phase == Phase::Completed;
                for pending in self.pending.values_mut() {
                    pending.versions.iter_mut().filter(completed).for_each(|v| v.phase = Phase::Unknown);
                }
            }
            Event::Note(note) => self.notes.push(*note),
        }
    }

    /// Versions that `event` makes durable; empty for all but an effective fence or persist.
    pub(super) fn covered_by(&self, event: &Event) -> Covered {
        match event {
            Event::Fence { thread, .. } if self.model == SimModel::Pmem => {
                self.select(0..u64::MAX, |version| version.owner == Some(*thread))
            }
            Event::PersistDone { op, .. } => {
                let covered = self.persists.get(op).map(Vec::as_slice).unwrap_or_default();
                let still_pending = |(block, op): &&(u64, OpId)| {
                    self.pending.get(block).is_some_and(|p| p.versions.iter().any(|v| v.op == *op))
                };
                covered.iter().filter(still_pending).copied().collect()
            }
            _ => Vec::new(),
        }
    }

    fn covered_by_persist(&self, thread: ThreadTag, offset: u64, len: u64) -> Covered {
        let own_only = self.model == SimModel::Pmem;
        // What a dead process stored has left its write-combining buffers; flushing the lines is enough.
        let covers = |v: &Version| !own_only || v.owner.is_none() || v.owner == Some(thread);
        self.select(blocks_of(offset, len), covers)
    }

    fn select(&self, blocks: std::ops::Range<u64>, covers: impl Fn(&Version) -> bool) -> Covered {
        let mut covered = Vec::new();
        for (block, pending) in self.pending.range(blocks) {
            let done = pending.versions.iter().filter(|v| v.phase == Phase::Completed && covers(v));
            covered.extend(done.map(|version| (*block, version.op)));
        }
        covered
    }

    fn end_copy(&mut self, op: OpId, phase: Phase) {
        for block in self.in_flight.remove(&op).unwrap_or(0..0) {
            let Some(pending) = self.pending.get_mut(&block) else { continue };
            let Some(at) = pending.versions.iter().position(|version| version.op == op) else { continue };
            // The order of versions is the order of completion: only then does a read see the bytes.
            let mut version = pending.versions.remove(at);
            version.phase = phase;
            pending.versions.push(version);
            pending.choices = None;
        }
    }

    fn make_durable(&mut self, covered: &[(u64, OpId)]) {
        for (block, op) in covered {
            let Some(pending) = self.pending.get_mut(block) else { continue };
            let Some(at) = pending.versions.iter().position(|version| version.op == *op) else { continue };
            self.durable.set(*block, pending.versions[at].bytes.clone());
            // Older versions are gone for good, but for writes still under way: those may yet land on top.
            let mut position = 0;
            pending.versions.retain(|version| {
                position += 1;
                position > at + 1 || version.phase == Phase::InFlight
            });
            pending.choices = None;
            if pending.versions.is_empty() {
                self.pending.remove(block);
            }
        }
    }

    /// The pending blocks, each with what its units may hold.
    pub(super) fn choices(&mut self) -> Vec<(u64, Arc<BlockChoices>)> {
        let mut all = Vec::new();
        for (block, pending) in &mut self.pending {
            let choices = pending.choices(self.model, self.tear_unchanged, &self.durable.get(*block));
            if choices.unit_count() > 0 {
                all.push((*block, choices));
            }
        }
        all
    }

    /// First byte of `range` whose content after a crash is not certain.
    pub(super) fn first_uncertain(&mut self, range: &std::ops::Range<u64>) -> Option<u64> {
        let blocks = blocks_of(range.start, range.end.saturating_sub(range.start));
        for (block, pending) in self.pending.range_mut(blocks) {
            let choices = pending.choices(self.model, self.tear_unchanged, &self.durable.get(*block));
            let unit_bytes = self.model.unit_bytes() as u64;
            for unit in choices.units() {
                let from = block * BLOCK_BYTES + u64::from(unit) * unit_bytes;
                if from < range.end && from + unit_bytes > range.start {
                    return Some(from.max(range.start));
                }
            }
        }
        None
    }

    /// Whether a copy into `block` is under way.
    pub(super) fn is_in_flight(&self, block: u64) -> bool {
        let under_way = |version: &Version| version.phase == Phase::InFlight;
        self.pending.get(&block).is_some_and(|pending| pending.versions.iter().any(under_way))
    }

    /// Copies that have begun and not ended.
    pub(super) fn copies_in_flight(&self) -> Vec<OpId> {
        self.in_flight.keys().copied().collect()
    }

    /// What a process that dies now leaves behind: the durable content, and per block what is undecided as to
    /// power. `landed` says which part of each copy under way the kernel or the caches still carry out, in bytes
    /// from its beginning. What had completed on pmem is durable; see the module's fault model.
    pub(super) fn left_by_kill(
        &self,
        landed: impl Fn(OpId, u64) -> u64,
    ) -> (Content, Vec<(u64, Vec<LeftBehind>)>) {
        let mut durable = self.durable.clone();
        let mut left = Vec::new();
        for (block, pending) in &self.pending {
            let mut visible = self.durable.get(*block);
            let mut versions = Vec::new();
            // A copy under way lands after all that had completed.
            let under_way = |v: &&Version| v.phase == Phase::InFlight;
            let (late, early): (Vec<_>, Vec<_>) = pending.versions.iter().partition(under_way);
            for version in early {
                visible = version.bytes.clone();
                let persistable = version.phase == Phase::Completed;
                versions.push(LeftBehind { bytes: visible.clone(), persistable });
            }
            if self.model == SimModel::Pmem {
                versions.clear();
                durable.set(*block, visible.clone());
            }
            for version in late {
                let blocks = &self.in_flight[&version.op];
                let total = (blocks.end - blocks.start) * BLOCK_BYTES;
                let before = (block - blocks.start) * BLOCK_BYTES;
                let kept = landed(version.op, total).saturating_sub(before).min(BLOCK_BYTES) as usize;
                let mut mixed = visible.to_array();
                mixed[..kept].copy_from_slice(&version.bytes.bytes()[..kept]);
                visible = BlockBytes::owned(mixed);
                versions.push(LeftBehind { bytes: visible.clone(), persistable: true });
            }
            if !versions.is_empty() {
                left.push((*block, versions));
            }
        }
        (durable, left)
    }
}
