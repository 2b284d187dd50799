//! The C ABI: `include/pccheck.h` is generated from this module, and is its documentation.
//!
//! | file | what |
//! |---|---|
//! | [`guard`] | the boundary: every pointer is checked and cast there, every panic ends there |
//! | [`status`] | frozen status numbers |
//! | [`text`] | text out of the library; this thread's last error |
//! | [`options`] | size-versioned structs, their defaults, and the constants of their fields |
//! | [`store`], [`save`], [`raw`], [`checkpoint`] | one handle each |
//! | [`tune`] | how often to save |
//!
//! Rust callers use [`crate::engine`]; nothing here is meant for them.

pub mod checkpoint;
pub(crate) mod guard;
pub mod options;
pub mod raw;
pub mod save;
pub mod status;
pub mod store;
pub mod text;
pub mod tune;
