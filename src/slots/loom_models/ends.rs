//! How saves end that become no checkpoint, and that the next one gets their slots.

use super::{broken, change_by, explore, join, spawn, Claim, Region, Shipped, SlotTable, Verbs, PREEMPTIONS};
use crate::slots::word::{SlotState, SlotView, Word};
use crate::sync::atomic::Ordering;
use crate::sync::model::deadlocks;
use crate::sync::{Arc, Event};

/// How far a save has come when it ends, and how.
#[derive(Debug, Clone, Copy)]
enum End {
    /// Before its first byte.
    CancelledAtOnce,
    /// With bytes of it in the slot.
    CancelledLater,
    /// The medium refused a write: its slot is claimed last.
    WriteFailed,
    /// What it wrote may be lost: its slot is repaired before anybody claims it.
    FlushFailed,
    /// It is durable, and an older one makes room.
    Committed,
}

const ENDS: [End; 5] =
    [End::CancelledAtOnce, End::CancelledLater, End::WriteFailed, End::FlushFailed, End::Committed];

/// Gives up what the save of generation 11 has claimed.
fn end<V: Verbs>(region: &Region<V>, end: End, slot: u32) {
    if !matches!(end, End::CancelledAtOnce) {
        region.write(slot);
    }
    let owned = match end {
        End::CancelledAtOnce | End::CancelledLater => region.verbs.release(slot, 11),
        End::WriteFailed => region.table().release_last(slot, 11),
        End::FlushFailed => {
            let quarantined = region.table().quarantine(slot, 11);
            region.write(slot);
            quarantined && region.verbs.lift_quarantine(slot, 11)
        }
        End::Committed => {
            let committed = region.verbs.commit(slot, 11);
            region.verbs.reclaim();
            committed
        }
    };
    assert!(owned, "law: a slot being written stays its save's");
}

/// Law: whoever waits for a slot gets the one of a save that ends, and sees the end of that save's writes.
///
/// `end_first`: the order of ending and waking.
fn waiter_gets_the_slot<V: Verbs>(how: End, end_first: bool) {
    explore(PREEMPTIONS, move || {
        // What is committed makes room only for a newer one.
        let region = Region::<V>::new(&[(SlotState::Committed, 5), (SlotState::Free, 0)], true);
        let freed = Arc::new(Event::new());
        let slot = region.verbs.claim(11).expect("a slot is free").slot;
        let wakes = freed.clone();
        let ending = spawn(&region, move |region| {
            if !end_first {
                wakes.notify_all();
            }
            end(region, how, slot);
            if end_first {
                wakes.notify_all();
            }
        });
        let Claim { slot: claimed, .. } = loop {
            let ticket = freed.ticket();
            if let Some(claim) = region.verbs.claim(12) {
                break claim;
            }
            let _forever = freed.wait(ticket, None);
        };
        region.write(claimed);
        assert!(region.table().release(claimed, 12), "law: a slot being written stays its save's");
        join([ending]);
        let lost = |view: &SlotView| !matches!(view.state, SlotState::Free | SlotState::Committed);
        assert!(!region.table().views().iter().any(lost), "law: no slot is lost");
    });
}

#[test]
fn who_waits_for_a_slot_gets_it_however_its_save_ends() {
    ENDS.into_iter().for_each(|how| waiter_gets_the_slot::<Shipped>(how, true));
}

broken! {
    /// Gives a cancelled save's slot up without Release: its bytes may land in the next save's.
    UnorderedRelease {
        fn release(&self, slot: u32, generation: u64) -> bool {
            change_by(&self.0, slot, Ordering::Relaxed, |word| word.release(generation))
        }
    }
}

/// Without a wake-up, which would order the two by itself.
fn cancelled_then_claimed<V: Verbs>() {
    explore(PREEMPTIONS, || {
        let region = Region::<V>::new(&[(SlotState::Free, 0)], true);
        let slot = region.verbs.claim(11).expect("a slot is free").slot;
        let ending = spawn(&region, move |region| end(region, End::CancelledLater, slot));
        let next = spawn(&region, |region| {
            if let Some(Claim { slot, .. }) = region.verbs.claim(12) {
                region.write(slot);
            }
        });
        join([ending, next]);
    });
}

#[test]
fn a_cancelled_saves_bytes_come_before_the_next_ones() {
    cancelled_then_claimed::<Shipped>();
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_release_without_release_ordering_is_caught() {
    cancelled_then_claimed::<UnorderedRelease>();
}

broken! {
    /// Claims without Acquire: the last owner's bytes may land in this save's.
    UnorderedClaim {
        fn claim(&self, generation: u64) -> Option<Claim> {
            let claim = |word: Word| word.claim(generation, false);
            let mut slots = 0..self.0.words.len() as u32;
            let slot = slots.find(|&slot| change_by(&self.0, slot, Ordering::Relaxed, claim))?;
            Some(Claim { slot, previous_generation: 0 })
        }
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_claim_without_acquire_is_caught() {
    cancelled_then_claimed::<UnorderedClaim>();
}

#[test]
fn a_wake_up_before_the_slot_is_free_is_caught() {
    deadlocks("slots::loom_models::ends::a_wake_up_before_the_slot_is_free_is_caught", || {
        waiter_gets_the_slot::<Shipped>(End::CancelledLater, false);
    });
}

/// Law: a checkpoint that turns out to be damaged while it is read is repaired only when nobody reads it any more.
fn repaired_when_unread<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let region = Region::<V>::new(&[(SlotState::Committed, 5), (SlotState::Committed, 9)], watched);
        let reader = spawn(&region, |region| {
            if region.verbs.add_reader(0, 5) {
                region.read(0);
                let held = region.table().view(0);
                assert!(held.generation == 5, "law: a slot that is read is never reused: {held:?}");
                region.verbs.drop_reader(0, 5);
            }
        });
        let repairer = spawn(&region, |region| {
            let condemned = region.table().quarantine(0, 5);
            assert!(condemned, "nobody else takes it away");
            let _unless_read = region.verbs.lift_quarantine(0, 5);
        });
        if let Some(Claim { slot, .. }) = region.verbs.claim(11) {
            region.write(slot);
            assert!(region.verbs.release(slot, 11), "law: a slot being written stays its save's");
        }
        join([reader, repairer]);
        let state = region.table().view(0).state;
        let lifted = state == SlotState::Free || region.table().lift_quarantine(0, 5);
        assert!(lifted, "law: no slot is lost: {state:?}");
    });
}

#[test]
fn a_damaged_checkpoint_is_repaired_when_nobody_reads_it() {
    repaired_when_unread::<Shipped>(true);
}

broken! {
    /// Takes a quarantined slot back into use although it is read.
    RudeLift {
        fn lift_quarantine(&self, slot: u32, generation: u64) -> bool {
            let free = Word::of(&SlotView { state: SlotState::Free, generation: 0, readers: 0, pinned: false });
            let quarantined = |word: Word| word.view().state == SlotState::Quarantined;
            let mine = |word: Word| quarantined(word) && word.generation() == generation;
            change_by(&self.0, slot, Ordering::AcqRel, |word| mine(word).then_some(free))
        }
    }
}

#[test]
#[should_panic(expected = "law: a slot that is read is never reused")]
fn a_repair_without_a_look_at_the_readers_is_caught() {
    repaired_when_unread::<RudeLift>(false);
}
