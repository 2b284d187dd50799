//! What keeps a checkpoint while slots are reused: that it is opened, held for other ranks, or being discarded.

use super::{broken, change_by, explore, join, spawn, Claim, Region, Shipped, SlotTable, Verbs, PREEMPTIONS};
use crate::slots::word::{SlotState, SlotView, Word};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::Arc;

/// Which generation's bytes a slot holds. Not loom's: what an access may see is the business of the watched cells.
type Bytes = Arc<Vec<std::sync::atomic::AtomicU64>>;

fn bytes_of(generations: &[u64]) -> Bytes {
    Arc::new(generations.iter().map(|&generation| generation.into()).collect())
}

/// Law: what is opened is what was listed, although its slot may be reclaimed, claimed and committed in between.
fn opened_is_what_was_listed<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let region = Region::<V>::new(&[(SlotState::Committed, 1), (SlotState::Free, 0)], watched);
        let bytes = bytes_of(&[1, 0]);
        let written = bytes.clone();
        let saver = spawn(&region, move |region| {
            for generation in [2, 3] {
                let Some(Claim { slot, .. }) = region.verbs.claim(generation) else { continue };
                region.write(slot);
                written[slot as usize].store(generation, Ordering::Relaxed);
                assert!(region.verbs.commit(slot, generation), "law: a slot being written stays its save's");
                region.verbs.reclaim();
            }
        });
        let reader = spawn(&region, move |region| {
            let (slot, generation) = region.table().newest().expect("law: a newest checkpoint always exists");
            if region.verbs.add_reader(slot, generation) {
                region.read(slot);
                let found = bytes[slot as usize].load(Ordering::Relaxed);
                assert_eq!(found, generation, "law: what is opened is what was listed");
                region.verbs.drop_reader(slot, generation);
            }
        });
        join([saver, reader]);
    });
}

#[test]
fn what_is_opened_is_what_was_listed() {
    opened_is_what_was_listed::<Shipped>(true);
}

broken! {
    /// Reads whatever checkpoint the slot holds by now.
    BlindReader {
        fn add_reader(&self, slot: u32, _generation: u64) -> bool {
            change_by(&self.0, slot, Ordering::AcqRel, |word| word.add_reader(word.generation()))
        }
        fn drop_reader(&self, slot: u32, _generation: u64) {
            change_by(&self.0, slot, Ordering::AcqRel, |word| word.drop_reader(word.generation()));
        }
    }
}

#[test]
#[should_panic(expected = "law: what is opened is what was listed")]
fn an_opening_without_a_look_at_the_generation_is_caught() {
    opened_is_what_was_listed::<BlindReader>(false);
}

