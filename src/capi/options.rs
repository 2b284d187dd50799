//! Size-versioned structs, the constants of their fields, and their defaults.
//!
//! Every struct begins with `struct_bytes`, has a size that is a multiple of 8 and no padding (asserted below), so that
//! a library and a program of different versions can tell which fields the other knows.
#![expect(
    unsafe_code,
    reason = "the structs are read from and written to foreign memory; exported functions"
)]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::{c_char, c_void};
use std::time::Duration;

use super::guard::{self, Caller, Outcome, Versioned};
use super::status::pcc_status;
use crate::engine::Select;
use crate::error::{Error, ErrorKind};
use crate::format::Dtype;
use crate::medium::{Durability, IoBackend, MediumKind, Requested};
use crate::store::{FormatOptions, OpenOptions};

/// Boolean, one byte each.
pub const PCC_DTYPE_BOOL: u32 = 1;
/// Unsigned 8-bit integer.
pub const PCC_DTYPE_U8: u32 = 2;
/// Signed 8-bit integer.
pub const PCC_DTYPE_I8: u32 = 3;
/// Unsigned 16-bit integer.
pub const PCC_DTYPE_U16: u32 = 4;
/// Signed 16-bit integer.
pub const PCC_DTYPE_I16: u32 = 5;
/// Unsigned 32-bit integer.
pub const PCC_DTYPE_U32: u32 = 6;
/// Signed 32-bit integer.
pub const PCC_DTYPE_I32: u32 = 7;
/// Unsigned 64-bit integer.
pub const PCC_DTYPE_U64: u32 = 8;
/// Signed 64-bit integer.
pub const PCC_DTYPE_I64: u32 = 9;
/// IEEE half precision.
pub const PCC_DTYPE_F16: u32 = 10;
/// bfloat16.
pub const PCC_DTYPE_BF16: u32 = 11;
/// IEEE single precision.
pub const PCC_DTYPE_F32: u32 = 12;
/// IEEE double precision.
pub const PCC_DTYPE_F64: u32 = 13;
/// Complex of two F32.
pub const PCC_DTYPE_C64: u32 = 14;
/// Complex of two F64.
pub const PCC_DTYPE_C128: u32 = 15;
/// 8-bit float, 4 bits of exponent (float8_e4m3fn).
pub const PCC_DTYPE_F8_E4M3: u32 = 16;
/// 8-bit float, 5 bits of exponent.
pub const PCC_DTYPE_F8_E5M2: u32 = 17;
/// 8-bit exponent-only float.
pub const PCC_DTYPE_F8_E8M0: u32 = 18;
/// 8-bit float, 4 bits of exponent, no negative zero.
pub const PCC_DTYPE_F8_E4M3FNUZ: u32 = 19;
/// 8-bit float, 5 bits of exponent, no negative zero.
pub const PCC_DTYPE_F8_E5M2FNUZ: u32 = 20;
/// 6-bit float, 2 bits of exponent, packed.
pub const PCC_DTYPE_F6_E2M3: u32 = 21;
/// 6-bit float, 3 bits of exponent, packed.
pub const PCC_DTYPE_F6_E3M2: u32 = 22;
/// 4-bit float, two in a byte.
pub const PCC_DTYPE_F4: u32 = 23;

/// Choose by what was measured when the region was formatted, persistent memory first.
pub const PCC_MEDIUM_AUTO: u32 = 0;
/// Persistent memory, mapped with MAP_SYNC.
pub const PCC_MEDIUM_DAX: u32 = 1;
/// A shared mapping of any file, also on tmpfs.
pub const PCC_MEDIUM_MMAP: u32 = 2;
/// O_DIRECT on a file or block device, by io_uring where the kernel allows it.
pub const PCC_MEDIUM_DIRECT: u32 = 3;

/// io_uring, or threads where the kernel refuses it.
pub const PCC_BACKEND_AUTO: u32 = 0;
/// io_uring, or an error.
pub const PCC_BACKEND_URING: u32 = 1;
/// Blocking calls on threads.
pub const PCC_BACKEND_THREADS: u32 = 2;

/// A durable save survives the death of the process (tmpfs is enough).
pub const PCC_DURABILITY_PROCESS: u32 = 1;
/// A durable save survives power loss.
pub const PCC_DURABILITY_POWER: u32 = 2;

