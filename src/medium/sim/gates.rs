//! What a test can do to operations before they happen: hold them back, fail them.

use crate::medium::Barrier;

/// Which call of [`crate::medium::Medium`] is about to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttemptKind {
    /// `start` with `IoOp::Copy`.
    StartCopy,
    /// `start` with `IoOp::Read`.
    StartRead,
    /// `read`.
    Read,
    /// `copy`.
    Copy,
    /// `fence`; its range is empty.
    Fence,
    /// `persist`.
    Persist,
    /// `write_durable`.
    WriteDurable,
}

/// One call that is about to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Which call.
    pub kind: AttemptKind,
    /// First byte concerned.
    pub offset: u64,
    /// Bytes concerned.
    pub len: u64,
    /// Why, for the calls that say so.
    pub barrier: Option<Barrier>,
    /// How many attempts of this kind came before.
    pub nth: u64,
}

/// Names one gate made by [`super::SimMedium::hold`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HoldId(pub(super) u64);

type Caught = Box<dyn Fn(&Attempt) -> bool + Send>;
type Fault = Box<dyn FnMut(&Attempt) -> Option<i32> + Send>;

/// Gates and faults in force.
#[derive(Default)]
pub(super) struct Gates {
    attempts: [u64; 7],
    holds: Vec<(HoldId, Caught, usize)>,
    next_hold: u64,
    fault: Option<Fault>,
}

impl Gates {
    /// Numbers an attempt.
    pub(super) fn attempt(
        &mut self,
        kind: AttemptKind,
        (offset, len): (u64, u64),
        barrier: Option<Barrier>,
    ) -> Attempt {
        let nth = self.attempts[kind as usize];
        self.attempts[kind as usize] += 1;
        Attempt { kind, offset, len, barrier, nth }
    }

    pub(super) fn add_hold(&mut self, caught: Caught) -> HoldId {
        self.next_hold += 1;
        self.holds.push((HoldId(self.next_hold), caught, 0));
        HoldId(self.next_hold)
    }

    pub(super) fn remove_hold(&mut self, id: HoldId) {
        self.holds.retain(|(hold, ..)| *hold != id);
    }

    pub(super) fn is_held_by(&self, id: HoldId) -> bool {
        self.holds.iter().any(|(hold, ..)| *hold == id)
    }

    /// How many attempts the gate has caught; zero once it is gone.
    pub(super) fn caught(&self, id: HoldId) -> usize {
        self.holds.iter().find(|(hold, ..)| *hold == id).map_or(0, |(_, _, count)| *count)
    }

    /// The first gate that catches `attempt`.
    pub(super) fn catch(&mut self, attempt: &Attempt) -> Option<HoldId> {
        let (id, _, count) = self.holds.iter_mut().find(|(_, caught, _)| caught(attempt))?;
        *count += 1;
        Some(*id)
    }

    pub(super) fn set_fault(&mut self, fault: Option<Fault>) {
        self.fault = fault;
    }

    /// The error number that `attempt` is to fail with.
    pub(super) fn errno(&mut self, attempt: &Attempt) -> Option<i32> {
        self.fault.as_mut().and_then(|fault| fault(attempt))
    }
}
