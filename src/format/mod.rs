//! The media layout, version 1. Specified in `docs/format.md`; safe code only, sizes asserted at compile time.

/// Unit of alignment of everything on the medium.
pub const BLOCK_BYTES: u64 = 4096;
