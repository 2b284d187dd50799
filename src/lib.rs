//! Persistent concurrent checkpointing for ML training.
//!
//! The method is that of Strati, Friedman and Klimovic, "PCcheck: Persistent Concurrent Checkpointing for
//! ML", ASPLOS 2025: several checkpoints of one run are in flight at once, state flows through a bounded
//! staging pool to persistent memory or SSD in chunks, and storage keeps enough slots that a complete
//! checkpoint always survives.
//!
//! # Map of the crate
//!
//! Dependencies point downwards only (a test enforces it):
//!
//! ```text
//! capi, bin          the C ABI; the command-line tool
//! engine             Store: an open region with its threads
//! save, load         one save: pipeline, raw stream, commit; verified parallel restore
//! tune               how often to save
//! store, metrics     format, open, control block, durable steps, grow; counters
//! recovery, source   records -> decision table; where state comes from
//! medium             how bytes become persistent: dax, mmap, direct, sim
//! slots, staging     slot words; bounded buffer pool
//! format, cuda       media layout; the driver of GPUs
//! persist, fork      non-temporal copies, hashing, flushes; forked children
//! partial            calls that come back before all is done
//! sync, error        atomics; errors
//! ```
#![deny(unsafe_code)]

pub mod error;

#[cfg(not(loom))]
pub mod capi;
#[cfg(all(feature = "cuda", not(loom)))]
pub mod cuda;
#[cfg(not(loom))]
pub mod engine;
#[cfg(not(loom))]
pub mod fork;
#[cfg(not(loom))]
pub mod format;
#[cfg(not(loom))]
pub mod load;
#[cfg(not(loom))]
pub mod medium;
#[cfg(not(loom))]
pub mod metrics;
#[cfg(not(loom))]
mod partial;
#[cfg(not(loom))]
pub mod persist;
#[cfg(not(loom))]
pub mod recovery;
#[cfg(not(loom))]
pub mod save;
pub mod slots;
#[cfg(not(loom))]
pub mod source;
pub mod staging;
#[cfg(not(loom))]
pub mod store;
pub mod sync;
#[cfg(not(loom))]
pub mod tune;

pub use error::{Error, ErrorKind, Result};
