//! What happened on a simulated medium, in one order, with the bytes: the input of the enumerator and oracle.

use super::content::{BlockBytes, Content};
use crate::medium::Barrier;
use crate::sync::Arc;

/// What a crash may do to bytes that are not yet durable; see the fault model of [`crate::medium`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SimModel {
    /// Non-temporal stores to persistent memory: units of 8 bytes; a fence makes the calling thread's earlier
    /// stores durable, a persist does so within its range only.
    Pmem,
    /// A disk under O_DIRECT: units of 512 bytes. A persist covers the writes within its range that had
    /// completed when it began (`fdatasync` does more; the trait promises no more).
    Ssd {
        /// A sector that is not yet durable may also hold garbage: half old and half new, or noise.
        torn: bool,
    },
    /// A shared mapping of a file: as a disk that never tears.
    PageCache,
}

impl SimModel {
    /// Bytes that persist or get lost together.
    pub fn unit_bytes(self) -> usize {
        match self {
            SimModel::Pmem => 8,
            SimModel::Ssd { .. } | SimModel::PageCache => 512,
        }
    }
}

/// Names one copy or persist of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub(super) u64);

/// Names one thread of a trace, in order of first appearance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ThreadTag(pub u32);

/// What the test says has happened; the medium only keeps it in its place among the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Note {
    /// A save began.
    Issued {
        /// Its generation.
        generation: u64,
        /// Whatever lets the test know its payload again.
        fingerprint: u64,
    },
    /// A save was reported durable.
    Acknowledged {
        /// Its generation.
        generation: u64,
    },
    /// Checkpoints newer than this generation were reported discarded.
    Discarded {
        /// The newest generation that stays.
        newer_than: u64,
    },
    /// Anything else.
    Other {
        /// What it means to the test.
        label: &'static str,
        /// Its value.
        value: u64,
    },
}

/// One step of a trace.
#[derive(Clone)]
pub enum Event {
    /// From here on the bytes may be on the medium.
    Copy {
        /// This copy.
        op: OpId,
        /// Who stores or submits.
        thread: ThreadTag,
        /// First byte in the region.
        offset: u64,
        /// The bytes, whole blocks.
        data: Arc<[u8]>,
    },
    /// The copy is visible to every read, and a persist that begins later covers it.
    CopyCompleted {
        /// The copy.
        op: OpId,
    },
    /// The copy was reported failed: any of its units may be on the medium, and no persist covers them.
    CopyFailed {
        /// The copy.
        op: OpId,
    },
    /// A fence of the calling thread.
    Fence {
        /// Whose stores it orders.
        thread: ThreadTag,
        /// Why it was issued.
        barrier: Barrier,
    },
    /// A persist began: what has completed by now is what it covers.
    PersistBegan {
        /// This persist.
        op: OpId,
        /// Who called it.
        thread: ThreadTag,
        /// First byte of its range.
        offset: u64,
        /// Bytes in its range.
        len: u64,
        /// Why it was issued.
        barrier: Barrier,
    },
    /// The persist takes effect and returns.
    PersistDone {
        /// The persist.
        op: OpId,
        /// Why it was issued.
        barrier: Barrier,
    },
    /// The persist was reported failed: no later persist covers what was completed and not durable.
    PersistFailed {
        /// The persist.
        op: OpId,
    },
    /// Said by the test.
    Note(Note),
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Event::Copy { op, thread, offset, data } => {
                write!(f, "thread {} copies {} bytes to byte {offset} (op {})", thread.0, data.len(), op.0)
            }
            Event::CopyCompleted { op } => write!(f, "op {} completes", op.0),
            Event::CopyFailed { op } => write!(f, "op {} fails", op.0),
            Event::Fence { thread, barrier } => write!(f, "thread {} fences ({barrier:?})", thread.0),
            Event::PersistBegan { op, thread, offset, len, barrier } => {
                let end = offset + len;
                write!(f, "thread {} begins to persist {offset}..{end} ({barrier:?}, op {})", thread.0, op.0)
            }
            Event::PersistDone { op, barrier } => {
                write!(f, "persist takes effect ({barrier:?}, op {})", op.0)
            }
            Event::PersistFailed { op } => write!(f, "persist fails (op {})", op.0),
            Event::Note(note) => write!(f, "{note:?}"),
        }
    }
}

/// What a dead process wrote into one block: visible, not durable.
#[derive(Clone)]
pub(super) struct LeftBehind {
    pub(super) bytes: BlockBytes,
    /// Whether a persist makes it durable: not where one has failed on it before.
    pub(super) persistable: bool,
}

/// A region before the first event of a trace.
#[derive(Clone, Default)]
pub(super) struct Start {
    /// What cannot be lost any more.
    pub(super) durable: Content,
    /// What an earlier process wrote and nothing made durable, per block, oldest first.
    pub(super) pending: Vec<(u64, Vec<LeftBehind>)>,
    /// What was said in earlier lives of the region.
    pub(super) notes: Vec<Note>,
}

/// The whole history of one simulated medium.
#[derive(Clone)]
pub struct Trace {
    pub(super) len_bytes: u64,
    pub(super) model: SimModel,
    pub(super) start: Start,
    pub(super) events: Vec<Event>,
}

impl Trace {
    /// The steps, oldest first; errors of the oracle and points of the enumerator name them by index.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The model it was recorded under.
    pub fn model(&self) -> SimModel {
        self.model
    }

    /// The same steps judged by another model (for example a disk that tears).
    #[must_use]
    pub fn with_model(mut self, model: SimModel) -> Self {
        self.model = model;
        self
    }
}
