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
