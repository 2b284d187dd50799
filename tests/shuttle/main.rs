//! Prevents: defects that only some order of threads brings out, anywhere in the store. The whole engine runs on a
//! simulated medium while shuttle decides after every lock, atomic and wake-up which thread goes on: random schedules and
//! such with few, unlikely preemptions (PCT). In every schedule: readers see whole checkpoints, the newest never goes back,
//! every save ends (a thread that waits for ever is found as a deadlock), slots and buffers are free in the end, and power
//! loss at any barrier leaves what was reported durable.
//!
//! `scripts/shuttle` runs this; PCC_SHUTTLE_ITERATIONS says how many schedules of each kind, PCC_SHUTTLE_SEED which.
#![cfg(shuttle)]

mod ends;
mod judge;
mod keeping;
mod planted;
mod saves;
mod schedules;
mod world;
