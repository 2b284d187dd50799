//! The C ABI: `include/pccheck.h` is generated from this module, and is its documentation.
//!
//! | file | what |
//! |---|---|
//! | [`guard`] | the boundary: every pointer is checked and cast there, every panic ends there |
//! | [`status`] | frozen status numbers |
//! | [`text`] | text out of the library; this thread's last error |
//! | [`codes`], [`dtype`] | the numbers in fields of structs; names and sizes of dtypes |
//! | [`options`] | size-versioned structs that the caller sets, and their defaults |
//! | [`infos`] | those that the library fills |
//! | [`store`], [`save`], [`raw`], [`checkpoint`] | one handle each |
//! | [`health`] | what is known of a store; its repair |
//! | [`read`] | reading from a checkpoint |
//! | [`tune`] | how often to save |
//!
//! Rust callers use [`crate::engine`]; nothing here is meant for them.

pub mod checkpoint;
pub mod codes;
pub mod dtype;
pub(crate) mod guard;
pub mod health;
pub mod infos;
pub mod options;
pub mod raw;
pub mod read;
pub mod save;
pub mod status;
pub mod store;
pub mod text;
pub mod tune;
