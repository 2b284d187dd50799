//! Prevents: waiters that nobody wakes, and slots or buffers that nobody gives back, where saves are cancelled, fail, or are
//! cut short by closing the store.

use std::sync::Arc;

use pccheck::medium::sim::{Attempt, AttemptKind};
use pccheck::save::SaveOptions;
use pccheck::ErrorKind;
use shuttle::rand::{thread_rng, Rng};
use shuttle::thread;

use crate::judge::lose_power;
use crate::saves::saver;
use crate::schedules::explore;
use crate::world::{label, prepare, together, Flying, Setup, Work, World};

/// It became durable, or was cancelled.
fn ended_or_cancelled(flying: &Flying) {
    if let Err(error) = flying.ended() {
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    }
}

/// Begins a save and takes it back some time later.
fn canceller(step: u64) -> Work {
    Box::new(move |world| {
        let flying = world.begin(step);
        (0..thread_rng().gen_range(0..30)).for_each(|_| thread::yield_now());
        flying.save.cancel();
        ended_or_cancelled(&flying);
    })
}

/// Begins a save that is to be confirmed, and confirms it or takes it back.
fn doubter(step: u64) -> Work {
    Box::new(move |world| {
        let options = SaveOptions { wait: None, confirm: true, ..SaveOptions::default() };
        let flying = world.begin_with(step, options).expect("begin");
        match thread_rng().gen() {
            true => {
                world.say(label::CONFIRMING, step);
                flying.save.confirm().expect("nothing has ended it");
                flying.durable();
            }
            false => {
                flying.save.cancel();
                assert!(flying.ended().is_err_and(|error| error.kind() == ErrorKind::Cancelled));
            }
        }
    })
}

/// Saves are taken back while others wait for their slots.
pub fn cancelled_saves(setup: Setup) -> impl Fn() + Send + Sync + 'static {
    prepare(setup);
    move || {
        let world = World::open(setup);
        together(&world, vec![canceller(10), canceller(11), doubter(12), saver(20..23)]);
        world.finish();
    }
}

#[test]
fn a_cancelled_save_leaves_no_waiter_behind() {
    let setup = Setup::tight(2, 1);
    explore("a_cancelled_save_leaves_no_waiter_behind", cancelled_saves(setup));
}

/// Saves whose ends are not foreseen.
fn hopeful_saver(steps: std::ops::Range<u64>) -> Work {
    Box::new(move |world| {
        let begun: Vec<Flying> = steps.filter_map(|step| world.begin_with(step, None.into()).ok()).collect();
        for flying in begun {
            if let Err(error) = flying.ended() {
                let expected = matches!(error.kind(), ErrorKind::Io | ErrorKind::DurabilityUnknown);
                assert!(expected, "law: a save says what the medium said: {error}");
            }
        }
    })
}

/// Which call is to fail, once.
fn failing() -> (u64, impl Fn(&Attempt) -> bool) {
    let kinds = [AttemptKind::StartCopy, AttemptKind::Persist, AttemptKind::WriteDurable];
    let kind = kinds[thread_rng().gen_range(0..kinds.len())];
    (thread_rng().gen_range(0..6), move |attempt: &Attempt| attempt.kind == kind)
}

#[test]
fn a_failing_medium_fails_saves_and_nothing_else() {
    // As many more as one failed flush takes out of use.
    let setup = Setup { slots: 5, ..Setup::tight(2, 1) };
    prepare(setup);
    explore("a_failing_medium_fails_saves_and_nothing_else", move || {
        let world = World::open(setup);
        world.begin(1).durable();
        let (nth, picks) = failing();
        let mut seen = 0;
        world.sim.fail(move |attempt| {
            let picked = picks(attempt);
            let fails = picked && seen == nth;
            seen += u64::from(picked);
            fails.then_some(libc::EIO)
        });
        together(&world, vec![hopeful_saver(10..13), hopeful_saver(20..22)]);
        world.sim.stop_failing();
        world.store.drain(None).expect("drain");
        assert!(world.read_newest().is_some(), "law: the checkpoint before stays");
        let quarantined = world.store.stats().quarantined_slots;
        assert_eq!(world.store.repair(None).expect("repair"), quarantined);
        together(&world, vec![saver(30..33), saver(40..42)]);
        world.finish();
    });
}

/// The store is closed while saves are in flight and others wait for them.
fn closing(setup: Setup) -> impl Fn() + Send + Sync + 'static {
    prepare(setup);
    move || {
        let world = World::open(setup);
        let flying: Vec<Flying> = (10..13).map(|step| world.begin(step)).collect();
        let saves: Vec<_> = flying.iter().map(|flying| flying.save.clone()).collect();
        let waiters: Vec<_> =
            flying.into_iter().map(|flying| thread::spawn(move || ended_or_cancelled(&flying))).collect();
        (0..thread_rng().gen_range(0..30)).for_each(|_| thread::yield_now());
        let World { store, sim, setup } = Arc::into_inner(world).expect("nobody else has it");
        let pool = store.region().pool().clone();
        drop(store);
        assert!(saves.iter().all(|save| save.progress().ended), "law: who closes finds every save ended");
        assert_eq!(pool.free_count(), pool.buffer_count(), "law: no buffer is lost");
        waiters.into_iter().for_each(|waiter| waiter.join().expect("waiter"));
        lose_power(&setup, &sim);
    }
}

#[test]
fn closing_in_mid_save_ends_every_save() {
    explore("closing_in_mid_save_ends_every_save", closing(Setup::tight(3, 1)));
}