/// Memory of the host.
pub const PCC_DEVICE_HOST: u32 = 0;

/// The checkpoint with the highest generation; falls back to the next newest where it is damaged.
pub const PCC_SELECT_NEWEST: u32 = 0;
/// The newest of those with a generation below `value`, with the same fall-back.
pub const PCC_SELECT_OLDER_THAN: u32 = 1;
/// Exactly the generation `value`.
pub const PCC_SELECT_GENERATION: u32 = 2;
/// The newest of step `value`, falling back to an older one of the same step.
pub const PCC_SELECT_STEP: u32 = 3;

/// Flag of a checkpoint: made by a raw save, its one tensor is called "raw".
pub const PCC_CHECKPOINT_RAW: u32 = 1;

/// Most milliseconds that are told from waiting for ever: a hundred years.
const FOR_EVER_MS: i64 = 100 * 365 * 24 * 3600 * 1000;

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
    /// Threads that copy and hash state, 1 to 64. Default: the cores, at most 4.
    pub writers: u32,
    /// Threads that verify and copy on restore, 1 to 64. Default: the cores, at most 4.
    pub readers: u32,
    /// Operations in flight on the direct medium, 1 to 4096. Default 32.
    pub queue_depth: u32,
    /// 1: lock the staging pool in memory where the limit allows it. Default 0.
    pub lock_memory: u32,
    /// 0.
    pub reserved: u32,
    /// Names this training run, the same on all its ranks: steps are compared within one run. Default 0.
    pub run_id: u64,
    /// Bytes of the staging pool, which bounds the memory that the library takes. At least (N + 1) chunks.
    /// Default 256 MiB.
    pub staging_bytes: u64,
    /// Unit of copying, hashing and writing: a multiple of 4096, up to 64 MiB. Default 4 MiB.
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
    /// Reserved for a device's stream: NULL.
    pub stream: *mut c_void,
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
    /// First byte: contiguous, row-major, of any alignment; may be NULL where `bytes` is 0. A save only reads it.
    pub data: *mut c_void,
    /// Size in bytes: the product of the shape times the element size.
    pub bytes: u64,
    /// PCC_DTYPE_...
    pub dtype: u32,
    /// Number of dimensions, at most 64.
    pub rank: u32,
    /// PCC_DEVICE_HOST. Any other number gives PCC_UNSUPPORTED.
    pub device: u32,
    /// 0.
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
    /// PCC_DEVICE_HOST. Any other number gives PCC_UNSUPPORTED.
    pub device: u32,
    /// 0.
    pub device_index: u32,
}

/// How far a save is.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_progress {
    /// Set by the caller: sizeof(pcc_progress).
    pub struct_bytes: u64,
    /// The save's generation: its place in the order of all saves of the region, never used twice.
    pub generation: u64,
    /// The trainer's step.
    pub step: u64,
    /// Bytes of the payload.
    pub total_bytes: u64,
    /// Bytes that have left the caller's memory.
    pub copied_bytes: u64,
    /// Bytes handed to the medium (not yet durable).
    pub written_bytes: u64,
    /// 1 when every byte has left the caller's memory.
    pub copied: u32,
    /// 1 when the save has ended, durably or not.
    pub ended: u32,
}

/// What is known of a durable save.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_durable {
    /// Set by the caller: sizeof(pcc_durable).
    pub struct_bytes: u64,
    /// The save's generation.
    pub generation: u64,
    /// The newer checkpoint that had made this one superfluous by the time it was durable; 0: none.
    pub superseded_by: u64,
    /// Nanoseconds from begin to copied.
    pub copied_ns: u64,
    /// Nanoseconds from begin to durable.
    pub durable_ns: u64,
    /// The slot that it was written to.
    pub slot: u32,
    /// 0.
    pub reserved: u32,
}

/// One checkpoint.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_checkpoint_info {
    /// Set by the caller: sizeof(pcc_checkpoint_info).
    pub struct_bytes: u64,
    /// Its generation.
    pub generation: u64,
    /// The trainer's step.
    pub step: u64,
    /// Run that saved it.
    pub run_id: u64,
    /// Bytes of its payload: a complete safetensors file.
    pub payload_bytes: u64,
    /// Bytes of one of its chunks.
    pub chunk_bytes: u64,
    /// Wall-clock time of its commit, in nanoseconds since 1970. For people: nothing is ordered by it.
    pub unix_ns: u64,
    /// Slot that holds it.
    pub slot: u32,
    /// Number of stored tensors (tied ones not counted).
    pub tensor_count: u32,
    /// PCC_CHECKPOINT_... bits.
    pub flags: u32,
    /// 1: durably kept until unpinned.
    pub pinned: u32,
    /// How many handles of this store have it open now.
    pub readers: u32,
    /// Newer candidates that were passed over when it was opened, because they are damaged. 0 in a list.
    pub rejected: u32,
}

