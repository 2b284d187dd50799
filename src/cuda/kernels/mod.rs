//! Code that runs on devices: hashes of chunks that lie in their memory.
#![expect(unsafe_code, reason = "calls of the driver")]

use core::ffi::{c_int, c_void, CStr};

use super::api::{self, CUfunction, CUmodule, KernelCalls};
use super::device::Device;
use super::stream::{enter_to_drop, Stream};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;

/// What scripts/kernels makes of hash.cu; the driver makes code for its device of that. Ends with a NUL, as it wants it.
const HASH: &str = concat!(include_str!("hash.ptx"), "\0");
const HASH_NAME: &CStr = c"pccheck_hash_chunks";
/// `THREADS` of hash.cu.
const HASH_THREADS: u32 = 288;

/// What chunks are multiples of.
const UNIT_BYTES: u64 = 4096;
/// What addresses are multiples of: the device loads so much at a time. Of a hash, the size.
const HASH_BYTES: u64 = 16;
/// Most thread blocks of a launch, each of which hashes a chunk.
const MOST_CHUNKS: u64 = i32::MAX as u64;

const OP_LOAD: &str = "load code for the GPU";
const OP_HASH: &str = "hash chunks on the GPU";

/// Hashes chunks in a device's memory: XXH3-128, as [`ChunkHasher`](crate::persist::ChunkHasher) does.
pub struct Hasher {
    module: CUmodule,
    function: CUfunction,
    calls: KernelCalls,
    device: Arc<Device>,
}

// SAFETY: modules and functions may be used from any thread.
unsafe impl Send for Hasher {}
// SAFETY: as above: the struct is never changed.
unsafe impl Sync for Hasher {}

impl Hasher {
    /// Loads the code. The driver compiles it, which it remembers on disk, and may wait for all that runs on the device, as
    /// for an allocation; so it may when the hasher is dropped.
    ///
    /// # Errors
    ///
    /// `Unsupported` where the driver or the device cannot run it, `Device` where the driver reports another failure.
    pub fn new(device: &Arc<Device>) -> Result<Hasher> {
        let lacking = || Error::new(ErrorKind::Unsupported, OP_LOAD, "the driver lacks calls for it");
        let calls = device.api.kernels.ok_or_else(lacking)?;
        let _in_context = device.enter()?;
        let mut module: CUmodule = core::ptr::null_mut();
        // SAFETY: a place for a module, and a text that ends with a NUL.
        let code = unsafe { (calls.load)(&raw mut module, HASH.as_ptr().cast::<c_void>()) };
        check_load(device, code)?;
        // From here on it is unloaded however this ends.
        let mut hasher = Hasher { module, function: core::ptr::null_mut(), calls, device: device.clone() };
        // Where the driver loads lazily, its default, it is this call that loads the kernel (CUDA C++ Programming Guide, "Lazy
        // Loading"): the first launch then finds it there and waits for nothing.
        // SAFETY: a place for a function, and a module that lives.
        let code = unsafe { (calls.function)(&raw mut hasher.function, module, HASH_NAME.as_ptr()) };
        check_load(device, code)?;
        Ok(hasher)
    }

