//! Numbers in fields of structs, and what they stand for in the engine.

use std::time::Duration;

use super::guard::{Caller, Outcome};
use crate::error::{Error, ErrorKind};
use crate::medium::{Durability, IoBackend, MediumKind, Requested};

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
/// Memory of an NVIDIA GPU, `device_index` as CUDA counts them in this process. Builds without CUDA, and systems without
/// its driver, give PCC_UNSUPPORTED.
pub const PCC_DEVICE_CUDA: u32 = 1;

/// A state on GPUs goes straight into the staging pool: copied when all has passed through it.
pub const PCC_SNAPSHOT_STAGING: u32 = 0;
/// It goes into spare memory of its GPU first where that has room for it beside a tenth of the memory (and 1 GiB) left
/// free, else as PCC_SNAPSHOT_STAGING.
pub const PCC_SNAPSHOT_AUTO: u32 = 1;
/// It goes into spare memory of its GPU first, at the speed of that memory, and is copied at once. As much as the state
/// takes there is allocated by the first such save and kept; where there is not so much, the save fails.
pub const PCC_SNAPSHOT_SPARE: u32 = 2;

/// All of a state goes through the staging pool.
pub const PCC_DIRECT_OFF: u32 = 0;
/// Chunks of a state on a GPU go from spare memory of it to the file by GPUDirect Storage, past host memory, where that is possible: the
/// snapshot is in spare memory (PCC_SNAPSHOT_SPARE, or AUTO where there is room), all of the state's GPU memory is on one GPU with no
/// more than 64 MiB of host memory in between, the region is one file or device on the direct medium, the staging pool could be
/// page-locked, and cuFile (libcufile.so.0) is there and does not itself go through host memory. Else, and for chunks that are
/// partly in host memory, as PCC_DIRECT_OFF; so also for later saves of a store, once cuFile, driver or region have refused
/// something. `direct_bytes` of `pcc_stats` tells.
pub const PCC_DIRECT_AUTO: u32 = 1;
/// The same, but where it is not possible the save fails and says why (PCC_UNSUPPORTED; PCC_OUT_OF_MEMORY where there is no room for spare
/// memory), or does not begin (PCC_INVALID_ARGUMENT with PCC_SNAPSHOT_STAGING); and cuFile is used also where it itself goes through
/// host memory (its compatibility mode). A state without memory of a GPU is saved as ever.
pub const PCC_DIRECT_REQUIRED: u32 = 2;

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

/// A wait in milliseconds: negative is for ever.
pub(super) fn wait_of(ms: i64) -> Option<Duration> {
    match ms {
        0..=FOR_EVER_MS => Some(Duration::from_millis(ms as u64)),
        _ => None,
    }
}

impl Caller {
    /// 0 or 1.
    pub fn flag(&self, what: &str, value: u32) -> Outcome<bool> {
        match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.invalid(format!("{what} is {value}, expected 0 or 1"))),
        }
    }

    pub fn reserved(&self, what: &str, value: u64) -> Outcome<()> {
        match value {
            0 => Ok(()),
            _ => Err(self.invalid(format!("{what} is {value}, expected 0"))),
        }
    }

    /// The GPU whose memory it is; none: host memory.
    pub fn device(&self, what: &str, device: u32, index: u32) -> Outcome<Option<u32>> {
        match device {
            PCC_DEVICE_HOST => self.reserved(&format!("device_index of {what}"), index.into()).map(|()| None),
            PCC_DEVICE_CUDA => Ok(Some(index)),
            _ => {
                let message = format!("{what} is on device kind {device}, expected PCC_DEVICE_... (0 or 1)");
                Err(Error::new(ErrorKind::Unsupported, self.op(), message).into())
            }
        }
    }

    pub fn medium(&self, code: u32) -> Outcome<Requested> {
        match code {
            PCC_MEDIUM_AUTO => Ok(Requested::Auto),
            PCC_MEDIUM_DAX => Ok(Requested::Dax),
            PCC_MEDIUM_MMAP => Ok(Requested::Mmap),
            PCC_MEDIUM_DIRECT => Ok(Requested::Direct),
            _ => Err(self.invalid(format!("medium is {code}, expected PCC_MEDIUM_... (0 to 3)"))),
        }
    }

    pub fn backend(&self, code: u32) -> Outcome<IoBackend> {
        match code {
            PCC_BACKEND_AUTO => Ok(IoBackend::Auto),
            PCC_BACKEND_URING => Ok(IoBackend::Uring),
            PCC_BACKEND_THREADS => Ok(IoBackend::Threads),
            _ => Err(self.invalid(format!("backend is {code}, expected PCC_BACKEND_... (0 to 2)"))),
        }
    }

    pub fn durability(&self, code: u32) -> Outcome<Durability> {
        match code {
            PCC_DURABILITY_PROCESS => Ok(Durability::Process),
            PCC_DURABILITY_POWER => Ok(Durability::Power),
            _ => {
                Err(self
                    .invalid(format!("required_durability is {code}, expected PCC_DURABILITY_... (1 or 2)")))
            }
        }
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
    use super::*;

    #[test]
    fn waits_tell_never_from_a_long_time() {
        assert_eq!(wait_of(0), Some(Duration::ZERO));
        assert_eq!(wait_of(1500), Some(Duration::from_millis(1500)));
        assert_eq!((wait_of(-1), wait_of(i64::MIN), wait_of(i64::MAX)), (None, None, None));
    }
}
