//! The media layout, version 1. Safe code only; `docs/format.md` is its specification.
//!
//! | module | bytes |
//! |---|---|
//! | [`layout`] | where everything lies in a region |
//! | [`superblock`] | identity and geometry of a region, two copies |
//! | [`control`] | leases, the global mark, pins and quarantines, two copies written in turn |
//! | [`record`] | one per slot: what the slot holds and whether it is committed |
//! | [`payload`], [`header`], [`dtype`] | the safetensors file in a slot |
//! | [`table`] | one hash per chunk of the payload |
//! | [`label`], [`stripe`] | the members of a striped region, and what lies on each |
//! | [`codec`] | little-endian fields at chained offsets, checksums |
//!
//! Every decoder takes arbitrary bytes and answers with an error, never with a panic, and allocates no
//! more than a small multiple of what it was given.

pub mod codec;
pub mod control;
pub mod dtype;
pub mod header;
pub mod label;
pub mod layout;
pub mod payload;
pub mod record;
pub mod stripe;
pub mod superblock;
pub mod table;
mod uuid;

pub use codec::Block;
pub use control::{Control, GlobalMark, SlotMark, MARK_DISCARDED, MARK_PINNED, MARK_QUARANTINED};
pub use dtype::Dtype;
pub use header::{header_len, parse_header, Payload, TensorInfo};
pub use label::{ChosenLabel, Label, LABEL_AREA_BYTES, LABEL_OFFSETS};
pub use layout::{Layout, CONTROL_OFFSETS, RECORDS_OFFSET, SUPERBLOCK_OFFSETS};
pub use payload::{plan, plan_raw, MetadataTensor, PayloadPlan, Planner, TensorSpec};
pub use record::{RecordState, SlotRecord, HEADER_HASHED, RAW_STREAM};
pub use stripe::{StripeLayout, DEFAULT_UNIT_BYTES, MAX_MEMBERS, MIN_MEMBERS};
pub use superblock::{PreferredMedium, Superblock};
pub use table::{chunk_hash, decode_table, encode_table, table_hash};
pub use uuid::Uuid;

/// Version of the format that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

/// Unit of alignment of everything on the medium.
pub const BLOCK_BYTES: u64 = 4096;

/// Alignment of slots, in bytes: a huge page of persistent memory.
pub const SLOT_ALIGN_BYTES: u64 = 2 << 20;

/// Fewest slots in a region: one to write while one checkpoint survives.
pub const MIN_SLOTS: u32 = 2;

/// Most slots in a region: one control block holds a mark for each.
pub const MAX_SLOTS: u32 = 240;

/// Smallest chunk, in bytes; chunks are whole blocks.
pub const MIN_CHUNK_BYTES: u64 = 4096;

/// Largest chunk, in bytes.
pub const MAX_CHUNK_BYTES: u64 = 64 << 20;

/// Most chunks of a payload: whoever opens a checkpoint holds the hash of each in memory, whatever a crafted region claims,
/// and a sparse file has any size for nothing.
pub const MAX_CHUNKS: u64 = 1 << 24;

/// Highest generation, so that a slot's state, pins and generation pack in 64 bits. The lowest is 1.
pub const MAX_GENERATION: u64 = (1 << 44) - 1;

/// Most generations by which one control write may raise the ceiling.
pub const MAX_LEASE_GENERATIONS: u64 = 1 << 16;

/// Generations skipped when both control blocks, and so the ceiling, are lost.
pub const LOST_CEILING_SKIP_GENERATIONS: u64 = 1 << 32;

/// Most tensors in a checkpoint, tied ones included.
pub const MAX_TENSORS: usize = 1 << 20;

/// Longest tensor name, in bytes of UTF-8.
pub const MAX_NAME_BYTES: usize = 4096;

/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 64;

/// Longest JSON header that safetensors readers accept, in bytes, without the 8-byte length before it.
pub const MAX_HEADER_JSON_BYTES: u64 = 100_000_000;

/// Longest metadata that has no room in the header and lies in a tensor of its own, in bytes of JSON. Whoever opens a
/// checkpoint holds it in memory, whatever a crafted payload claims.
pub const MAX_METADATA_BYTES: u64 = 256 << 20;

const _: () = assert!(std::mem::size_of::<Block>() as u64 == BLOCK_BYTES);
const _: () = assert!(SLOT_ALIGN_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () =
    assert!(MIN_CHUNK_BYTES.is_multiple_of(BLOCK_BYTES) && MAX_CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));

#[cfg(test)]
mod spec_test;
