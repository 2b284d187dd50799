//! NVIDIA cuFile (GPUDirect Storage): bytes of a GPU's memory go to a file without passing through the host's.
//!
//! The library is loaded when it is first asked for; where there is none, that is an error and nothing else changes. Where
//! it works but cannot go directly, for this system or for this file, cuFile itself copies through host memory
//! ("compatibility mode"): [`Gds::is_direct`].
//!
//! | module | what |
//! |---|---|
//! | [`api`] | the calls, loaded by name |
//! | [`codes`] | what cuFile's numbers say |
//! | [`file`](mod@file) | registered files, and writing to them |
//! | [`buffer`] | registered memory of a GPU |
//!
//! # What cuFile does
//!
//! Seen of 1.14 (CUDA 12.9), 1.15 and 1.20 (CUDA 13) without nvidia-fs, over a stand-in for the driver:
//!
//! - It asks udev for the file system on the file's device, and knows no file where udev is not there.
//! - It opens the file anew without `O_DIRECT`, for what is not aligned, and closes that when the file is deregistered. A lock
//!   (`flock`) is not its descriptor's; a forked child keeps that one, though.
//! - It copies through host memory by 1 MiB and writes to the descriptor that was registered; 1.20 does so on threads of
//!   its own.
//! - `errno` of a write that failed is not the file system's: a full one is EIO or EPERM.
//! - It writes `cufile.log` to the working directory.
//! - Where the kernel has no `/proc/modules` it reads that for ever as it is opened: there it is refused.
//!
//! # Why cudarc's own binding is not used
//!
//! It stores results in a Rust enum, which a number that is none of its variants makes undefined; and it panics where a
//! call is missing.

mod api;
mod buffer;
mod codes;
mod file;

pub use api::Gds;
pub use buffer::GdsBuffer;
pub use file::GdsFile;
