//! Beginning saves: from named tensors in memory, or as a raw stream.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::Store;
#[cfg(feature = "cuda")]
use crate::cuda::{Device, Relaxed, UserStream};
use crate::error::{Error, ErrorKind, Result};
use crate::format::layout::check_chunk_count;
use crate::format::{
    chunk_hash, plan, plan_raw, Dtype, Layout, PayloadPlan, TensorSpec, HEADER_HASHED, RAW_STREAM,
};
use crate::save::{deadline_in, Origin, RawChunks, RawSave, Save, SaveOptions, SaveSpec, Saver};
#[cfg(feature = "cuda")]
use crate::save::{DevicePart, DirectStorage, Snapshot};
#[cfg(feature = "cuda")]
use crate::source::DeviceSource;
use crate::source::{HostSegment, HostSource};
use crate::sync::Arc;

/// A named tensor by address.
#[derive(Debug, Clone, Copy)]
pub struct TensorAt<'a> {
    /// Unique, not empty, UTF-8.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: &'a [u64],
    /// First byte; may be null where `bytes` is 0. Row-major, contiguous, any alignment.
    pub ptr: *const u8,
    /// Size in bytes: product of the shape times the element size.
    pub bytes: u64,
    /// The GPU whose memory it is in, as CUDA counts them in this process; none: host memory.
    pub device: Option<u32>,
}

/// A named tensor as a borrowed slice.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Unique, not empty.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: &'a [u64],
    /// Row-major, contiguous bytes.
    pub data: &'a [u8],
}

