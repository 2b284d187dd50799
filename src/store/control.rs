//! The control block in use: generation lease, pins, quarantines, discards and the global mark.
//!
//! Every change is one new block with the next sequence number, written durably over the *older* of the two
//! copies, so that a crash at any point leaves one valid block: the old one or the new one.

use crate::error::Result;
use crate::format::{Control, GlobalMark, SlotMark, Uuid, CONTROL_OFFSETS, MAX_GENERATION};
use crate::format::{MARK_DISCARDED, MARK_PINNED, MARK_QUARANTINED};
use crate::medium::{Barrier, Medium};

/// Generations leased by one control write: a crash skips at most this many.
pub(crate) const LEASE_GENERATIONS: u64 = 1024;

/// The current control block and where it stands.
pub(crate) struct ControlState {
    current: Control,
    copy: usize,
    uuid: Uuid,
    /// `current` was found on the medium.
    adopted: bool,
}

impl ControlState {
    /// Continues from what recovery found; a region whose control blocks are both lost starts a new sequence.
    pub(crate) fn adopt(uuid: Uuid, found: Option<(Control, usize)>) -> Self {
        let adopted = found.is_some();
        let (current, copy) = found.unwrap_or_else(|| (Control::initial(), 1));
        ControlState { current, copy, uuid, adopted }
    }

    pub(crate) fn current(&self) -> &Control {
        &self.current
    }

    /// Writes the changed block durably; on failure the old one stays in force.
    pub(crate) fn update(&mut self, medium: &dyn Medium, change: impl FnOnce(&mut Control)) -> Result<()> {
        let mut next = self.current.clone();
        change(&mut next);
        next.sequence = self.current.next_sequence()?;
        let copy = 1 - self.copy;
        medium.write_durable(CONTROL_OFFSETS[copy], &next.encode(&self.uuid)?, Barrier::Control)?;
        self.current = next;
        self.copy = copy;
        Ok(())
    }

    /// Writes the block that recovery adopted again, in its place. It may be one whose flush failed in an
    /// earlier process: visible, and lost at power loss. The next update goes over the other copy, which is then
    /// the only durable one.
    pub(crate) fn make_durable_again(&self, medium: &dyn Medium) -> Result<()> {
        // A region without a valid block has nothing to adopt.
        match self.adopted {
            true => medium.write_durable(
                CONTROL_OFFSETS[self.copy],
                &self.current.encode(&self.uuid)?,
                Barrier::Adopt,
            ),
            false => Ok(()),
        }
    }

    /// Leases generations beyond `next`; returns the ceiling below which generations may now be used.
    pub(crate) fn lease(&mut self, medium: &dyn Medium, next: u64) -> Result<u64> {
        // Never lower than what another thread may have leased meanwhile.
        let ceiling = (next + LEASE_GENERATIONS).min(MAX_GENERATION).max(self.current.generation_ceiling);
        self.update(medium, |control| control.generation_ceiling = ceiling)?;
        Ok(ceiling)
    }
}

/// Flags of `(slot, generation)`, 0 where unmarked.
pub(crate) fn flags_of(control: &Control, slot: u32, generation: u64) -> u32 {
    control
        .marks
        .iter()
        .find(|mark| mark.slot == slot && mark.generation == generation)
        .map_or(0, |mark| mark.flags)
}

/// Sets the flags of `(slot, generation)`; 0 removes the entry.
///
/// A slot has one entry. An entry of another generation is replaced, but for
///
/// - a discard when a quarantine arrives: the discarded record may still be on the medium (the failed save may never
///   have replaced it) and must not come back to life;
/// - a pin when something of an older generation arrives: a pin is written once its save has durably replaced the older
///   record, so that there is nothing left to say of that. (A discard names its records before it gets here.)
pub(crate) fn set_flags(control: &mut Control, slot: u32, generation: u64, flags: u32) {
    let keeps_discard = control.marks.iter().any(|mark| {
        mark.slot == slot
            && mark.generation != generation
            && mark.flags & MARK_DISCARDED != 0
            && flags & MARK_QUARANTINED != 0
    });
    let keeps_pin = control
        .marks
        .iter()
        .any(|mark| mark.slot == slot && mark.generation > generation && mark.flags & MARK_PINNED != 0);
    if keeps_discard || keeps_pin {
        return;
    }
    if flags != 0 {
        control.marks.retain(|mark| mark.slot != slot);
        control.marks.push(SlotMark { slot, generation, flags });
    } else {
        control.marks.retain(|mark| mark.slot != slot || mark.generation != generation);
    }
}

/// The global mark's generation, 0 where nothing is marked.
pub(crate) fn global_generation(control: &Control) -> u64 {
    control.global.as_ref().map_or(0, |GlobalMark { generation, .. }| *generation)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(marks: &[(u32, u64, u32)]) -> Control {
        let mark = |&(slot, generation, flags)| SlotMark { slot, generation, flags };
        Control { marks: marks.iter().map(mark).collect(), ..Control::initial() }
    }

    #[test]
    fn a_slots_one_entry_is_the_one_that_still_says_something() {
        // What was there, what arrives, what stays.
        let cases = [
            ((3, 5, MARK_PINNED), (3, 8, MARK_PINNED), (3, 8, MARK_PINNED)),
            ((3, 5, MARK_DISCARDED), (3, 8, MARK_PINNED), (3, 8, MARK_PINNED)),
            ((3, 5, MARK_DISCARDED), (3, 8, MARK_QUARANTINED), (3, 5, MARK_DISCARDED)),
            ((3, 8, MARK_QUARANTINED), (3, 5, MARK_DISCARDED), (3, 5, MARK_DISCARDED)),
            ((3, 8, MARK_PINNED), (3, 5, MARK_DISCARDED), (3, 8, MARK_PINNED)),
            ((3, 8, MARK_PINNED), (3, 8, MARK_DISCARDED), (3, 8, MARK_DISCARDED)),
            ((3, 8, MARK_PINNED), (3, 8, MARK_QUARANTINED), (3, 8, MARK_QUARANTINED)),
        ];
        for (before, (slot, generation, flags), after) in cases {
            let mut changed = control(&[before, (4, 1, MARK_PINNED)]);
            set_flags(&mut changed, slot, generation, flags);
            changed.marks.sort_by_key(|mark| mark.slot);
            assert_eq!(changed.marks, control(&[after, (4, 1, MARK_PINNED)]).marks, "{before:?}");
        }
        let mut unpinned = control(&[(3, 8, MARK_PINNED)]);
        set_flags(&mut unpinned, 3, 5, 0);
        assert_eq!(unpinned.marks.len(), 1, "an entry of another generation is not removed");
        set_flags(&mut unpinned, 3, 8, 0);
        assert_eq!(unpinned.marks, []);
    }
}
