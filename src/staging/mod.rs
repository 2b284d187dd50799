//! The bounded pool of chunk buffers: all the memory that saves and loads use for payload bytes.
//!
//! One anonymous mapping, made and touched when the store opens, so that no save pays for first touch; it
//! never grows. It sits in 2 MiB pages where the kernel gives them (direct I/O from 4 KiB pages runs at half
//! the speed), is not inherited by forked children, and can be locked in memory.

mod set;
pub use set::{BufferSet, FreeList};

#[cfg(any(all(feature = "cuda", not(loom)), all(test, loom)))]
mod turns;
#[cfg(any(all(feature = "cuda", not(loom)), all(test, loom)))]
pub(crate) use turns::{Turn, Turns, Words};

#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod pool;
#[cfg(not(loom))]
pub use pool::{Lender, StagingBuffer, StagingOptions, StagingPool, BUFFERS_MIN};

#[cfg(all(test, loom))]
mod loom_models;
#[cfg(all(test, loom))]
mod loom_models_turns;