impl Store {
    /// Begins a save and returns at once, or when a slot is free.
    ///
    /// What is saved is the memory as it is now. Tensors with the same address, size, type and shape are stored once.
    ///
    /// # Safety
    ///
    /// Every tensor's memory must stay valid for reads and must not change until [`Save::wait_copied`] returned
    /// (with success or any error but `TimedOut`), or the `Save` was dropped. Memory of GPUs must not be changed by work
    /// that does not come after [`Save::stream_wait_copied`] or that moment; what was enqueued on
    /// [`DeviceOptions::stream`](crate::save::DeviceOptions::stream) before this call may still be changing it, and is
    /// waited for. That stream must be as [`UserStream::new`](crate::cuda::UserStream::new) asks, during this call.
    ///
    /// # Errors
    ///
    /// For tensors on GPUs also: `Unsupported` where this system or this build has none; `InvalidArgument` where memory is
    /// not that GPU's (where a save before was of the same memory, the save fails so); `Device` where the driver reports a failure.
    #[expect(unsafe_code, reason = "the caller promises that the memory outlives the copy")]
    pub unsafe fn begin_save(
        &self,
        step: u64,
        tensors: &[TensorAt<'_>],
        metadata: &[(&str, &str)],
        options: impl Into<SaveOptions>,
    ) -> Result<Save> {
        let options = options.into();
        let saver = self.writer("begin save")?;
        tensors.iter().try_for_each(check_memory)?;
        let specs = specs_of(tensors)?;
        let plan = self.planner.plan(&specs, metadata)?;
        self.check_fits(plan.payload_bytes)?;
        let spec = spec_of(step, &plan, 0, &options);
        // SAFETY: the caller's promise is the one that is asked for: the source is dropped before `copied` is told, and
        // on failure before `wait_copied` returns.
        let origin = unsafe { origin_of(saver, plan, tensors, &options) }?;
        let core = saver.begin(spec, origin, deadline_in(options.wait))?;
        Ok(Save::new(core))
    }

    /// Saves borrowed tensors: returns when they are copied, and may change again. Not yet durable.
    ///
    /// With [`SaveOptions::confirm`] it goes on to durable only when the returned save is confirmed.
    pub fn save(
        &self,
        step: u64,
        tensors: &[Tensor<'_>],
        metadata: &[(&str, &str)],
        options: impl Into<SaveOptions>,
    ) -> Result<Save> {
        let host: Vec<TensorAt<'_>> = tensors
            .iter()
            .map(|t| TensorAt {
                name: t.name,
                dtype: t.dtype,
                shape: t.shape,
                ptr: t.data.as_ptr(),
                bytes: t.data.len() as u64,
                device: None,
            })
            .collect();
        // SAFETY: the borrows outlive this call, which ends after `wait_copied`; were it to unwind, dropping
        // the save waits as well.
        #[expect(unsafe_code, reason = "waits for `copied` before the borrows end")]
        let save = unsafe { self.begin_save(step, &host, metadata, options) }?;
        save.wait_copied(None)?;
        Ok(save)
    }

    /// Begins a raw save of exactly `data_bytes` bytes, stored as one U8 tensor (see `format::payload::RAW_TENSOR_NAME`).
    ///
    /// `options.wait` bounds the wait for a slot, and then each wait of [`RawSave::write_at`] for room to copy to (where it is 0,
    /// those are bounded by 10 s): `TimedOut` is then the end of the save.
    pub fn begin_raw(
        &self,
        step: u64,
        data_bytes: u64,
        metadata: &[(&str, &str)],
        options: impl Into<SaveOptions>,
    ) -> Result<RawSave> {
        let how = options.into();
        let saver = self.writer("begin raw save")?;
        let plan = plan_raw(data_bytes, metadata)?;
        self.check_fits(plan.payload_bytes)?;
        let options = self.region().options();
        // One buffer always circulates, so that other saves and loads move on whatever raw writers do.
        let share = (self.region().pool().buffer_count() - 1) / options.max_in_flight as usize;
        let chunks =
            Arc::new(RawChunks::new(share, how.wait, plan.payload_bytes.div_ceil(options.chunk_bytes)));
        let spec = spec_of(step, &plan, RAW_STREAM, &how);
        let core = saver.begin(spec, Origin::Raw(chunks.clone()), deadline_in(how.wait))?;
        RawSave::new(Save::new(core), saver.shared().clone(), chunks, &plan)
    }

    /// Payload bytes that a save of these tensors takes: what the slot must hold. Their memory may not exist yet: a
    /// tensor whose address is null is counted as one that shares its bytes with no other.
    pub fn payload_bytes(tensors: &[TensorAt<'_>], metadata: &[(&str, &str)]) -> Result<u64> {
        Ok(plan(&specs_of(tensors)?, metadata)?.payload_bytes)
    }

    /// Payload bytes that a raw save of so many bytes takes.
    pub fn raw_payload_bytes(data_bytes: u64, metadata: &[(&str, &str)]) -> Result<u64> {
        Ok(plan_raw(data_bytes, metadata)?.payload_bytes)
    }

    fn check_fits(&self, payload_bytes: u64) -> Result<()> {
        let layout = self.region().layout();
        let needed = Layout::slot_bytes_for(payload_bytes, self.region().options().chunk_bytes)?;
        if needed <= layout.slot_bytes {
            return check_chunk_count(payload_bytes, self.region().options().chunk_bytes).map_err(
                |message| {
                    Error::new(ErrorKind::TooLarge, "begin save", message)
                        .at_path(self.region().path())
                        .advise("open the region with larger chunks (chunk_bytes)")
                },
            );
        }
        Err(Error::new(
            ErrorKind::TooLarge,
            "begin save",
            format!(
                "the state takes {payload_bytes} bytes of payload ({needed} with its chunk table), a slot holds {}",
                layout.slot_bytes
            ),
        )
        .at_path(self.region().path())
        .advise("grow the region to the size of the state"))
    }
}

fn spec_of(step: u64, plan: &PayloadPlan, flags: u32, how: &SaveOptions) -> SaveSpec {
    SaveSpec {
        step,
        payload_bytes: plan.payload_bytes,
        header_bytes: plan.header.len() as u64,
        header_hash: chunk_hash(&plan.header),
        tensor_count: plan.tensor_count,
        flags: flags | HEADER_HASHED,
        confirm: how.confirm,
        pin: how.pin,
    }
}

/// Where the bytes of a save come from.
///
/// # Safety
///
/// As [`Store::begin_save`].
#[expect(unsafe_code, reason = "passes the caller's promise on")]
unsafe fn origin_of(
    saver: &Saver,
    plan: PayloadPlan,
    tensors: &[TensorAt<'_>],
    options: &SaveOptions,
) -> Result<Origin> {
    let placed = Placed::new(plan, tensors);
    if placed.owners.iter().any(Option::is_some) {
        // SAFETY: the caller's promise.
        return unsafe { device_origin(saver, placed, options) };
    }
    let Placed { header, segments, owned, .. } = placed;
    // SAFETY: the tensors by the caller's promise; the metadata's buffer moves into the source, its bytes stay.
    let source = unsafe { HostSource::new(header, segments, owned) };
    Ok(Origin::Source(Arc::new(source)))
}

/// # Safety
///
/// As [`Store::begin_save`].
#[cfg(feature = "cuda")]
#[expect(unsafe_code, reason = "passes the caller's promise on")]
unsafe fn device_origin(saver: &Saver, placed: Placed, options: &SaveOptions) -> Result<Origin> {
    if options.device.direct_storage == DirectStorage::Required
        && options.device.snapshot == Snapshot::Staging
    {
        let message = "direct_storage is required, and the snapshot is not to go into spare memory";
        return Err(Error::new(ErrorKind::InvalidArgument, "begin save", message)
            .advise("have the snapshot go into spare memory (spare or auto)"));
    }
    let Placed { header, segments, owners, owned } = placed;
    let _relaxed = Relaxed::enter()?;
    let mut ordinals: Vec<u32> = owners.iter().flatten().copied().collect();
    ordinals.sort_unstable();
    ordinals.dedup();
    let devices: Vec<_> = ordinals.iter().map(|&ordinal| Device::open(ordinal)).collect::<Result<_>>()?;
    let index_of = |owner: &Option<u32>| owner.and_then(|owner| ordinals.binary_search(&owner).ok());
    let owners: Vec<Option<usize>> = owners.iter().map(index_of).collect();
    let said = segments.iter().zip(&owners).filter_map(|(segment, owner)| {
        owner.map(|owner| (&devices[owner], segment.ptr as u64, segment.len as u64))
    });
    let asked = saver.shared().exchange.check_owners(said)?;
    // SAFETY: the caller's promise.
    let stream = unsafe { UserStream::new(options.device.stream as *mut _) };
    let after = stream.marks(&devices)?;
    // SAFETY: the caller's promise; the metadata's buffer moves into the source, its bytes stay.
    let source = unsafe { DeviceSource::new(header, segments, owned, owners, devices, after) };
    Ok(Origin::Device(DevicePart {
        source: Arc::new(source),
        snapshot: options.device.snapshot,
        direct_storage: options.device.direct_storage,
        flag_waits: options.device.flag_waits,
        timeout: options.device.timeout,
        asked,
        copies: Arc::default(),
    }))
}

/// # Safety
///
/// None is needed.
#[cfg(not(feature = "cuda"))]
#[expect(unsafe_code, reason = "has the signature of the one that it stands for")]
unsafe fn device_origin(_saver: &Saver, _placed: Placed, _options: &SaveOptions) -> Result<Origin> {
    Err(Error::new(ErrorKind::Unsupported, "begin save", "this build of the library knows no GPUs")
        .advise("build it with the feature cuda"))
}

/// Header, tensors and any metadata that had no room in the header, in payload order.
struct Placed {
    header: Vec<u8>,
    segments: Vec<HostSegment>,
    /// The GPU of each segment.
    owners: Vec<Option<u32>>,
    /// What one of the segments points into.
    owned: Vec<u8>,
}

impl Placed {
    fn new(plan: PayloadPlan, tensors: &[TensorAt<'_>]) -> Placed {
        let mut placed: Vec<(u64, HostSegment, Option<u32>)> = plan
            .order
            .iter()
            .map(|&index| {
                let tensor = &tensors[index];
                let segment = HostSegment { ptr: tensor.ptr, len: tensor.bytes as usize };
                // Where nothing is there is nothing to wait for either.
                (plan.placements[index], segment, tensor.device.filter(|_| segment.len > 0))
            })
            .collect();
        let owned = plan.metadata_tensor.map_or(Vec::new(), |metadata| {
            let segment = HostSegment { ptr: metadata.data.as_ptr(), len: metadata.data.len() };
            placed.push((metadata.offset, segment, None));
            metadata.data
        });
        // Empty tensors share the place of what follows them.
        placed.sort_by_key(|(offset, segment, _)| (*offset, segment.len));
        let (segments, owners) = placed.into_iter().map(|(_, segment, owner)| (segment, owner)).unzip();
        Placed { header: plan.header, segments, owners, owned }
    }
}

/// Refuses memory that cannot be read.
fn check_memory(tensor: &TensorAt<'_>) -> Result<()> {
    if tensor.ptr.is_null() && tensor.bytes > 0 {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "begin save",
            format!("tensor {:?} has {} bytes and a null pointer", tensor.name, tensor.bytes),
        ));
    }
    Ok(())
}

/// What tied tensors have in common: address, bytes, dtype, shape, GPU.
type Memory<'a> = (usize, u64, u32, &'a [u64], Option<u32>);

/// Quick, for keys that nobody chooses: addresses, of which the lowest bits are mostly zeros.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

/// Checks addresses and finds tied tensors.
fn specs_of<'a>(tensors: &'a [TensorAt<'a>]) -> Result<Vec<TensorSpec<'a>>> {
    let mut seen: HashMap<Memory<'a>, usize, BuildHasherDefault<AddressHasher>> =
        HashMap::with_capacity_and_hasher(tensors.len(), BuildHasherDefault::default());
    let mut specs = Vec::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        let end =
            usize::try_from(tensor.bytes).ok().and_then(|bytes| (tensor.ptr as usize).checked_add(bytes));
        if end.is_none() || tensor.bytes > isize::MAX as u64 {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "begin save",
                format!("tensor {:?} of {} bytes passes the end of memory", tensor.name, tensor.bytes),
            ));
        }
        let key = (tensor.ptr as usize, tensor.bytes, tensor.dtype.code(), tensor.shape, tensor.device);
        let alias_of = match tensor.bytes {
            0 => None,
            _ if tensor.ptr.is_null() => None,
            _ => seen.get(&key).copied(),
        };
        seen.entry(key).or_insert(index);
        specs.push(TensorSpec {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            bytes: tensor.bytes,
            alias_of,
        });
    }
    Ok(specs)
}