/// One tensor of a checkpoint.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_tensor_info {
    /// Set by the caller: sizeof(pcc_tensor_info).
    pub struct_bytes: u64,
    /// Its name: UTF-8 of `name_bytes` bytes, then a NUL. Lives as long as the checkpoint's handle.
    pub name: *const c_char,
    /// Bytes of the name, without the NUL.
    pub name_bytes: u64,
    /// `rank` dimensions. Lives as long as the checkpoint's handle.
    pub shape: *const u64,
    /// Name of the tensor that stores its bytes where it is tied to one; else NULL.
    pub tied_to: *const c_char,
    /// Size in bytes.
    pub bytes: u64,
    /// Its first byte in the payload.
    pub payload_offset: u64,
    /// PCC_DTYPE_...
    pub dtype: u32,
    /// Number of dimensions.
    pub rank: u32,
}

/// Counters since open, and gauges of this moment.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_stats_info {
    /// Set by the caller: sizeof(pcc_stats_info).
    pub struct_bytes: u64,
    /// Saves begun.
    pub saves_begun: u64,
    /// Saves that became durable, superseded ones included.
    pub saves_durable: u64,
    /// Durable saves that a newer checkpoint had made superfluous by then.
    pub saves_superseded: u64,
    /// Saves that failed.
    pub saves_failed: u64,
    /// Saves that were cancelled.
    pub saves_cancelled: u64,
    /// Payload bytes of durable saves.
    pub durable_bytes: u64,
    /// Nanoseconds in which at least one save was in flight: durable_bytes over this is the bandwidth got.
    pub busy_ns: u64,
    /// Sum over durable saves of the nanoseconds from begin to copied.
    pub copied_ns: u64,
    /// Sum over durable saves of the nanoseconds from begin to durable.
    pub durable_ns: u64,
    /// Generation of the newest checkpoint; 0: none.
    pub newest_generation: u64,
    /// Saves in flight now.
    pub in_flight: u32,
    /// Slots out of use after a failed flush: see `pcc_repair`.
    pub quarantined_slots: u32,
    /// Slots that saves may use now: free, being written, or reclaimable.
    pub claimable_slots: u32,
    /// 0.
    pub reserved: u32,
}

/// What was got at open, as opposed to what was asked for. Texts live as long as the store.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_got_info {
    /// Set by the caller: sizeof(pcc_got_info).
    pub struct_bytes: u64,
    /// How bytes are moved: "io_uring", "io_uring, registered buffers", "pwrite", "avx512", ...
    pub path_text: *const c_char,
    /// For people: what was refused and what is used instead, one per line.
    pub notes_text: *const c_char,
    /// Identity of the region.
    pub region_uuid: [u8; 16],
    /// Bytes of one slot: the largest payload with its chunk table.
    pub slot_bytes: u64,
    /// Bytes of the staging pool.
    pub staging_bytes: u64,
    /// Of these, bytes in huge pages.
    pub staging_huge_bytes: u64,
    /// Bytes of one chunk of new saves.
    pub chunk_bytes: u64,
    /// Checkpoints that recovery found at open.
    pub recovered_checkpoints: u32,
    /// 1: the staging pool is locked in memory.
    pub staging_locked: u32,
    /// PCC_MEDIUM_...
    pub medium: u32,
    /// PCC_DURABILITY_...
    pub durability: u32,
    /// Slots of the region.
    pub slot_count: u32,
    /// N.
    pub max_in_flight: u32,
    /// K.
    pub keep: u32,
    /// 1: opened read-only.
    pub read_only: u32,
}

