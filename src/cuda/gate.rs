//! What keeps calls that may wait for a whole GPU apart from streams that wait for the engine.
//!
//! A stream that waits for a flag goes on when the engine raises it. Allocating, freeing and page-locking may wait for all
//! that runs on a device: were the engine to do that while a stream waits for it, each would wait for the other. So there is
//! either the one or the other, in the whole process: stores share the devices. Not kept apart are restores and the closing of
//! stores, which the program decides when to do.

use crate::sync::Mutex;

#[derive(Default)]
struct State {
    flags: u32,
    allocating: u32,
    /// How many are to allocate next.
    turns: u32,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

fn with<T>(body: impl FnOnce(&mut State) -> T) -> T {
    body(STATE.lock().get_or_insert_default())
}

/// A stream waits for a flag that has yet to be raised, while this lives.
pub struct Pending(());

impl Pending {
    /// None while something is being allocated, or is to be next.
    pub fn begin() -> Option<Pending> {
        with(|state| {
            (state.allocating == 0 && state.turns == 0).then(|| {
                state.flags += 1;
                Pending(())
            })
        })
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        with(|state| state.flags -= 1);
    }
}

/// Calls are made that may wait for a device, while this lives.
pub struct Allocating(());

impl Allocating {
    /// None while a stream waits for a flag.
    pub fn begin() -> Option<Allocating> {
        with(|state| {
            (state.flags == 0).then(|| {
                state.allocating += 1;
                Allocating(())
            })
        })
    }
}

impl Drop for Allocating {
    fn drop(&mut self) {
        with(|state| state.allocating -= 1);
    }
}

/// Somebody could not allocate: while this lives no further stream comes to wait for a flag, so that it can when those that do
/// have gone on.
pub struct Turn(());

impl Turn {
    /// Asks for it.
    pub fn ask() -> Turn {
        with(|state| state.turns += 1);
        Turn(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        with(|state| state.turns -= 1);
    }
}
