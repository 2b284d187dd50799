//! Beginning saves: from named tensors in memory, or as a raw stream.

use std::collections::HashMap;

use super::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    chunk_hash, plan, plan_raw, Dtype, Layout, PayloadPlan, TensorSpec, HEADER_HASHED, RAW_STREAM,
};
use crate::save::{deadline_in, Origin, RawChunks, RawSave, Save, SaveOptions, SaveSpec};
use crate::source::{HostSegment, HostSource};
use crate::sync::Arc;

/// A named tensor in host memory, by address.
#[derive(Debug, Clone, Copy)]
pub struct HostTensor<'a> {
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
    /// (with success or any error but `TimedOut`), or the `Save` was dropped.
    #[expect(unsafe_code, reason = "the caller promises that the memory outlives the copy")]
    pub unsafe fn begin_save(
        &self,
        step: u64,
        tensors: &[HostTensor<'_>],
        metadata: &[(&str, &str)],
        options: impl Into<SaveOptions>,
    ) -> Result<Save> {
        let options = options.into();
        let saver = self.writer("begin save")?;
        tensors.iter().try_for_each(check_memory)?;
        let specs = specs_of(tensors)?;
        let plan = plan(&specs, metadata)?;
        self.check_fits(plan.payload_bytes)?;
        let spec = spec_of(step, &plan, 0, &options);
        // SAFETY: the caller's promise is the one that `HostSource::new` asks for: the source is dropped before
        // `copied` is told, and on failure before `wait_copied` returns.
        let source = unsafe { source_of(plan, tensors) };
        let core = saver.begin(spec, Origin::Source(Arc::new(source)), deadline_in(options.wait))?;
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
        let host: Vec<HostTensor<'_>> = tensors
            .iter()
            .map(|t| HostTensor {
                name: t.name,
                dtype: t.dtype,
                shape: t.shape,
                ptr: t.data.as_ptr(),
                bytes: t.data.len() as u64,
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
    pub fn payload_bytes(tensors: &[HostTensor<'_>], metadata: &[(&str, &str)]) -> Result<u64> {
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
            return Ok(());
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

/// Header, tensors and any metadata that had no room in the header, in payload order.
///
/// # Safety
///
/// As [`HostSource::new`], for the memory of all tensors.
#[expect(unsafe_code, reason = "passes the caller's promise on")]
unsafe fn source_of(plan: PayloadPlan, tensors: &[HostTensor<'_>]) -> HostSource {
    let mut placed: Vec<(u64, HostSegment)> = plan
        .order
        .iter()
        .map(|&index| {
            let tensor = &tensors[index];
            (plan.placements[index], HostSegment { ptr: tensor.ptr, len: tensor.bytes as usize })
        })
        .collect();
    let metadata = plan.metadata_tensor.map_or(Vec::new(), |metadata| {
        placed.push((metadata.offset, HostSegment { ptr: metadata.data.as_ptr(), len: metadata.data.len() }));
        metadata.data
    });
    // Empty tensors share the place of what follows them.
    placed.sort_by_key(|(offset, segment)| (*offset, segment.len));
    let segments = placed.into_iter().map(|(_, segment)| segment).collect();
    // SAFETY: the tensors by the caller's promise; the metadata's buffer moves into the source, its bytes stay.
    unsafe { HostSource::new(plan.header, segments, metadata) }
}

/// Refuses memory that cannot be read.
fn check_memory(tensor: &HostTensor<'_>) -> Result<()> {
    if tensor.ptr.is_null() && tensor.bytes > 0 {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "begin save",
            format!("tensor {:?} has {} bytes and a null pointer", tensor.name, tensor.bytes),
        ));
    }
    Ok(())
}

/// Checks addresses and finds tied tensors.
fn specs_of<'a>(tensors: &'a [HostTensor<'a>]) -> Result<Vec<TensorSpec<'a>>> {
    let mut seen: HashMap<(usize, u64, u32, &[u64]), usize> = HashMap::with_capacity(tensors.len());
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
        let key = (tensor.ptr as usize, tensor.bytes, tensor.dtype.code(), tensor.shape);
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