/// What `pcc_verify` found.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_verify_report {
    /// Set by the caller: sizeof(pcc_verify_report).
    pub struct_bytes: u64,
    /// Checkpoints that verified in full.
    pub intact: u64,
    /// Checkpoints of which some byte is damaged or cannot be read.
    pub damaged: u64,
    /// Checkpoints that were overwritten while they were read: not damaged.
    pub reclaimed: u64,
    /// Bytes that the whole report text takes with its NUL.
    pub text_bytes: u64,
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

/// What `pcc_tune` advises.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub struct pcc_tuning {
    /// Set by the caller: sizeof(pcc_tuning).
    pub struct_bytes: u64,
    /// Smallest number of iterations between saves that keeps within the slowdown.
    pub interval_iterations: u64,
    /// Nanoseconds from begin to durable of one save among N.
    pub durable_ns: u64,
    /// Run time over run time without saves at that interval, in millionths.
    pub slowdown_ppm: u64,
    /// Expected nanoseconds of work lost by a crash at a random moment.
    pub expected_lost_ns: u64,
    /// Most nanoseconds of work lost by a crash.
    pub worst_lost_ns: u64,
}

macro_rules! versioned {
    ($type:ident, $bytes:literal, {$($field:ident: $value:expr),* $(,)?}) => {
        const _: () = assert!(size_of::<$type>() == $bytes && align_of::<$type>() == 8 && $bytes % 8 == 0);

        // SAFETY: `repr(C)` and made of integers, pointers and byte arrays; the size is asserted above, and the test
        // of the header adds up the fields; the first is `struct_bytes`.
        unsafe impl Versioned for $type {
            const NAME: &'static str = stringify!($type);

            fn initial() -> Self {
                // SAFETY: zero is a value of every integer and pointer.
                let zero: Self = unsafe { core::mem::zeroed() };
                Self { struct_bytes: $bytes, $($field: $value,)* ..zero }
            }
        }
    };
}

versioned!(pcc_format_options, 24, {});
versioned!(pcc_open_options, 88, {
    backend: PCC_BACKEND_AUTO,
    required_durability: durability_code(OpenOptions::default().required),
    max_in_flight: OpenOptions::default().max_in_flight,
    keep: OpenOptions::default().keep,
    writers: OpenOptions::default().writers,
    readers: OpenOptions::default().readers,
    queue_depth: OpenOptions::default().queue_depth,
    staging_bytes: OpenOptions::default().staging_bytes,
    chunk_bytes: OpenOptions::default().chunk_bytes,
    lock_wait_ms: OpenOptions::default().lock_wait.map_or(-1, |wait| wait.as_millis() as i64),
});
versioned!(pcc_save_options, 24, { wait_ms: 60_000 });
versioned!(pcc_tensor, 56, {});
versioned!(pcc_select_options, 24, { verify: 1 });
versioned!(pcc_read, 56, {});
versioned!(pcc_progress, 56, {});
versioned!(pcc_durable, 48, {});
versioned!(pcc_checkpoint_info, 80, {});
versioned!(pcc_tensor_info, 64, {});
versioned!(pcc_stats_info, 104, {});
versioned!(pcc_got_info, 104, {});
versioned!(pcc_verify_report, 40, {});
versioned!(pcc_tune_options, 56, { stall_ns: u64::MAX, max_slowdown_ppm: 1_050_000 });
versioned!(pcc_tuning, 48, {});

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

/// The safetensors name of a dtype code, such as "BF16"; NULL for a number that is none.
///
/// Durability: none.
/// Threads: any.
/// Ownership: static text, never freed.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_dtype_name(dtype: u32) -> *const c_char {
    let name = match dtype {
        PCC_DTYPE_BOOL => c"BOOL",
        PCC_DTYPE_U8 => c"U8",
        PCC_DTYPE_I8 => c"I8",
        PCC_DTYPE_U16 => c"U16",
        PCC_DTYPE_I16 => c"I16",
        PCC_DTYPE_U32 => c"U32",
        PCC_DTYPE_I32 => c"I32",
        PCC_DTYPE_U64 => c"U64",
        PCC_DTYPE_I64 => c"I64",
        PCC_DTYPE_F16 => c"F16",
        PCC_DTYPE_BF16 => c"BF16",
        PCC_DTYPE_F32 => c"F32",
        PCC_DTYPE_F64 => c"F64",
        PCC_DTYPE_C64 => c"C64",
        PCC_DTYPE_C128 => c"C128",
        PCC_DTYPE_F8_E4M3 => c"F8_E4M3",
        PCC_DTYPE_F8_E5M2 => c"F8_E5M2",
        PCC_DTYPE_F8_E8M0 => c"F8_E8M0",
        PCC_DTYPE_F8_E4M3FNUZ => c"F8_E4M3FNUZ",
        PCC_DTYPE_F8_E5M2FNUZ => c"F8_E5M2FNUZ",
        PCC_DTYPE_F6_E2M3 => c"F6_E2M3",
        PCC_DTYPE_F6_E3M2 => c"F6_E3M2",
        PCC_DTYPE_F4 => c"F4",
        _ => return core::ptr::null(),
    };
    name.as_ptr()
}