    /// The device whose memory it reads.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Enqueues the hashing of `count` chunks of `chunk_bytes` (a multiple of 4096) that lie one behind the other from `base` on.
    /// Their hashes go to `out` on the same device, 16 bytes each in little-endian order. Both addresses are multiples of 16.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` and `TooLarge` before anything is enqueued; `Device` where the driver reports a failure.
    ///
    /// # Safety
    ///
    /// Chunks and hashes are memory that the device can read and write, and do not overlap. Until the stream has come past this,
    /// they stay so, nothing else changes the chunks, and the hasher lives.
    pub unsafe fn hash(
        &self,
        stream: &Stream,
        base: u64,
        chunk_bytes: u64,
        count: u64,
        out: u64,
    ) -> Result<()> {
        check_chunks(base, chunk_bytes, count, out)?;
        if !Arc::ptr_eq(stream.device(), &self.device) {
            return Err(Error::new(ErrorKind::InvalidArgument, OP_HASH, "the stream is another GPU's"));
        }
        if count == 0 {
            return Ok(());
        }
        let (mut base, mut chunk_bytes, mut chunks, mut out) = (base, chunk_bytes, count, out);
        // In the order of the kernel's parameters, all of 8 bytes.
        let mut places: [*mut c_void; 4] = [
            (&raw mut base).cast(),
            (&raw mut chunk_bytes).cast(),
            (&raw mut chunks).cast(),
            (&raw mut out).cast(),
        ];
        let _in_context = self.device.enter()?;
        // SAFETY: function and stream live, the driver copies the parameters before it returns, and what the kernel reads and
        // writes is the caller's promise.
        let code = unsafe {
            (self.calls.launch)(
                self.function,
                count as u32,
                1,
                1,
                HASH_THREADS,
                1,
                1,
                0,
                stream.handle,
                places.as_mut_ptr(),
                core::ptr::null_mut(),
            )
        };
        self.device.api.check(OP_HASH, code)
    }
}

impl Drop for Hasher {
    fn drop(&mut self) {
        if let Some(_in_context) = enter_to_drop(&self.device) {
            // SAFETY: loaded in `new`; what was enqueued is done, as `hash` has its callers promise.
            let _ = unsafe { (self.calls.unload)(self.module) };
        }
    }
}

/// The result of a call that loads code.
fn check_load(device: &Device, code: c_int) -> Result<()> {
    let advice = match code {
        api::NO_CODE_FOR_DEVICE => "it runs on GPUs from Turing (compute capability 7.5) on",
        api::NEWER_CODE => "install a driver of CUDA 12.0 or later",
        api::NO_COMPILER => "install the driver's libnvidia-ptxjitcompiler",
        api::COMPILER_IS_OFF => "unset CUDA_DISABLE_PTX_JIT",
        code => return device.api.check(OP_LOAD, code),
    };
    Err(device.api.error(OP_LOAD, code).with_kind(ErrorKind::Unsupported).advise(advice))
}

fn check_chunks(base: u64, chunk_bytes: u64, count: u64, out: u64) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, OP_HASH, message));
    if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(UNIT_BYTES) {
        return invalid(format!("chunks of {chunk_bytes} bytes: expected a multiple of {UNIT_BYTES}"));
    }
    for (what, address) in [("chunks", base), ("hashes", out)] {
        if address == 0 || !address.is_multiple_of(HASH_BYTES) {
            return invalid(format!("{what} at {address:#x}: expected a multiple of {HASH_BYTES}"));
        }
    }
    let end = |start: u64, each: u64| start.checked_add(each.checked_mul(count)?);
    if count > MOST_CHUNKS || end(base, chunk_bytes).is_none() || end(out, HASH_BYTES).is_none() {
        return Err(Error::new(
            ErrorKind::TooLarge,
            OP_HASH,
            format!("{count} chunks of {chunk_bytes} bytes"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `scripts/kernels --check` compares with what the compiler gives; this needs none, and sees that it was forgotten.
    #[test]
    fn the_code_was_made_of_the_source_that_is_here() {
        let fnv = |mark: u64, byte: &u8| (mark ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        let mark = include_bytes!("hash.cu").iter().fold(0xcbf2_9ce4_8422_2325, fnv);
        let first = HASH.lines().next().expect("a line");
        assert_eq!(
            first,
            format!("// Made by scripts/kernels of hash.cu: {mark:016x}"),
            "run scripts/kernels"
        );
    }

    #[test]
    fn the_code_has_the_entry_that_is_launched() {
        let name = HASH_NAME.to_str().expect("UTF-8");
        let (_, entry) = HASH.split_once(&format!(".visible .entry {name}(")).expect("the entry");
        let (parameters, rest) = entry.split_once(')').expect("its parameters");
        assert_eq!(parameters.matches(".param .u64").count(), 4);
        assert!(rest.trim_start().starts_with(&format!(".maxntid {HASH_THREADS}, 1, 1")));
        assert!(!HASH.trim_end_matches('\0').contains('\0'));
    }
}
