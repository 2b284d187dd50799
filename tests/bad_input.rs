//! Prevents: a checkpoint lost, a file destroyed, a wrong byte returned or a call that never returns because
//! somebody gave the engine something bad. Each case asserts the kind of the error, that its text names what was
//! expected, what was found and what to do, and that everything saved before is intact.

#[path = "bad_input/bed.rs"]
mod bed;
mod common;
#[path = "bad_input/crafted.rs"]
mod crafted;
#[path = "bad_input/flips.rs"]
mod flips;
#[path = "bad_input/paths.rs"]
mod paths;
#[path = "bad_input/states.rs"]
mod states;