/// Bits of one element of a dtype; 0 for a number that is none.
///
/// Durability: none.
/// Threads: any.
/// Ownership: none.
/// Errors: none.
#[no_mangle]
pub extern "C" fn pcc_dtype_bits(dtype: u32) -> u32 {
    Dtype::try_from(dtype).map_or(0, |dtype| dtype.bits() as u32)
}

/// The PCC_DTYPE_ code of a safetensors name (NUL-terminated), such as "BF16": for programs that cannot read this
/// header's constants.
///
/// Durability: none.
/// Threads: any.
/// Ownership: `dtype` receives the code, or 0.
/// Errors: PCC_NOT_FOUND for a name that is none; PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for text that is not UTF-8.
#[no_mangle]
pub unsafe extern "C" fn pcc_dtype_from_name(name: *const c_char, dtype: *mut u32) -> pcc_status {
    let body = |caller: &Caller| {
        let dtype = caller.out("dtype", dtype, 0)?;
        let name = caller.text("name", name)?;
        let found = Dtype::from_name(name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, caller.op(), format!("no dtype is called {name:?}"))
        })?;
        dtype.set(found.code());
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_dtype_from_name", body) }
}

/// A wait in milliseconds: negative is for ever.
pub(super) fn wait_of(ms: i64) -> Option<Duration> {
    match ms {
        0..=FOR_EVER_MS => Some(Duration::from_millis(ms as u64)),
        _ => None,
    }
}

