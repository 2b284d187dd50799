//! What the caller sets: structs of options, tensors and reads, their defaults, and what they ask of the engine.
#![expect(unsafe_code, reason = "structs are read from foreign memory; exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::{c_char, c_void};
#[cfg(feature = "cuda")]
use std::time::Duration;

use super::codes::*;
use super::guard::{self, versioned, Caller, Outcome};
use super::status::pcc_status;
use crate::engine::Select;
#[cfg(not(feature = "cuda"))]
use crate::error::{Error, ErrorKind};
use crate::format::{DEFAULT_UNIT_BYTES, MAX_MEMBERS};
use crate::save::SaveOptions;
#[cfg(feature = "cuda")]
use crate::save::{DeviceOptions, DirectStorage, Snapshot};
use crate::store::{FormatOptions, OpenOptions};

/// How a region is formatted. Initialise with `pcc_format_options_init`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_format_options {
    /// Size of this struct as the program knows it.
    pub struct_bytes: u64,
    /// 1: overwrite what the path holds, even a valid region. Default 0.
    pub force: u32,
    /// 1: write the whole region once now, so that the first saves are as fast as later ones. Default 0.
    pub prewrite: u32,
    /// PCC_MEDIUM_...: which medium it is meant for. Default PCC_MEDIUM_AUTO: measure.
    pub medium: u32,
    /// 0.
    pub reserved: u32,
    /// Members beside `path`, which is member 0: `stripe_count` files or devices over which the region is striped, so
    /// that their bandwidth adds up. The region is opened by `path`, and all of them must be there. Default NULL.
    pub stripe_paths: *const *const c_char,
    /// How many, at most 15. Default 0: the region is not striped.
    pub stripe_count: u64,
    /// Bytes of the region that lie together on one member: a power of two from 2 MiB to 1 GiB, which chunk_bytes must
    /// divide at open. Default 0: 4 MiB.
    pub stripe_unit_bytes: u64,
}

/// How a region is opened. Initialise with `pcc_open_options_init`; NULL means all defaults.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_open_options {
    /// Size of this struct as the program knows it.
    pub struct_bytes: u64,
    /// 1: open beside a live writer: no lock, no saves, no pins. Default 0.
    pub read_only: u32,
    /// PCC_MEDIUM_... Default PCC_MEDIUM_AUTO.
    pub medium: u32,
    /// PCC_BACKEND_... of the direct medium. Default PCC_BACKEND_AUTO.
    pub backend: u32,
    /// PCC_DURABILITY_...: the weakest that is acceptable; opening fails where the medium cannot give it.
    /// Default PCC_DURABILITY_POWER.
    pub required_durability: u32,
    /// N: saves that may be in flight at once, 1 to 128. Default 2.
    pub max_in_flight: u32,
    /// K: newest checkpoints that are kept. N + K may not exceed the slots of the region. Default 1.
    pub keep: u32,
    /// 1: keep every durable checkpoint until `pcc_mark_global` names a newer step. Default 0.
    pub hold: u32,
    /// Threads that copy and hash state, 1 to 64. Default: the cores, at most 4; on more than 8, half of them, at most 8.
    pub writers: u32,
    /// Threads that verify and copy on restore, 1 to 64. Default: the cores, at most 16.
    pub readers: u32,
    /// Operations in flight on the direct medium, 1 to 4096. Default 32.
    pub queue_depth: u32,
    /// 1: lock the staging pool in memory where the limit allows it. Default 0.
    pub lock_memory: u32,
    /// A save does not write chunks that its slot durably holds already, as their hashes tell; but of so many saves into
    /// a slot one writes everything, so that damage is not kept for ever. 1: every save does. 0 or default: 16.
    pub rewrite_every: u32,
    /// Names this training run, the same on all its ranks: steps are compared within one run. Default 0.
    pub run_id: u64,
    /// Bytes of the staging pool, which bounds the memory that the library takes. At least (N + 1) chunks.
    /// Default 256 MiB.
    pub staging_bytes: u64,
    /// Unit of copying, hashing and writing: a multiple of 4096, up to 64 MiB. Default 1 MiB.
    pub chunk_bytes: u64,
    /// Milliseconds to wait while another writer holds the region; negative: for ever. Default 10000.
    pub lock_wait_ms: i64,
}

