//! An open region and what may be done to it apart from saving and loading: format, open, pin, mark, grow.

mod control;
pub(crate) mod format;
pub(crate) mod grow;
mod options;
mod region;
mod striped;

pub use format::format_medium;
pub use grow::LeftOut;
pub use options::{
    FormatOptions, OpenOptions, DEFAULT_CHUNK_BYTES, DEFAULT_LOCK_WAIT, DEFAULT_STAGING_BYTES, MAX_IN_FLIGHT,
    MAX_REWRITE_EVERY, MAX_WRITERS,
};
pub(crate) use region::Content;
pub use region::{read_table, Claimed, Region};
pub use striped::format_members;

/// Wall-clock time, for people: nothing is ordered by it.
pub(crate) fn unix_ns() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
