//! The table against a plain model: any sequence of calls gives the same answers and the same slots.

use super::*;
use crate::slots::SlotState;
use crate::sync::atomic::{AtomicBool, AtomicU32};
use crate::sync::{thread, Arc};
use proptest::prelude::*;

fn view(state: SlotState, generation: u64) -> SlotView {
    SlotView { state, generation, readers: 0, pinned: false }
}

/// The specification, slow and plain.
#[derive(Debug)]
struct Model(Vec<SlotView>);

impl Model {
    fn idle(slot: &SlotView) -> bool {
        slot.readers == 0 && !slot.pinned
    }

    fn newest_first(&self) -> Vec<u64> {
        let committed = self.0.iter().filter(|slot| slot.state == SlotState::Committed);
        let mut generations: Vec<u64> = committed.map(|slot| slot.generation).collect();
        generations.sort_by_key(|&generation| std::cmp::Reverse(generation));
        generations
    }

    fn reclaimable(&self, keep: usize, hold: Option<u64>) -> Vec<u32> {
        let kept: Vec<u64> = self.newest_first().into_iter().take(keep.max(1)).collect();
        (0u32..)
            .zip(&self.0)
            .filter(|(_, slot)| slot.state == SlotState::Committed && Self::idle(slot))
            .filter(|(_, slot)| !kept.contains(&slot.generation))
            .filter(|(_, slot)| hold.is_none_or(|floor| slot.generation < floor))
            .map(|(index, _)| index)
            .collect()
    }

    fn claim(&mut self, generation: u64, pinned: bool) -> Option<Claim> {
        let free = (0u32..).zip(&self.0).filter(|(_, slot)| slot.state == SlotState::Free);
        let (slot, previous_generation) =
            free.map(|(index, slot)| (index, slot.generation)).min_by_key(|&(index, old)| (old, index))?;
        self.0[slot as usize] = SlotView { pinned, ..view(SlotState::Writing, generation) };
        Some(Claim { slot, previous_generation })
    }
}

