//! What the library fills: structs of which the caller sets only `struct_bytes`.
#![expect(unsafe_code, reason = "the structs are written to foreign memory")]

use core::ffi::c_char;

use super::guard::versioned;

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
    /// Those of durable_bytes that were in their places already, and were not written.
    pub unchanged_bytes: u64,
    /// Those of durable_bytes that cuFile wrote from the memory of a GPU: see PCC_DIRECT_AUTO.
    pub direct_bytes: u64,
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
    /// Bytes of the region that lie together on one member; 0: the region is not striped.
    pub stripe_unit_bytes: u64,
    /// Files or devices over which the region is striped; 1: it is not.
    pub members: u32,
    /// 0.
    pub reserved: u32,
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

versioned!(pcc_progress, 56, {});
versioned!(pcc_durable, 48, {});
versioned!(pcc_checkpoint_info, 80, {});
versioned!(pcc_tensor_info, 64, {});
versioned!(pcc_stats_info, 120, {});
versioned!(pcc_got_info, 120, {});
versioned!(pcc_verify_report, 40, {});
versioned!(pcc_tuning, 48, {});