/// How a save begins. Initialise with `pcc_save_options_init`; NULL means all defaults.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_save_options {
    /// Size of this struct as the program knows it.
    pub struct_bytes: u64,
    /// Milliseconds to wait for a slot while N saves are in flight; negative: for ever; 0: not at all.
    /// Default 60000.
    pub wait_ms: i64,
    /// For tensors on GPUs: a CUDA stream (CUstream, cudaStream_t). What is saved is the state as of everything that was
    /// enqueued on it before; the call does not wait for that. NULL: the legacy default stream of each GPU concerned. For
    /// tensors on several GPUs, one that waits for the others' streams. Not used for tensors in host memory.
    pub stream: *mut c_void,
    /// 1: the save does not commit before `pcc_save_confirm`, and is cancelled when it is freed without. Until then it
    /// is one of the N in flight and keeps its slot, though no staging memory once it is written; later saves may commit
    /// before it. Default 0.
    pub confirm: u32,
    /// 1: the checkpoint is pinned from the instant it commits. Refused at begin (PCC_NO_SLOT) where pins, those of saves
    /// in flight among them, would leave fewer than N slots to save into. Default 0.
    pub pin: u32,
    /// Where a state on GPUs goes first: PCC_SNAPSHOT_... Default PCC_SNAPSHOT_STAGING.
    pub snapshot: u32,
    /// 1: where the staging pool is smaller than the state, copies wait on the GPU, by flags in memory, for buffers to be
    /// written, so that all are enqueued at once: `pcc_save_stream_wait_copied` has a stream wait for the copies, and the
    /// calling thread waits only until they are enqueued, for no storage (but that of earlier saves; and of a state of many
    /// hundred tensors for all but the last copies). At `device_timeout_ms` the save fails, and nothing waits for storage any
    /// more. What waits for all that runs on the GPU (synchronising the device, freeing its memory) waits for storage
    /// meanwhile, too. As if 0 with a driver before CUDA 11.7, under CUDA_DEVICE_MAX_CONNECTIONS=1, where the staging pool
    /// cannot be page-locked, has fewer than four buffers or too few that become free, where more than 16 MiB in host memory
    /// stand between tensors of GPUs, and once chunks of the store have gone past host memory. Default 0.
    pub flag_waits: u32,
    /// Milliseconds after which a save that a GPU has not finished copying fails, lest one that hangs hold it for ever.
    /// 0 or default: 600000.
    pub device_timeout_ms: u64,
    /// Whether chunks go from a GPU to the file past host memory: PCC_DIRECT_... Default PCC_DIRECT_OFF.
    pub direct_storage: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// One tensor: what a save reads, and what `pcc_restore` writes. The same array serves both. In an array every
/// element has the same `struct_bytes`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_tensor {
    /// sizeof(pcc_tensor).
    pub struct_bytes: u64,
    /// Unique in the array, not empty, at most 4096 bytes; NUL-terminated UTF-8.
    pub name: *const c_char,
    /// `rank` dimensions, outermost first; may be NULL where rank is 0 (a scalar).
    pub shape: *const u64,
    /// First byte: contiguous, row-major, of any alignment; may be NULL where `bytes` is 0. A save only reads it. In memory
    /// of a GPU the device's address.
    pub data: *mut c_void,
    /// Size in bytes: the product of the shape times the element size.
    pub bytes: u64,
    /// PCC_DTYPE_...
    pub dtype: u32,
    /// Number of dimensions, at most 64.
    pub rank: u32,
    /// PCC_DEVICE_...
    pub device: u32,
    /// Which GPU; 0 for host memory.
    pub device_index: u32,
}

