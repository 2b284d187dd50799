//! States on GPUs, against a stand-in for NVIDIA's driver that the test builds (tests/standin): copies that run before the
//! caller's stream has made the state, a step that overwrites what is still being copied, a driver that fails at any call,
//! a GPU that hangs.
#![cfg(all(feature = "sim", feature = "cuda"))]

mod bed;
mod failures;
mod faults;
mod restores;
mod saves;
mod standin;
