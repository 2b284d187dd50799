//! The C ABI as a program meets it: every class of bad argument is refused with a status and a text, and nothing is
//! lost by it; saves, raw saves, restores, waits, callbacks, threads and forks do what the header says. A regression
//! here crashes trainers, or silently restores the wrong state.

#[path = "capi/arguments.rs"]
mod arguments;
#[path = "capi/bed.rs"]
mod bed;
#[path = "capi/begin.rs"]
mod begin;
mod common;
#[path = "capi/content.rs"]
mod content;
#[path = "capi/life.rs"]
mod life;
