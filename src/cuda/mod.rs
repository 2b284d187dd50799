//! NVIDIA's driver, as far as checkpoints need it: contexts, streams, events, copies, page-locked and device memory.
//!
//! The driver is loaded when the first state on a GPU is saved or restored; where there is none, that is an error and
//! nothing else changes. Every object belongs to a [`Device`] and does nothing in a forked child, where the driver
//! cannot be used.
//!
//! | module | what |
//! |---|---|
//! | [`api`] | the calls, loaded by name |
//! | [`device`] | devices and their primary contexts |
//! | [`stream`] | streams and events |
//! | [`memory`] | page-locked host memory, device memory |
//! | [`copies`] | copies, alone or in batches |
//! | [`kernels`] | code that runs on devices |
//! | [`gds`] | cuFile: from a GPU to a file |
//!
//! # Why results are integers
//!
//! cudarc's functions return a Rust enum. A driver newer than cudarc's list may return a number that is none of its
//! variants, which would be undefined behaviour. So cudarc finds the library and names the types of handles, and the
//! calls are declared here with the type that C gives them.

mod api;
mod copies;
mod device;
pub mod gds;
mod kernels;
mod memory;
mod stream;

pub use copies::{Copy, CopyList, Direction};
pub use device::{Device, Entered};
pub use kernels::Hasher;
pub use memory::{free_memory, DeviceBuffer, Owners, Registered};
pub use stream::{Event, Stream, UserStream, Word};

use crate::error::Result;

/// The calling thread's calls do not end a capture that another thread of the program has open, until this is dropped.
pub struct Relaxed {
    previous: u32,
    _of_this_thread: core::marker::PhantomData<*const ()>,
}

impl Relaxed {
    /// Puts the calling thread into the relaxed capture mode.
    pub fn enter() -> Result<Relaxed> {
        let previous = api::Api::get()?.exchange_mode(api::CAPTURE_RELAXED)?;
        Ok(Relaxed { previous, _of_this_thread: core::marker::PhantomData })
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // It was possible before; where it is not now, no call is.
        let _ = api::Api::get().and_then(|api| api.exchange_mode(self.previous));
    }
}