broken! {
    /// Takes the listing for leave to read.
    UnregisteredReader {
        fn add_reader(&self, _slot: u32, _generation: u64) -> bool {
            true
        }
        fn drop_reader(&self, _slot: u32, _generation: u64) {}
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_opening_that_registers_no_reader_is_caught() {
    opened_is_what_was_listed::<UnregisteredReader>(true);
}

broken! {
    /// Opens without Acquire: the save's bytes may be seen late.
    UnorderedReader {
        fn add_reader(&self, slot: u32, generation: u64) -> bool {
            change_by(&self.0, slot, Ordering::Relaxed, |word| word.add_reader(generation))
        }
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn an_opening_without_acquire_is_caught() {
    // The listing takes the table's lock and looks at every word with Acquire, which would order the bytes as well.
    explore(PREEMPTIONS, || {
        let region = Region::<UnorderedReader>::new(&[(SlotState::Committed, 1), (SlotState::Free, 0)], true);
        let saver = spawn(&region, |region| {
            let Claim { slot, .. } = region.verbs.claim(2).expect("a slot is free");
            region.write(slot);
            assert!(region.verbs.commit(slot, 2));
        });
        let reader = spawn(&region, |region| {
            if region.verbs.add_reader(1, 2) {
                region.read(1);
                region.verbs.drop_reader(1, 2);
            }
        });
        join([saver, reader]);
    });
}

broken! {
    /// Closes without Release: the next save's bytes may be there before the last look at the old ones.
    UnorderedClose {
        fn drop_reader(&self, slot: u32, generation: u64) {
            change_by(&self.0, slot, Ordering::Relaxed, |word| word.drop_reader(generation));
        }
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_closing_without_release_is_caught() {
    opened_is_what_was_listed::<UnorderedClose>(true);
}

/// Law: a checkpoint that is held stays until a newer one is marked, whoever commits and reclaims meanwhile.
fn held_for_others_stays<V: Verbs>() {
    explore(PREEMPTIONS, || {
        let slots = [(SlotState::Committed, 1), (SlotState::Free, 0), (SlotState::Free, 0)];
        let region = Region::<V>::new(&slots, true);
        let mark = Arc::new(AtomicU64::new(1));
        let floor = mark.clone();
        let saver = spawn(&region, move |region| {
            for generation in [2, 3] {
                let Claim { slot, .. } =
                    region.verbs.claim(generation).expect("three slots, three checkpoints");
                region.write(slot);
                assert!(region.verbs.commit(slot, generation));
                region.verbs.reclaim_held(floor.load(Ordering::Acquire));
            }
        });
        let raised = mark.clone();
        let marker = spawn(&region, move |region| {
            if region.table().views().iter().any(|view| view.generation == 2) {
                raised.store(2, Ordering::Release);
                region.verbs.reclaim_held(2);
            }
        });
        let watcher = spawn(&region, move |region| {
            let view = region.table().view(0);
            // The mark only moves up: what it is now covers whatever was freed before.
            let marked = mark.load(Ordering::Acquire);
            let stays = view.state == SlotState::Committed && view.generation == 1;
            assert!(stays || marked > 1, "law: a held checkpoint stays ({view:?}, marked {marked})");
        });
        join([saver, marker, watcher]);
    });
}

#[test]
fn a_held_checkpoint_stays_until_a_newer_one_is_marked() {
    held_for_others_stays::<Shipped>();
}

broken! {
    /// Reclaims as if nothing were held.
    HeedlessReclaim {
        fn reclaim_held(&self, _floor: u64) {
            let _freed = self.0.reclaim(1, None);
        }
    }
}

#[test]
#[should_panic(expected = "law: a held checkpoint stays")]
fn a_reclaim_without_a_look_at_the_mark_is_caught() {
    held_for_others_stays::<HeedlessReclaim>();
}

/// Law: while a checkpoint is being discarded nobody reads, pins or claims it; where the discard fails it is as before.
fn withheld_is_out_of_reach<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let region = Region::<V>::new(&[(SlotState::Committed, 5), (SlotState::Committed, 9)], watched);
        let discarder = spawn(&region, |region| {
            if let Some(was_committed) = region.verbs.withhold(0, 5) {
                region.write(0);
                region.table().give_back(0, 5, was_committed);
            }
        });
        let keeper = spawn(&region, |region| {
            if region.verbs.add_reader(0, 5) {
                region.read(0);
                let held = region.table().view(0);
                assert!(held.state == SlotState::Committed, "law: what is read is not discarded: {held:?}");
                region.verbs.drop_reader(0, 5);
            }
            if region.table().pin(0, 5) {
                assert!(region.table().unpin(0, 5), "law: a pin stays until it is taken away");
            }
        });
        region.verbs.reclaim();
        if let Some(Claim { slot, .. }) = region.verbs.claim(11) {
            region.write(slot);
            assert!(region.verbs.release(slot, 11), "law: a slot being written stays its save's");
        }
        join([discarder, keeper]);
        let SlotView { state, readers, pinned, .. } = region.table().view(0);
        assert!(matches!(state, SlotState::Committed | SlotState::Free), "law: no slot is lost: {state:?}");
        assert!(readers == 0 && !pinned);
    });
}

#[test]
fn a_checkpoint_that_is_being_discarded_is_out_of_reach() {
    withheld_is_out_of_reach::<Shipped>(true);
}

broken! {
    /// Discards what is being read.
    RudeWithhold {
        fn withhold(&self, slot: u32, generation: u64) -> Option<bool> {
            let quarantined = |word: Word| word.quarantine(generation);
            change_by(&self.0, slot, Ordering::AcqRel, quarantined).then_some(true)
        }
    }
}

#[test]
#[should_panic(expected = "law: what is read is not discarded")]
fn a_discard_without_a_look_at_the_readers_is_caught() {
    withheld_is_out_of_reach::<RudeWithhold>(false);
}
