//! Prevents: a checkpoint that was reported durable and is not there after a crash, or is there and is wrong.
//!
//! The real engine, threads and all, runs over the simulated medium; the record of what reached it is then
//! crashed everywhere, and whatever the crash left is held against all that the engine had promised. The same
//! checker must find every fault that is planted in the protocol, or it proves nothing.
//!
//! `PCC_CRASH_SCALE` multiplies the samples, `PCC_CRASH_SEED` changes them. What is argued and what is only
//! sampled stands in `docs/crash-argument.md`.
#![cfg(feature = "sim")]

mod classify;
mod explore;
mod histories;
mod judge;
mod kills;
mod laws;
mod mutations;
mod power;
mod striped;
mod stripes;
mod world;