impl Caller {
    fn flag(&self, what: &str, value: u32) -> Outcome<bool> {
        match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.invalid(format!("{what} is {value}, expected 0 or 1"))),
        }
    }

    fn reserved(&self, what: &str, value: u64) -> Outcome<()> {
        match value {
            0 => Ok(()),
            _ => Err(self.invalid(format!("{what} is {value}, expected 0"))),
        }
    }

    /// Only host memory, so far.
    pub fn host_memory(&self, what: &str, device: u32, index: u32) -> Outcome<()> {
        if device == PCC_DEVICE_HOST {
            return self.reserved(&format!("device_index of {what}"), index.into());
        }
        let message = format!("{what} is on device kind {device}, this build knows host memory (0) only");
        Err(Error::new(ErrorKind::Unsupported, self.op(), message).into())
    }

    fn medium(&self, code: u32) -> Outcome<Requested> {
        match code {
            PCC_MEDIUM_AUTO => Ok(Requested::Auto),
            PCC_MEDIUM_DAX => Ok(Requested::Dax),
            PCC_MEDIUM_MMAP => Ok(Requested::Mmap),
            PCC_MEDIUM_DIRECT => Ok(Requested::Direct),
            _ => Err(self.invalid(format!("medium is {code}, expected PCC_MEDIUM_... (0 to 3)"))),
        }
    }

    pub fn format_options(
        &self,
        options: &pcc_format_options,
        slots: u32,
        payload: u64,
    ) -> Outcome<FormatOptions> {
        self.reserved("reserved", options.reserved.into())?;
        Ok(FormatOptions {
            force: self.flag("force", options.force)?,
            prewrite: self.flag("prewrite", options.prewrite)?,
            medium: self.medium(options.medium)?,
            ..FormatOptions::new(slots, payload)
        })
    }

    pub fn open_options(&self, options: &pcc_open_options) -> Outcome<OpenOptions> {
        self.reserved("reserved", options.reserved.into())?;
        let backend = match options.backend {
            PCC_BACKEND_AUTO => IoBackend::Auto,
            PCC_BACKEND_URING => IoBackend::Uring,
            PCC_BACKEND_THREADS => IoBackend::Threads,
            code => return Err(self.invalid(format!("backend is {code}, expected PCC_BACKEND_... (0 to 2)"))),
        };
        let required = match options.required_durability {
            PCC_DURABILITY_PROCESS => Durability::Process,
            PCC_DURABILITY_POWER => Durability::Power,
            code => {
                let message = format!("required_durability is {code}, expected PCC_DURABILITY_... (1 or 2)");
                return Err(self.invalid(message));
            }
        };
        Ok(OpenOptions {
            read_only: self.flag("read_only", options.read_only)?,
            medium: self.medium(options.medium)?,
            backend,
            required,
            max_in_flight: options.max_in_flight,
            keep: options.keep,
            hold: self.flag("hold", options.hold)?,
            run_id: options.run_id,
            staging_bytes: options.staging_bytes,
            chunk_bytes: options.chunk_bytes,
            writers: options.writers,
            readers: options.readers,
            queue_depth: options.queue_depth,
            lock_memory: self.flag("lock_memory", options.lock_memory)?,
            lock_wait: wait_of(options.lock_wait_ms),
        })
    }

    /// How long a save may wait for a slot.
    pub fn save_wait(&self, options: *const pcc_save_options) -> Outcome<Option<Duration>> {
        let options = self.options(options)?;
        if !options.stream.is_null() {
            let message = "stream is not NULL: this build knows no devices";
            return Err(Error::new(ErrorKind::Unsupported, self.op(), message).into());
        }
        Ok(wait_of(options.wait_ms))
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

pub(super) fn medium_code(kind: MediumKind) -> u32 {
    match kind {
        MediumKind::Dax => PCC_MEDIUM_DAX,
        MediumKind::Mmap => PCC_MEDIUM_MMAP,
        MediumKind::Direct => PCC_MEDIUM_DIRECT,
        // Never behind a handle of the C ABI, which opens paths only.
        MediumKind::Sim => PCC_MEDIUM_AUTO,
    }
}

pub(super) fn durability_code(durability: Durability) -> u32 {
    match durability {
        Durability::Process => PCC_DURABILITY_PROCESS,
        Durability::Power => PCC_DURABILITY_POWER,
    }
}

#[cfg(test)]
mod tests {
    use super::super::status::PCC_OK;
    use super::*;

    #[test]
    fn dtype_codes_and_names_are_those_of_the_format() {
        let codes = [
            PCC_DTYPE_BOOL,
            PCC_DTYPE_U8,
            PCC_DTYPE_I8,
            PCC_DTYPE_U16,
            PCC_DTYPE_I16,
            PCC_DTYPE_U32,
            PCC_DTYPE_I32,
            PCC_DTYPE_U64,
            PCC_DTYPE_I64,
            PCC_DTYPE_F16,
            PCC_DTYPE_BF16,
            PCC_DTYPE_F32,
            PCC_DTYPE_F64,
            PCC_DTYPE_C64,
            PCC_DTYPE_C128,
            PCC_DTYPE_F8_E4M3,
            PCC_DTYPE_F8_E5M2,
            PCC_DTYPE_F8_E8M0,
            PCC_DTYPE_F8_E4M3FNUZ,
            PCC_DTYPE_F8_E5M2FNUZ,
            PCC_DTYPE_F6_E2M3,
            PCC_DTYPE_F6_E3M2,
            PCC_DTYPE_F4,
        ];
        assert_eq!(codes.len(), Dtype::ALL.len());
        for (code, dtype) in codes.into_iter().zip(Dtype::ALL) {
            assert_eq!(code, dtype.code());
            assert_eq!(u64::from(pcc_dtype_bits(code)), dtype.bits());
            let mut found = 0;
            // SAFETY: a static NUL-terminated name and a local.
            let status = unsafe { pcc_dtype_from_name(pcc_dtype_name(code), &mut found) };
            assert_eq!((status, found), (PCC_OK, code), "{}", dtype.name());
        }
        assert!(pcc_dtype_name(0).is_null() && pcc_dtype_name(24).is_null());
    }

    #[test]
    fn waits_tell_never_from_a_long_time() {
        assert_eq!(wait_of(0), Some(Duration::ZERO));
        assert_eq!(wait_of(1500), Some(Duration::from_millis(1500)));
        assert_eq!((wait_of(-1), wait_of(i64::MIN), wait_of(i64::MAX)), (None, None, None));
    }
}
