//! What a caller may choose when formatting and opening a region, and the limits of each choice.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::format::stripe::check_unit;
use crate::format::{
    BLOCK_BYTES, DEFAULT_UNIT_BYTES, MAX_CHUNK_BYTES, MAX_MEMBERS, MAX_SLOTS, MIN_CHUNK_BYTES, MIN_SLOTS,
};
use crate::medium::{Durability, IoBackend, Requested};

/// Most saves that may be in flight at once.
pub const MAX_IN_FLIGHT: u32 = 128;
/// Most threads that copy and hash.
pub const MAX_WRITERS: u32 = 64;
/// Chunk size unless the caller sets one: many in flight keep a disk busier than few large ones, and a save begins to write,
/// and a read to verify, sooner.
pub const DEFAULT_CHUNK_BYTES: u64 = 1 << 20;
/// Staging pool unless the caller sets one.
pub const DEFAULT_STAGING_BYTES: u64 = 256 << 20;
/// Of so many saves into a slot one writes everything, unless the caller sets something else.
pub const DEFAULT_REWRITE_EVERY: u32 = 16;
/// Most saves into a slot of which one must write everything.
pub const MAX_REWRITE_EVERY: u32 = 1 << 16;
/// How long `open` waits for the writer's lock unless told otherwise.
pub const DEFAULT_LOCK_WAIT: Duration = Duration::from_secs(10);

/// How a new region is laid out.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// Slots: saves in flight + checkpoints kept + pinned. [`MIN_SLOTS`]..=[`MAX_SLOTS`].
    pub slot_count: u32,
    /// Largest payload (header and tensors) that a slot must hold, in bytes.
    pub payload_bytes: u64,
    /// Overwrite what the path holds, even a valid region.
    pub force: bool,
    /// Write zeros over the whole region now, so that the first saves do not pay for unwritten extents.
    pub prewrite: bool,
    /// Medium whose suitability is assumed instead of measured (`Auto` measures).
    pub medium: Requested,
    /// The members beside the path itself, which is member 0, at most [`MAX_MEMBERS`] with it: files or devices over which
    /// the region is striped. Empty: it is not.
    pub stripe: Vec<PathBuf>,
    /// Bytes of the region that lie together on one member: a power of two from 2 MiB to 1 GiB. Chunks of saves must
    /// divide it. Means nothing where the region is not striped.
    pub stripe_unit_bytes: u64,
}

