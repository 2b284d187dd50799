//! Saves: from the caller's memory to a durable checkpoint.

mod commit;
mod copier;
mod core;
#[cfg(feature = "cuda")]
mod device;
mod faults;
mod raw;
mod saver;

use std::time::{Duration, Instant};

pub use self::core::{Durable, Progress};
#[cfg(feature = "cuda")]
pub use device::{DeviceOptions, DirectStorage, Snapshot};
pub use faults::Faults;
pub use raw::RawSave;

pub(crate) use self::core::{cancelled, Origin, SaveCore, SaveSpec};
#[cfg(feature = "cuda")]
pub(crate) use device::DevicePart;
pub(crate) use raw::RawChunks;
pub(crate) use saver::Saver;

use crate::error::Result;
use crate::sync::{now, Arc};

/// How a save begins.
///
/// A wait alone is one, too: `Some(duration).into()`, `None.into()` for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveOptions {
    /// Longest wait for a slot; `None` waits for ever. Default 60 s.
    pub wait: Option<Duration>,
    /// Not committed before [`Save::confirm`]: for a caller who has yet to check what was copied. Default false.
    ///
    /// Until then the save is one of the N in flight and keeps its slot, but no staging buffer once it is written; later
    /// saves overtake it. Dropping the save or closing the store cancels it.
    pub confirm: bool,
    /// Its checkpoint is pinned from the instant it commits. Refused at begin (`NoSlot`) where pins, those of saves in
    /// flight among them, would leave fewer than N slots to save into. Default false.
    pub pin: bool,
    /// How tensors on GPUs are copied.
    #[cfg(feature = "cuda")]
    pub device: DeviceOptions,
}

impl SaveOptions {
    /// What [`Default`] gives.
    pub const DEFAULT: SaveOptions = SaveOptions {
        wait: Some(Duration::from_secs(60)),
        confirm: false,
        pin: false,
        #[cfg(feature = "cuda")]
        device: DeviceOptions::DEFAULT,
    };
}

impl Default for SaveOptions {
    fn default() -> Self {
        SaveOptions::DEFAULT
    }
}

impl From<Option<Duration>> for SaveOptions {
    fn from(wait: Option<Duration>) -> Self {
        SaveOptions { wait, ..SaveOptions::default() }
    }
}

/// The moment `timeout` from now; `None` waits for ever.
pub(crate) fn deadline_in(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| now().checked_add(timeout))
}

/// One save in flight, or ended.
///
/// Dropping it before it is copied cancels it, and waits until the engine no longer reads the caller's memory
/// (one chunk's copy at most). Dropping it later lets it go on to durable by itself, unless it has yet to be confirmed
/// ([`SaveOptions::confirm`]): that cancels it.
///
/// In a forked child the save is its parent's: waits return `Forked`, everything else does nothing, at once.
pub struct Save {
    core: Arc<SaveCore>,
}

impl Save {
    pub(crate) fn new(core: Arc<SaveCore>) -> Save {
        Save { core }
    }

    pub(crate) fn core(&self) -> &Arc<SaveCore> {
        &self.core
    }

    /// Orders this save among all saves of the region, for ever.
    pub fn generation(&self) -> u64 {
        self.core.claim.generation
    }

    /// The trainer's step.
    pub fn step(&self) -> u64 {
        self.core.spec.step
    }

    /// Waits until every byte has left the caller's memory, which may then be changed or freed.
    ///
    /// Nothing is durable yet. On every error but `TimedOut` the memory is the caller's again, too.
    pub fn wait_copied(&self, timeout: Option<Duration>) -> Result<()> {
        self.core.check_process("wait for copied")?;
        self.core.wait_copied(deadline_in(timeout))
    }

    /// Makes a stream of the program wait until every byte has left the caller's memory, so that what is enqueued on it
    /// from now on may change that memory. The calling thread waits only until all copies are enqueued (at once for the state in
    /// spare memory of the GPU, in a staging pool that has room for it, or with [`DeviceOptions::flag_waits`]; of a state of more
    /// tensors than the driver queues copies of, about 1800, once all but those are copied) and what is in host memory is copied.
    ///
    /// Nothing is durable yet. For tensors on several GPUs, every stream that may change one of them is to wait.
    ///
    /// # Errors
    ///
    /// `TimedOut`; otherwise why the save has failed: the memory is the caller's again. Where the stream cannot be made to wait
    /// (it captures a graph, the driver refuses), the calling thread waits until all is copied instead.
    ///
    /// # Safety
    ///
    /// As [`UserStream::new`](crate::cuda::UserStream::new), during this call.
    #[cfg(feature = "cuda")]
    #[expect(unsafe_code, reason = "the caller promises that the stream lives")]
    pub unsafe fn stream_wait_copied(&self, stream: usize, timeout: Option<Duration>) -> Result<()> {
        self.core.check_process("wait for copied")?;
        // SAFETY: the caller's promise.
        let stream = unsafe { crate::cuda::UserStream::new(stream as *mut _) };
        self.core.stream_wait_copied(stream, deadline_in(timeout))
    }

    /// Lets a save commit that was begun with [`SaveOptions::confirm`]: before it is copied or after, and as often as one
    /// likes. Any other save is not concerned.
    ///
    /// Nothing is durable yet on return. Where the save has failed or was cancelled, says why.
    pub fn confirm(&self) -> Result<()> {
        self.core.check_process("confirm save")?;
        self.core.confirm()
    }

    /// Waits until the save has ended; `Ok` means that it will be found after a crash. Without a timeout, a save that
    /// nobody confirms, cancels or drops is waited for for ever.
    pub fn wait_durable(&self, timeout: Option<Duration>) -> Result<Durable> {
        self.core.check_process("wait for durable")?;
        self.core.wait_durable(deadline_in(timeout))
    }

    /// How far it is. Never blocks. In a forked child: ended, with nothing copied.
    pub fn progress(&self) -> Progress {
        match self.core.forked() {
            true => Progress::unknown(self.core.spec.payload_bytes),
            false => self.core.progress(),
        }
    }

    /// Asks for the save to end without a checkpoint; comes too late where it is already being committed.
    pub fn cancel(&self) {
        if !self.core.forked() {
            self.core.fail(cancelled("the save was cancelled by its caller"));
        }
    }

    /// Runs `callback` on a thread of the engine when the save ends (at once if it has). Replaces an earlier one.
    ///
    /// It holds up other saves while it runs. A panic in it ends the callback and nothing else.
    pub fn on_end(&self, callback: Box<dyn FnOnce() + Send>) {
        if !self.core.forked() {
            self.core.set_on_end(callback);
        }
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        if self.core.forked() {
            // What it holds (locks, buffers) is the parent's: never dropped here.
            std::mem::forget(self.core.clone());
            return;
        }
        let copied = self.core.progress().copied;
        if !copied || self.core.unconfirmed() {
            // Where it has ended, in vain.
            self.cancel();
        }
        if !copied {
            // Ends after at most one chunk per copier: returns when nobody reads the caller's memory. A save that
            // has ended is asked, too: one that was ended by force may still be read.
            let _ = self.core.wait_copied(None);
        }
    }
}
