//! Prevents: a save that is lost, called durable, or never ends, a slot or a buffer that is lost, or a trainer that dies, when
//! the real media meet what real machines do: devices that fail, answer short or not at once, or are full; files that are cut
//! short or replaced; kernels that refuse threads, memory, O_DIRECT or io_uring; clocks that go back; processes that fork, are
//! stopped or killed. After each the next save succeeds, or the store says that it will not, and the checkpoint before is whole.
//!
//! Needs root and /dev/fuse, for a disk that fails when told to.

mod bed;
#[path = "../common/mod.rs"]
mod common;
#[path = "../sigkill/content.rs"]
#[allow(dead_code, reason = "the disk uses its random numbers alone")]
mod content;
mod device;
#[path = "../disk/mod.rs"]
#[allow(dead_code, reason = "nothing is recorded here")]
mod disk;
mod files;
mod interposed;
mod processes;
#[path = "../../src/medium/tests/refusals.rs"]
mod refusals;
mod refused;
