//! Sequences of calls of the C ABI with arbitrary arguments. No call panics, hangs, writes beyond what it was given or leaks;
//! every status is one of the header's, with a text; and a save that was reported durable is there at the end, as it
//! was.
#![no_main]

mod args;
mod calls;
mod world;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;

use calls::Call;
use world::World;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Whether a region is there and open to begin with.
    slots: u8,
    open: bool,
    stores_first: bool,
    calls: Vec<Call>,
}

fuzz_target!(|data: &[u8]| {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut world = World::new();
    if input.slots % 8 != 0 {
        world.begin(u32::from(input.slots % 4) + 2, input.open);
    }
    for call in input.calls.iter().take(48) {
        call.make(&mut world);
    }
    world.end(input.stores_first);
});
