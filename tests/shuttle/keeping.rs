//! Prevents: checkpoints that are overwritten while they are read, pinned or held, and discarded ones that come back.

use pccheck::engine::Select;
use pccheck::save::SaveOptions;
use pccheck::{Error, ErrorKind};
use shuttle::sync::mpsc::channel;
use shuttle::thread;

use crate::saves::{reader, saver};
use crate::schedules::explore;
use crate::world::{both, check, label, prepare, together, Flying, Setup, Work, World, RUN_ID};

/// Opens the newest, and reads it while others save.
fn long_reader() -> Work {
    Box::new(|world| {
        let opened =
            world.store.open_checkpoint(Select::Newest, true).expect("law: the newest can be opened");
        let first = check(&opened.checkpoint);
        assert_eq!(check(&opened.checkpoint), first);
    })
}

#[test]
fn a_checkpoint_that_is_read_stays_in_the_tightest_region() {
    let setup = Setup::tight(2, 1);
    prepare(setup);
    explore("a_checkpoint_that_is_read_stays_in_the_tightest_region", move || {
        let world = World::open(setup);
        world.begin(1).durable();
        // What the reader protects is the slot that one of the saves waits for.
        together(&world, vec![saver(10..13), saver(20..22), long_reader()]);
        world.finish();
    });
}

/// Gone meanwhile, or refused: others are reading or pinned.
fn may_be_refused(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NoSlot)
}

/// A pin may lose the race for its checkpoint; one that was reported durable keeps it.
fn pinner() -> Work {
    Box::new(|world| {
        for _ in 0..2 {
            // A pin is not counted: two threads that pin one checkpoint would lift each other's.
            let listed = world.store.checkpoints().expect("list");
            let theirs = |step: u64| step == PINNED_STEP;
            let Some(found) = listed.into_iter().find(|found| !theirs(found.record.step)) else { continue };
            let record = found.record;
            match world.store.pin(record.generation) {
                Ok(()) => world.say(label::PINNED, record.step),
                Err(error) => {
                    assert!(may_be_refused(&error), "{error}");
                    continue;
                }
            }
            keep_for_a_while(world, record.generation, record.step);
        }
    })
}

/// The step of the save that is to be pinned.
const PINNED_STEP: u64 = 20;

fn pinned_saver() -> Work {
    let step = PINNED_STEP;
    Box::new(move |world| {
        match world.begin_with(step, SaveOptions { wait: None, pin: true, ..SaveOptions::default() }) {
            Ok(flying) => keep_for_a_while(world, flying.durable().generation, step),
            Err(error) => {
                assert!(may_be_refused(&error), "{error}");
                world.say(label::UNPINNING, step);
            }
        }
    })
}

fn keep_for_a_while(world: &World, generation: u64, step: u64) {
    for _ in 0..2 {
        let opened = world.store.open_checkpoint(Select::Generation(generation), false);
        let opened = opened.unwrap_or_else(|error| panic!("law: a pinned checkpoint stays: {error}"));
        assert_eq!(check(&opened.checkpoint), (generation, step));
    }
    world.say(label::UNPINNING, step);
    world.store.unpin(generation).expect("unpin");
}

#[test]
fn a_pinned_checkpoint_stays_until_it_is_unpinned() {
    let setup = Setup { slots: 5, ..Setup::tight(2, 1) };
    prepare(setup);
    explore("a_pinned_checkpoint_stays_until_it_is_unpinned", move || {
        let world = World::open(setup);
        world.begin(1).durable();
        together(&world, vec![saver(10..13), pinned_saver(), pinner(), reader(1)]);
        world.finish();
    });
}

#[test]
fn a_held_checkpoint_stays_until_a_newer_one_is_durable_everywhere() {
    let setup = Setup { slots: 4, hold: true, ..Setup::tight(2, 1) };
    prepare(setup);
    explore("a_held_checkpoint_stays_until_a_newer_one_is_durable_everywhere", move || {
        let world = World::open(setup);
        let (sender, begun) = channel::<Flying>();
        // Full of what is held after four: the fifth waits for a mark.
        let saver: Work = Box::new(move |world| {
            for step in 10..16 {
                sender.send(world.begin(step)).expect("the marker goes on");
            }
        });
        let marker: Work = Box::new(move |world| {
            let mut marked = 0;
            for flying in begun {
                let generation = flying.durable().generation;
                let step = flying.save.step();
                assert!(generation > marked, "one thread begins them");
                marked = generation;
                world.say(label::MARKING, both(generation, step));
                let found = world.store.mark_global(RUN_ID, step).expect("law: what is held can be marked");
                assert_eq!(found, generation);
            }
        });
        together(&world, vec![saver, marker]);
        world.finish();
    });
}

/// Until nobody reads what is to go.
fn insist(discard: impl Fn() -> Result<u32, Error>) -> u32 {
    loop {
        match discard() {
            Ok(count) => return count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}"),
        }
        thread::yield_now();
    }
}

/// Gives a step up, in flight or durable by then.
fn abandoner(step: u64) -> Work {
    Box::new(move |world| {
        let flying = world.begin(step);
        world.say(label::ABANDONING, step);
        insist(|| world.store.abandon(RUN_ID, step, None));
        world.say(label::ABANDONED, step);
        let ended = flying.ended();
        assert!(ended.as_ref().is_ok() || ended.is_err_and(|error| error.kind() == ErrorKind::Cancelled));
        let found = world.store.open_checkpoint(Select::Step(step), false);
        assert!(
            found.is_err_and(|error| error.kind() == ErrorKind::NotFound),
            "law: what was discarded is gone"
        );
    })
}

/// The newest may go back here, but what it is stays whole.
fn restorer() -> Work {
    Box::new(|world| (0..2).for_each(|_| assert!(world.read_newest().is_some(), "law: older ones stay")))
}

#[test]
fn a_discarded_checkpoint_never_comes_back() {
    let setup = Setup { slots: 5, ..Setup::tight(2, 2) };
    prepare(setup);
    explore("a_discarded_checkpoint_never_comes_back", move || {
        let world = World::open(setup);
        world.begin(1).durable();
        world.begin(2).durable();
        together(&world, vec![saver(10..12), abandoner(20), restorer()]);
        world.store.drain(None).expect("drain");
        let left = world.store.checkpoints().expect("list");
        let stays = left[1].record.generation;
        let discarder: Work = Box::new(move |world| {
            world.say(label::ABANDONING, left[0].record.step);
            insist(|| world.store.discard_newer(stays));
            world.say(label::ABANDONED, left[0].record.step);
            assert_eq!(world.newest(), stays);
        });
        together(&world, vec![discarder, restorer()]);
        saver(30..33)(&world);
        world.finish();
    });
}