/// One entry of metadata.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_pair {
    /// Unique in the array, must not begin with "pccheck."; NUL-terminated UTF-8.
    pub key: *const c_char,
    /// NUL-terminated UTF-8.
    pub value: *const c_char,
}

/// Which checkpoint to open. Initialise with `pcc_select_options_init`; NULL means the newest.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_select_options {
    /// Size of this struct as the program knows it.
    pub struct_bytes: u64,
    /// Generation or step, as `select` says. Default 0.
    pub value: u64,
    /// PCC_SELECT_... Default PCC_SELECT_NEWEST.
    pub select: u32,
    /// 1: read and verify the whole payload before the checkpoint is returned, and fall back where it is damaged. 0:
    /// verify each chunk when it is read. Default 1. `pcc_restore` ignores it: it verifies what it reads.
    pub verify: u32,
}

/// One piece of a tensor to read. In an array every element has the same `struct_bytes`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_read {
    /// sizeof(pcc_read).
    pub struct_bytes: u64,
    /// Name of the tensor, NUL-terminated UTF-8; NULL: `index` says which.
    pub name: *const c_char,
    /// Index of the tensor; not used where `name` is not NULL.
    pub index: u64,
    /// First byte of the tensor that is wanted.
    pub offset: u64,
    /// How many bytes are wanted.
    pub bytes: u64,
    /// Where they go: any alignment; no two pieces of one call may overlap.
    pub dst: *mut c_void,
    /// PCC_DEVICE_...
    pub device: u32,
    /// Which GPU; 0 for host memory.
    pub device_index: u32,
}

/// What `pcc_tune` starts from. Initialise with `pcc_tune_options_init`.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_tune_options {
    /// Size of this struct as the program knows it.
    pub struct_bytes: u64,
    /// Bytes of the state (see `pcc_payload_bytes`).
    pub state_bytes: u64,
    /// Nanoseconds of one iteration without saves.
    pub iteration_ns: u64,
    /// Durable bytes per second of all saves together; 0: measured by this store's own saves.
    pub durable_bytes_per_s: u64,
    /// Nanoseconds for which one save keeps the trainer from updating; UINT64_MAX (all bits set): the mean time to
    /// copied of this store's saves, or 0 before its first. Default UINT64_MAX.
    pub stall_ns: u64,
    /// Largest acceptable run time over the run time without saves, in millionths: 1050000 is 5% slower. At least
    /// 1000000. Default 1050000.
    pub max_slowdown_ppm: u64,
    /// N; 0: the store's. Default 0.
    pub max_in_flight: u32,
    /// 0.
    pub reserved: u32,
}

versioned!(pcc_format_options, 48, {});
versioned!(pcc_open_options, 88, {
    backend: PCC_BACKEND_AUTO,
    required_durability: durability_code(OpenOptions::default().required),
    max_in_flight: OpenOptions::default().max_in_flight,
    keep: OpenOptions::default().keep,
    writers: OpenOptions::default().writers,
    readers: OpenOptions::default().readers,
    queue_depth: OpenOptions::default().queue_depth,
    rewrite_every: OpenOptions::default().rewrite_every,
    staging_bytes: OpenOptions::default().staging_bytes,
    chunk_bytes: OpenOptions::default().chunk_bytes,
    lock_wait_ms: OpenOptions::default().lock_wait.map_or(-1, |wait| wait.as_millis() as i64),
});
versioned!(pcc_save_options, 56, {
    wait_ms: SaveOptions::default().wait.map_or(-1, |wait| wait.as_millis() as i64),
});
versioned!(pcc_tensor, 56, {});
versioned!(pcc_select_options, 24, { verify: 1 });
versioned!(pcc_read, 56, {});
versioned!(pcc_tune_options, 56, { stall_ns: u64::MAX, max_slowdown_ppm: 1_050_000 });

