//! Where the bytes of a save come from: host memory, which copiers read; GPUs, whose copy engines bring their part.

#[cfg(feature = "cuda")]
mod device;
mod host;

#[cfg(feature = "cuda")]
pub use device::{DeviceSource, Fetch};
pub use host::{copy_and_hash, HostSegment, HostSource};

use crate::error::Result;
use crate::persist::ChunkHasher;

/// The payload of one save, readable at any offset until it is dropped.
pub trait Source: Send + Sync {
    /// Copies payload bytes `offset..offset + dst.len()` into `dst` and feeds the same bytes, in order, to `hasher`.
    ///
    /// When it returns, `dst` is visible to every thread and to devices; with `write_back` it has also left the
    /// processor's caches, so that it is durable where `dst` is persistent memory. Called from several threads at once.
    fn fill(&self, offset: u64, dst: &mut [u8], hasher: &mut ChunkHasher, write_back: bool) -> Result<()>;

    /// Feeds payload bytes `offset..offset + len` to `hasher`, in order. Called from several threads at once.
    fn hash(&self, offset: u64, len: usize, hasher: &mut ChunkHasher) -> Result<()>;

    /// Whether some of these bytes are not in host memory, so that neither `fill` nor `hash` can be asked for them.
    fn is_fetched(&self, _offset: u64, _len: usize) -> bool {
        false
    }
}