#[derive(Debug, Clone)]
enum Op {
    Claim(bool),
    Commit(u8),
    Release(u8),
    ReleaseLast(u8),
    Quarantine(u8),
    Lift(u8),
    Reclaim(usize, Option<u8>),
    Pin(u8),
    Unpin(u8),
    AddReader(u8),
    DropReader(u8),
    Discard(u8),
    StaleGeneration(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let slot = any::<u8>;
    prop_oneof![
        6 => any::<bool>().prop_map(Op::Claim),
        5 => slot().prop_map(Op::Commit),
        1 => slot().prop_map(Op::Release),
        1 => slot().prop_map(Op::ReleaseLast),
        1 => slot().prop_map(Op::Quarantine),
        1 => slot().prop_map(Op::Lift),
        4 => (0usize..4, prop::option::weighted(0.3, slot())).prop_map(|(keep, hold)| Op::Reclaim(keep, hold)),
        1 => slot().prop_map(Op::Pin),
        1 => slot().prop_map(Op::Unpin),
        2 => slot().prop_map(Op::AddReader),
        2 => slot().prop_map(Op::DropReader),
        1 => slot().prop_map(Op::Discard),
        1 => slot().prop_map(Op::StaleGeneration),
    ]
}

proptest! {
    #[test]
    fn behaves_as_the_model(slots in 1usize..9, ops in prop::collection::vec(op(), 0..200)) {
        let table = SlotTable::new(&vec![view(SlotState::Free, 0); slots]);
        let mut model = Model(vec![view(SlotState::Free, 0); slots]);
        let mut next_generation = 1;
        for op in ops {
            let at = |slot: u8| usize::from(slot) % slots;
            match op.clone() {
                Op::Claim(pin) => {
                    prop_assert_eq!(table.claim(next_generation, pin), model.claim(next_generation, pin));
                    next_generation += 1;
                }
                Op::Commit(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Writing;
                    prop_assert_eq!(table.commit(index, it.generation), allowed);
                    if allowed {
                        it.state = SlotState::Committed;
                    }
                }
                Op::Release(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Writing;
                    prop_assert_eq!(table.release(index, it.generation), allowed);
                    if allowed {
                        *it = view(SlotState::Free, 0);
                    }
                }
                Op::ReleaseLast(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Writing;
                    prop_assert_eq!(table.release_last(index, it.generation), allowed);
                    if allowed {
                        *it = view(SlotState::Free, it.generation);
                    }
                }
                Op::Quarantine(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = matches!(it.state, SlotState::Writing | SlotState::Committed);
                    prop_assert_eq!(table.quarantine(index, it.generation), allowed);
                    if allowed {
                        it.pinned &= it.state == SlotState::Committed;
                        it.state = SlotState::Quarantined;
                    }
                }
                Op::Lift(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Quarantined && Model::idle(it);
                    prop_assert_eq!(table.lift_quarantine(index, it.generation), allowed);
                    if allowed {
                        *it = view(SlotState::Free, 0);
                    }
                }
                Op::Reclaim(keep, hold) => {
                    let hold = hold.map(|floor| u64::from(floor) % (next_generation + 1));
                    let expected = model.reclaimable(keep, hold);
                    let serves = |it: &&SlotView| {
                        matches!(it.state, SlotState::Free | SlotState::Writing) && !it.pinned
                    };
                    let serving = model.0.iter().filter(serves).count();
                    prop_assert_eq!(table.claimable_count(keep, hold), serving + expected.len());
                    let freed = table.reclaim(keep, hold);
                    let generation = |&slot: &u32| (slot, model.0[slot as usize].generation);
                    prop_assert_eq!(freed, expected.iter().map(generation).collect::<Vec<_>>());
                    for slot in expected {
                        model.0[slot as usize].state = SlotState::Free;
                    }
                }
                Op::Pin(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Committed;
                    prop_assert_eq!(table.pin(index, it.generation), allowed);
                    it.pinned |= allowed;
                }
                Op::Unpin(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = matches!(it.state, SlotState::Committed | SlotState::Quarantined);
                    prop_assert_eq!(table.unpin(index, it.generation), allowed);
                    it.pinned &= !allowed;
                }
                Op::AddReader(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Committed;
                    prop_assert_eq!(table.add_reader(index, it.generation), allowed);
                    it.readers += u32::from(allowed);
                }
                Op::DropReader(slot) => {
                    let it = &mut model.0[at(slot)];
                    if it.readers > 0 {
                        table.drop_reader(at(slot) as u32, it.generation);
                        it.readers -= 1;
                    }
                }
                Op::Discard(slot) => {
                    let (index, it) = (at(slot) as u32, &mut model.0[at(slot)]);
                    let allowed = it.state == SlotState::Committed && Model::idle(it);
                    prop_assert_eq!(table.discard(index, it.generation), allowed);
                    if allowed {
                        *it = view(SlotState::Free, 0);
                    }
                }
                Op::StaleGeneration(slot) => {
                    let (slot, other) = (at(slot) as u32, model.0[at(slot)].generation + 1);
                    let changed = table.commit(slot, other)
                        | table.release(slot, other)
                        | table.quarantine(slot, other)
                        | table.lift_quarantine(slot, other)
                        | table.pin(slot, other)
                        | table.unpin(slot, other)
                        | table.add_reader(slot, other)
                        | table.discard(slot, other);
                    prop_assert!(!changed, "a call for another generation changed slot {}", slot);
                }
            }
            prop_assert_eq!(table.views(), model.0.clone(), "after {:?}", op);
            let newest = table.newest().map(|(_, generation)| generation);
            prop_assert_eq!(newest, model.newest_first().first().copied());
        }
    }
}

#[test]
fn claims_the_oldest_content_first() {
    let table = SlotTable::new(&[5, 3, 0, 4].map(|old| view(SlotState::Free, old)));
    let order: Vec<u64> =
        (10..14).filter_map(|g| table.claim(g, false)).map(|claim| claim.previous_generation).collect();
    assert_eq!(order, [0, 3, 4, 5]);
    assert_eq!(table.claim(14, false), None);
}

#[test]
fn a_slot_that_does_not_exist_is_refused() {
    let table = SlotTable::new(&[]);
    assert!(table.is_empty() && table.claim(1, false).is_none() && table.newest().is_none());
    assert!(!table.commit(0, 1) && !table.add_reader(7, 1));
}

/// Many threads save while others read the newest: the laws of the loom models, at full speed.
#[test]
fn laws_hold_under_load() {
    const SAVERS: u32 = 3;
    const SAVES_EACH: u64 = 3000;
    let slots = SAVERS as usize + 2;
    let mut views = vec![view(SlotState::Free, 0); slots];
    views[0] = view(SlotState::Committed, 1);
    let table = Arc::new(SlotTable::new(&views));
    let owners: Arc<Vec<AtomicU32>> = Arc::new((0..slots).map(|_| AtomicU32::new(0)).collect());
    let next_generation = Arc::new(AtomicU64::new(2));
    let done = Arc::new(AtomicBool::new(false));

    let reader = {
        let (table, done) = (Arc::clone(&table), Arc::clone(&done));
        thread::spawn(move || {
            let mut last = 1;
            while !done.load(Ordering::Acquire) {
                let (slot, generation) = table.newest().expect("a newest checkpoint always exists");
                assert!(generation >= last, "the newest went back from {last} to {generation}");
                last = generation;
                if table.add_reader(slot, generation) {
                    thread::yield_now();
                    let held = table.view(slot);
                    assert_eq!(held.generation, generation, "slot {slot} was reused while read");
                    table.drop_reader(slot, generation);
                }
            }
        })
    };
    let savers: Vec<_> = (1..=SAVERS)
        .map(|me| {
            let (table, owners, next_generation) =
                (Arc::clone(&table), Arc::clone(&owners), Arc::clone(&next_generation));
            thread::spawn(move || {
                let mut saved = 0;
                while saved < SAVES_EACH {
                    let generation = next_generation.fetch_add(1, Ordering::AcqRel);
                    let Some(claim) = table.claim(generation, false) else {
                        table.reclaim(1, None);
                        continue;
                    };
                    let owner = &owners[claim.slot as usize];
                    assert_eq!(owner.swap(me, Ordering::AcqRel), 0, "slot {} has two owners", claim.slot);
                    assert_eq!(owner.swap(0, Ordering::AcqRel), me, "slot {} has two owners", claim.slot);
                    assert!(table.commit(claim.slot, generation));
                    table.reclaim(1, None);
                    saved += 1;
                }
            })
        })
        .collect();
    for saver in savers {
        saver.join().expect("saver");
    }
    done.store(true, Ordering::Release);
    reader.join().expect("reader");
    table.reclaim(1, None);
    assert_eq!(table.claimable_count(1, None), slots - 1, "a slot leaked");
}