/// Initialises options for `pcc_format`; `struct_bytes` is sizeof(pcc_format_options).
///
/// Durability: none.
/// Threads: any.
/// Ownership: the struct is the caller's.
/// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_format_options_init(
    options: *mut pcc_format_options,
    struct_bytes: u64,
) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_format_options_init", |caller| caller.init(options, struct_bytes)) }
}

/// Initialises options for `pcc_open`; `struct_bytes` is sizeof(pcc_open_options).
///
/// Durability: none.
/// Threads: any.
/// Ownership: the struct is the caller's.
/// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_open_options_init(
    options: *mut pcc_open_options,
    struct_bytes: u64,
) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_open_options_init", |caller| caller.init(options, struct_bytes)) }
}

/// Initialises options for `pcc_save_begin` and `pcc_raw_begin`; `struct_bytes` is sizeof(pcc_save_options).
///
/// Durability: none.
/// Threads: any.
/// Ownership: the struct is the caller's.
/// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_save_options_init(
    options: *mut pcc_save_options,
    struct_bytes: u64,
) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_save_options_init", |caller| caller.init(options, struct_bytes)) }
}

/// Initialises options for `pcc_checkpoint_open` and `pcc_restore`; `struct_bytes` is sizeof(pcc_select_options).
///
/// Durability: none.
/// Threads: any.
/// Ownership: the struct is the caller's.
/// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_select_options_init(
    options: *mut pcc_select_options,
    struct_bytes: u64,
) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_select_options_init", |caller| caller.init(options, struct_bytes)) }
}

/// Initialises options for `pcc_tune`; `struct_bytes` is sizeof(pcc_tune_options).
///
/// Durability: none.
/// Threads: any.
/// Ownership: the struct is the caller's.
/// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_tune_options_init(
    options: *mut pcc_tune_options,
    struct_bytes: u64,
) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_tune_options_init", |caller| caller.init(options, struct_bytes)) }
}

impl Caller {
    pub fn format_options(
        &self,
        options: &pcc_format_options,
        slots: u32,
        payload: u64,
    ) -> Outcome<FormatOptions> {
        self.reserved("reserved", options.reserved.into())?;
        let most = u64::from(MAX_MEMBERS) - 1;
        if options.stripe_count > most {
            let count = options.stripe_count;
            return Err(self.invalid(format!("stripe_count is {count}, expected at most {most}")));
        }
        let stripe = self.paths("stripe_paths", options.stripe_paths, options.stripe_count)?;
        let unit_bytes = match options.stripe_unit_bytes {
            0 => DEFAULT_UNIT_BYTES,
            bytes => bytes,
        };
        Ok(FormatOptions {
            stripe,
            stripe_unit_bytes: unit_bytes,
            force: self.flag("force", options.force)?,
            prewrite: self.flag("prewrite", options.prewrite)?,
            medium: self.medium(options.medium)?,
            ..FormatOptions::new(slots, payload)
        })
    }

    pub fn open_options(&self, options: &pcc_open_options) -> Outcome<OpenOptions> {
        Ok(OpenOptions {
            read_only: self.flag("read_only", options.read_only)?,
            medium: self.medium(options.medium)?,
            backend: self.backend(options.backend)?,
            required: self.durability(options.required_durability)?,
            max_in_flight: options.max_in_flight,
            keep: options.keep,
            hold: self.flag("hold", options.hold)?,
            run_id: options.run_id,
            staging_bytes: options.staging_bytes,
            chunk_bytes: options.chunk_bytes,
            writers: options.writers,
            readers: options.readers,
            queue_depth: options.queue_depth,
            // Programs that know it as reserved pass 0.
            rewrite_every: match options.rewrite_every {
                0 => OpenOptions::default().rewrite_every,
                saves => saves,
            },
            lock_memory: self.flag("lock_memory", options.lock_memory)?,
            lock_wait: wait_of(options.lock_wait_ms),
        })
    }