impl FormatOptions {
    /// `slot_count` slots for states of up to `payload_bytes`.
    pub fn new(slot_count: u32, payload_bytes: u64) -> Self {
        FormatOptions {
            slot_count,
            payload_bytes,
            force: false,
            prewrite: false,
            medium: Requested::Auto,
            stripe: Vec::new(),
            stripe_unit_bytes: DEFAULT_UNIT_BYTES,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        if !(MIN_SLOTS..=MAX_SLOTS).contains(&self.slot_count) {
            return Err(invalid(
                "format",
                format!("slot_count is {}, expected {MIN_SLOTS} to {MAX_SLOTS}", self.slot_count),
            ));
        }
        if self.payload_bytes == 0 {
            return Err(invalid(
                "format",
                "payload_bytes is 0, expected the bytes of the largest state".into(),
            ));
        }
        if self.stripe.is_empty() {
            return Ok(());
        }
        let members = self.stripe.len() + 1;
        if members > MAX_MEMBERS as usize {
            return Err(invalid("format", format!("{members} members, expected at most {MAX_MEMBERS}")));
        }
        check_unit(self.stripe_unit_bytes).map_err(|message| invalid("format", message))
    }
}

/// How a region is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Open beside a live writer: no lock, no saves, no pins.
    pub read_only: bool,
    /// Medium, or `Auto`.
    pub medium: Requested,
    /// How the `direct` medium reaches the kernel.
    pub backend: IoBackend,
    /// Weakest acceptable durability; open fails where the medium cannot give it.
    pub required: Durability,
    /// N: saves that may be in flight at once.
    pub max_in_flight: u32,
    /// K: newest checkpoints that are kept.
    pub keep: u32,
    /// Keep every durable checkpoint until a step is marked as durable everywhere.
    pub hold: bool,
    /// Group run id of the saves made through this store; steps are compared within one run id only.
    pub run_id: u64,
    /// Bytes of the staging pool: bounds the engine's memory whatever the size of the state.
    pub staging_bytes: u64,
    /// Bytes per chunk, a multiple of 4096.
    pub chunk_bytes: u64,
    /// Threads that copy and hash state into staging.
    pub writers: u32,
    /// Threads that verify and copy out on restore.
    pub readers: u32,
    /// Operations in flight on the `direct` medium.
    pub queue_depth: u32,
    /// A save does not write chunks that its slot durably holds already, but for every so many-th save into each slot,
    /// which writes everything, so that damage is not kept for ever. 1: every save writes everything.
    pub rewrite_every: u32,
    /// Lock the staging pool in memory where the limit allows it.
    pub lock_memory: bool,
    /// How long to wait for another writer's lock; `None` waits for ever.
    pub lock_wait: Option<Duration>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, |n| n.get() as u32);
        OpenOptions {
            read_only: false,
            medium: Requested::Auto,
            backend: IoBackend::Auto,
            required: Durability::Power,
            max_in_flight: 2,
            keep: 1,
            hold: false,
            run_id: 0,
            staging_bytes: DEFAULT_STAGING_BYTES,
            chunk_bytes: DEFAULT_CHUNK_BYTES,
            // On large machines, four cannot fill memory that is the medium.
            writers: cores.clamp(1, 4).max((cores / 2).min(8)),
            // More than for saves: what is restored is waited for, and nothing trains meanwhile.
            readers: cores.clamp(1, 16),
            queue_depth: 32,
            rewrite_every: DEFAULT_REWRITE_EVERY,
            lock_memory: false,
            lock_wait: Some(DEFAULT_LOCK_WAIT),
        }
    }
}

impl OpenOptions {
    /// Checks every limit that does not depend on the region.
    pub(crate) fn validate(&self) -> Result<()> {
        let range = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(invalid("open", format!("{name} is {value}, expected {low} to {high}")))
            }
        };
        range("max_in_flight", self.max_in_flight.into(), 1, MAX_IN_FLIGHT.into())?;
        range("keep", self.keep.into(), 1, MAX_SLOTS.into())?;
        range("writers", self.writers.into(), 1, MAX_WRITERS.into())?;
        range("readers", self.readers.into(), 1, MAX_WRITERS.into())?;
        range("queue_depth", self.queue_depth.into(), 1, 4096)?;
        range("rewrite_every", self.rewrite_every.into(), 1, MAX_REWRITE_EVERY.into())?;
        range("chunk_bytes", self.chunk_bytes, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)?;
        if !self.chunk_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(invalid(
                "open",
                format!("chunk_bytes is {}, expected a multiple of {BLOCK_BYTES}", self.chunk_bytes),
            ));
        }
        let least = self.chunk_bytes * self.least_buffers();
        if self.staging_bytes < least {
            return Err(invalid(
                "open",
                format!(
                    "staging_bytes is {}, expected at least {least}: {} buffers of chunk_bytes {} for max_in_flight {}",
                    self.staging_bytes,
                    self.least_buffers(),
                    self.chunk_bytes,
                    self.max_in_flight
                ),
            )
            .advise("raise staging_bytes or lower chunk_bytes"));
        }
        Ok(())
    }

    /// Every raw save may hold one half-filled buffer; one more keeps the others moving.
    fn least_buffers(&self) -> u64 {
        u64::from(self.max_in_flight) + 1
    }
}

fn invalid(op: &'static str, message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, op, message)
}
