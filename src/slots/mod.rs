//! Who owns which slot: packed words in DRAM, and the allocator over them.
//!
//! The words are rebuilt by recovery when the store opens; nothing here ever lives in mapped media. The laws,
//! each with a loom model beside the code: two claims never get one slot; the newest checkpoint is never
//! freed or reused; a pinned or read slot is never reused.

mod table;
mod word;

pub use table::{Claim, SlotTable};
pub use word::{SlotState, SlotView, GENERATION_MAX, READERS_MAX};

#[cfg(all(test, loom))]
mod loom_models;