    /// How a save begins.
    pub fn save_options(&self, options: *const pcc_save_options) -> Outcome<SaveOptions> {
        let options = self.options(options)?;
        #[cfg(feature = "cuda")]
        let device = self.device_options(&options)?;
        #[cfg(not(feature = "cuda"))]
        self.no_device_options(&options)?;
        Ok(SaveOptions {
            wait: wait_of(options.wait_ms),
            confirm: self.flag("confirm", options.confirm)?,
            pin: self.flag("pin", options.pin)?,
            #[cfg(feature = "cuda")]
            device,
        })
    }

    /// How tensors on GPUs are copied.
    #[cfg(feature = "cuda")]
    fn device_options(&self, options: &pcc_save_options) -> Outcome<DeviceOptions> {
        let snapshot = match options.snapshot {
            PCC_SNAPSHOT_STAGING => Snapshot::Staging,
            PCC_SNAPSHOT_AUTO => Snapshot::Auto,
            PCC_SNAPSHOT_SPARE => Snapshot::Spare,
            code => {
                return Err(self.invalid(format!("snapshot is {code}, expected PCC_SNAPSHOT_... (0 to 2)")))
            }
        };
        let direct_storage = match options.direct_storage {
            PCC_DIRECT_OFF => DirectStorage::Off,
            PCC_DIRECT_AUTO => DirectStorage::Auto,
            PCC_DIRECT_REQUIRED => DirectStorage::Required,
            code => {
                let message = format!("direct_storage is {code}, expected PCC_DIRECT_... (0 to 2)");
                return Err(self.invalid(message));
            }
        };
        self.reserved("reserved", options.reserved.into())?;
        let mut device = DeviceOptions {
            stream: options.stream as usize,
            snapshot,
            direct_storage,
            flag_waits: self.flag("flag_waits", options.flag_waits)?,
            ..DeviceOptions::default()
        };
        if options.device_timeout_ms > 0 {
            device.timeout = Duration::from_millis(options.device_timeout_ms);
        }
        Ok(device)
    }

    #[cfg(not(feature = "cuda"))]
    fn no_device_options(&self, options: &pcc_save_options) -> Outcome<()> {
        let flag_waits = self.flag("flag_waits", options.flag_waits)?;
        self.reserved("reserved", options.reserved.into())?;
        let plain = options.snapshot == PCC_SNAPSHOT_STAGING && options.direct_storage == PCC_DIRECT_OFF;
        if options.stream.is_null() && plain && !flag_waits {
            return Ok(());
        }
        let message = "stream, snapshot, flag_waits or direct_storage is given: this build knows no GPUs";
        Err(Error::new(ErrorKind::Unsupported, self.op(), message).into())
    }

    /// Which checkpoint, and whether its payload is verified at once.
    pub fn select(&self, options: *const pcc_select_options) -> Outcome<(Select, bool)> {
        let options = self.options(options)?;
        let select = match options.select {
            PCC_SELECT_NEWEST => Select::Newest,
            PCC_SELECT_OLDER_THAN => Select::OlderThan(options.value),
            PCC_SELECT_GENERATION => Select::Generation(options.value),
            PCC_SELECT_STEP => Select::Step(options.value),
            code => return Err(self.invalid(format!("select is {code}, expected PCC_SELECT_... (0 to 3)"))),
        };
        Ok((select, self.flag("verify", options.verify)?))
    }

    /// The tuning input's own checks.
    pub fn tune_options(&self, options: *const pcc_tune_options) -> Outcome<pcc_tune_options> {
        if options.is_null() {
            return Err(self.bad_pointer("pcc_tune_options is NULL".into()));
        }
        let options = self.options(options)?;
        self.reserved("reserved", options.reserved.into())?;
        Ok(options)
    }
}
