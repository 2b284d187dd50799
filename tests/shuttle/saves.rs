//! Prevents: torn or lost checkpoints where several saves are in flight, commit in groups, and reuse slots.

use std::ops::Range;

use crate::schedules::explore;
use crate::world::{prepare, together, Setup, Work, World};

/// Begins saves of these steps as slots become free, and sees that all become durable.
pub fn saver(steps: Range<u64>) -> Work {
    Box::new(move |world| {
        let flying: Vec<_> = steps.map(|step| world.begin(step)).collect();
        flying.iter().for_each(|flying| assert_eq!(flying.durable().generation, flying.save.generation()));
    })
}

/// Restores the newest so many times.
pub fn reader(times: u32) -> Work {
    Box::new(move |world| {
        let mut last = 0;
        for _ in 0..times {
            let listed = world.newest();
            let (generation, _) = world.read_newest().expect("law: what was saved can be restored");
            assert!(generation >= listed.max(last), "law: the newest never goes back");
            last = generation;
        }
    })
}

/// Two threads save five times in all, as many at once as may be in flight; a third one restores the newest.
pub fn saves_beside_a_reader(setup: Setup) -> impl Fn() + Send + Sync + 'static {
    prepare(setup);
    move || {
        let world = World::open(setup);
        world.begin(1).durable();
        together(&world, vec![saver(10..13), saver(20..22), reader(2)]);
        assert_eq!(world.read_newest().expect("a checkpoint").0, world.newest());
        assert_eq!(world.store.stats().saves_durable, 6);
        world.finish();
    }
}

#[test]
fn saves_in_flight_stay_whole_beside_a_reader() {
    let setup = Setup::tight(3, 1);
    explore("saves_in_flight_stay_whole_beside_a_reader", saves_beside_a_reader(setup));
}

/// Two streams at once in a pool with room for one half-filled chunk of each: they spill and read back.
#[test]
fn raw_streams_move_on_in_the_smallest_pool() {
    let setup = Setup::tight(2, 1);
    prepare(setup);
    explore("raw_streams_move_on_in_the_smallest_pool", move || {
        let world = World::open(setup);
        let streamer =
            |step: u64| -> Work { Box::new(move |world| assert!(world.stream(step).durable().slot < 3)) };
        together(&world, vec![streamer(1001), streamer(1003), saver(10..12)]);
        assert_eq!(world.store.stats().saves_durable, 4);
        assert!(world.read_newest().is_some());
        world.finish();
    });
}
