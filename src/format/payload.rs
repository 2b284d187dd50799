//! Planning a payload: which safetensors file a set of tensors becomes, before a byte of it is copied.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::codec::round_up;
use super::header::{Shape, StoredHeader, StoredTensor, LENGTH_BYTES};
use super::layout::MAX_REGION_BYTES;
use super::record::MAX_HEADER_BYTES;
use super::{Dtype, BLOCK_BYTES, MAX_METADATA_BYTES, MAX_NAME_BYTES, MAX_RANK, MAX_TENSORS};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Mutex};

const OP: &str = "plan payload";

/// No more JSON than this is kept from save to save.
const KEPT_MAX_BYTES: usize = 16 << 20;

/// The entry of a safetensors header that holds metadata; no tensor may have this name.
pub const METADATA_ENTRY: &str = "__metadata__";

/// Tensor names that start so are the format's own.
pub const RESERVED_NAME_PREFIX: &str = "__pccheck_";

/// The U8 tensor that holds the user's metadata when the header has no room for it.
pub const METADATA_TENSOR_NAME: &str = "__pccheck_metadata__";

/// The one tensor of a raw streaming save.
pub const RAW_TENSOR_NAME: &str = "raw";

/// Metadata keys that start so are the format's own.
pub const RESERVED_KEY_PREFIX: &str = "pccheck.";

/// Key: JSON object from the name of each tied tensor to what it is tied to, its dtype and its shape.
pub const KEY_TIED: &str = "pccheck.tied";

/// Key: JSON array of the names of tensors of complex128, stored as F64 with a trailing dimension of 2.
pub const KEY_COMPLEX128: &str = "pccheck.complex128";

/// Key: name of the tensor that holds the user's metadata.
pub const KEY_METADATA_TENSOR: &str = "pccheck.metadata_tensor";

/// Key: present (with the value `1`) in a raw streaming save.
pub const KEY_RAW: &str = "pccheck.raw";

/// One tensor to save.
#[derive(Debug, Clone, Copy)]
pub struct TensorSpec<'a> {
    /// Name, unique, at most [`MAX_NAME_BYTES`] bytes.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major; empty for a scalar.
    pub shape: &'a [u64],
    /// Length in bytes: must be what dtype and shape make it.
    pub bytes: u64,
    /// Index of the tensor that shares this one's storage, if it is tied: it is not stored again. That tensor
    /// must have the same number of bytes and must not be tied itself.
    pub alias_of: Option<usize>,
}

/// Metadata that did not fit in the header and must be written like a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataTensor {
    /// Byte offset in the payload.
    pub offset: u64,
    /// The bytes to write there.
    pub data: Vec<u8>,
}

/// The file that a set of tensors becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PayloadPlan {
    /// Length and JSON, padded with spaces to a multiple of [`BLOCK_BYTES`]; tensor data starts at its end.
    pub header: Vec<u8>,
    /// Bytes of the whole file.
    pub payload_bytes: u64,
    /// Absolute offset in the payload of each tensor, in the order given; tied tensors have their target's.
    pub placements: Vec<u64>,
    /// Indices of the stored tensors, in payload order.
    pub order: Vec<usize>,
    /// Metadata to write among the tensors, when the header had no room for it.
    pub metadata_tensor: Option<MetadataTensor>,
    /// Tensors in the header, for the slot record.
    pub tensor_count: u32,
}

/// Value of [`KEY_TIED`] for one tensor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Tie {
    pub of: String,
    pub dtype: String,
    pub shape: Shape,
}

/// Plans the file for `tensors` and the user's `metadata`.
///
/// Stored tensors lie without holes, by descending dtype alignment, then name, so that each is naturally aligned.
///
/// # Errors
///
/// `InvalidArgument` for an empty, duplicate, reserved or over-long name, a size that is not what dtype and
/// shape make it, an impossible tie, a duplicate or reserved metadata key; `TooLarge` when a limit is passed.
pub fn plan(tensors: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<PayloadPlan> {
    check_tensors(tensors)?;
    let metadata = check_metadata(metadata)?;
    plan_within(tensors, metadata, own_metadata(tensors)?, MAX_HEADER_BYTES)
}

/// Plans one save after the other: what depends on the tensors alone is kept as long as they are the same but for their memory.
#[derive(Default)]
pub struct Planner(Mutex<Option<Arc<Known>>>);

impl Planner {
    /// As [`plan`].
    pub fn plan(&self, tensors: &[TensorSpec], metadata: &[(&str, &str)]) -> Result<PayloadPlan> {
        let known = self.0.lock().clone().filter(|known| known.is_of(tensors));
        let known = match known {
            Some(known) => Some(known),
            None => {
                check_tensors(tensors)?;
                let known = Known::of(tensors)?.map(Arc::new);
                *self.0.lock() = known.clone().filter(|known| known.json.len() <= KEPT_MAX_BYTES);
                known
            }
        };
        let metadata = check_metadata(metadata)?;
        if let Some(known) = known {
            let mut all = metadata.clone();
            all.extend(known.own.clone());
            let header = known.header(&all)?;
            if header.len() as u64 <= MAX_HEADER_BYTES {
                return known.arranged.plan(tensors, header, None);
            }
        }
        plan_within(tensors, metadata, own_metadata(tensors)?, MAX_HEADER_BYTES)
    }
}

/// Plans the file of a raw streaming save: one U8 tensor of `bytes` bytes called [`RAW_TENSOR_NAME`].
///
/// # Errors
///
/// As [`plan`].
pub fn plan_raw(bytes: u64, metadata: &[(&str, &str)]) -> Result<PayloadPlan> {
    // Readers count in bits.
    Dtype::U8.tensor_bytes(&[bytes]).map_err(|reason| too_large(format!("a raw save: {reason}")))?;
    let spec = TensorSpec { name: RAW_TENSOR_NAME, dtype: Dtype::U8, shape: &[bytes], bytes, alias_of: None };
    let metadata = check_metadata(metadata)?;
    let own = BTreeMap::from([(KEY_RAW.to_owned(), "1".to_owned())]);
    plan_within(&[spec], metadata, own, MAX_HEADER_BYTES)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, OP, message)
}

fn too_large(message: String) -> Error {
    Error::new(ErrorKind::TooLarge, OP, message)
}

fn check_tensors(tensors: &[TensorSpec]) -> Result<()> {
    if tensors.len() > MAX_TENSORS {
        return Err(too_large(format!("expected at most {MAX_TENSORS} tensors, found {}", tensors.len())));
    }
    let mut names = HashSet::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        let name = tensor.name;
        if name.is_empty() {
            return Err(invalid(format!("tensor {index} has an empty name")));
        }
        if name.len() > MAX_NAME_BYTES {
            return Err(invalid(format!(
                "the name of tensor {index} has {} bytes, the limit is {MAX_NAME_BYTES}",
                name.len()
            )));
        }
        if name == METADATA_ENTRY || name.starts_with(RESERVED_NAME_PREFIX) {
            return Err(invalid(format!("tensor name {name:?} is reserved")));
        }
        if !names.insert(name) {
            return Err(invalid(format!("two tensors are called {name:?}")));
        }
        if tensor.shape.len() > MAX_RANK {
            return Err(invalid(format!(
                "tensor {name:?} has {} dimensions, the limit is {MAX_RANK}",
                tensor.shape.len()
            )));
        }
        let bytes = tensor
            .dtype
            .tensor_bytes(tensor.shape)
            .map_err(|reason| invalid(format!("tensor {name:?}: {reason}")))?;
        if bytes != tensor.bytes {
            return Err(invalid(format!(
                "tensor {name:?} of {} {:?} has {bytes} bytes, {} were given",
                tensor.dtype.name(),
                tensor.shape,
                tensor.bytes
            )));
        }
        if let Some(target) = tensor.alias_of {
            let fits = tensors
                .get(target)
                .is_some_and(|target| target.alias_of.is_none() && target.bytes == tensor.bytes);
            if !fits {
                return Err(invalid(format!(
                    "tensor {name:?} is tied to tensor {target}, which is not a stored tensor of {} bytes",
                    tensor.bytes
                )));
            }
        }
    }
    Ok(())
}

fn check_metadata(metadata: &[(&str, &str)]) -> Result<BTreeMap<String, String>> {
    let mut checked = BTreeMap::new();
    for &(key, value) in metadata {
        if key.starts_with(RESERVED_KEY_PREFIX) {
            return Err(invalid(format!("metadata key {key:?} is reserved")));
        }
        if checked.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(invalid(format!("two metadata values have the key {key:?}")));
        }
    }
    Ok(checked)
}

/// The keys that describe what safetensors itself cannot.
fn own_metadata(tensors: &[TensorSpec]) -> Result<BTreeMap<String, String>> {
    let mut complex: Vec<&str> = Vec::new();
    let mut ties: BTreeMap<&str, Tie> = BTreeMap::new();
    for tensor in tensors {
        if let Some(target) = tensor.alias_of {
            let tie = Tie {
                of: tensors[target].name.to_owned(),
                dtype: tensor.dtype.name().to_owned(),
                shape: Shape(tensor.shape.to_vec()),
            };
            ties.insert(tensor.name, tie);
        } else if tensor.dtype == Dtype::C128 {
            complex.push(tensor.name);
        }
    }
    complex.sort_unstable();
    let mut own = BTreeMap::new();
    if !complex.is_empty() {
        own.insert(KEY_COMPLEX128.to_owned(), to_json(&complex)?);
    }
    if !ties.is_empty() {
        own.insert(KEY_TIED.to_owned(), to_json(&ties)?);
    }
    Ok(own)
}

fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Error::new(ErrorKind::Internal, OP, error.to_string()))
}

/// Lays out checked tensors; the user's metadata moves to a tensor when the header would pass `limit_bytes`.
fn plan_within(
    tensors: &[TensorSpec],
    user: BTreeMap<String, String>,
    own: BTreeMap<String, String>,
    limit_bytes: u64,
) -> Result<PayloadPlan> {
    let mut metadata = user.clone();
    metadata.extend(own.clone());
    let inline = arrange_and_plan(tensors, metadata, None)?;
    if inline.header.len() as u64 <= limit_bytes {
        return Ok(inline);
    }
    let mut header_bytes = inline.header.len();
    if !user.is_empty() {
        let mut metadata = own;
        metadata.insert(KEY_METADATA_TENSOR.to_owned(), METADATA_TENSOR_NAME.to_owned());
        let moved = to_json(&user)?.into_bytes();
        if moved.len() as u64 > MAX_METADATA_BYTES {
            return Err(too_large(format!(
                "the metadata has {} bytes of JSON, the limit is {MAX_METADATA_BYTES}",
                moved.len()
            )));
        }
        let outside = arrange_and_plan(tensors, metadata, Some(moved))?;
        if outside.header.len() as u64 <= limit_bytes {
            return Ok(outside);
        }
        header_bytes = outside.header.len();
    }
    Err(too_large(format!(
        "the names and shapes of {} tensors make a header of {header_bytes} bytes, the limit is {limit_bytes}",
        tensors.len()
    )))
}

/// Orders and places the stored tensors, with the moved metadata among them, and writes the header.
fn arrange_and_plan(
    tensors: &[TensorSpec],
    metadata: BTreeMap<String, String>,
    moved: Option<Vec<u8>>,
) -> Result<PayloadPlan> {
    let (stored, arranged) = arrange(tensors, metadata, moved.as_deref())?;
    arranged.plan(tensors, header_bytes(&stored)?, moved)
}

/// Orders and places the stored tensors, with the moved metadata among them.
fn arrange(
    tensors: &[TensorSpec],
    metadata: BTreeMap<String, String>,
    moved: Option<&[u8]>,
) -> Result<(StoredHeader, Arranged)> {
    // The moved metadata stands in the order like a tensor; `None` is its index.
    let mut entries: Vec<(Reverse<u64>, &str, Option<usize>)> = tensors
        .iter()
        .enumerate()
        .filter(|(_, tensor)| tensor.alias_of.is_none())
        .map(|(index, tensor)| (Reverse(tensor.dtype.alignment()), tensor.name, Some(index)))
        .collect();
    if moved.is_some() {
        entries.push((Reverse(Dtype::U8.alignment()), METADATA_TENSOR_NAME, None));
    }
    entries.sort_unstable();
    if entries.len() > MAX_TENSORS {
        return Err(too_large(format!("expected at most {MAX_TENSORS} tensors, found {}", entries.len())));
    }

    let moved_bytes = moved.as_ref().map_or(0, |data| data.len() as u64);
    let mut stored = StoredHeader { metadata, tensors: Vec::with_capacity(entries.len()) };
    let mut begins = vec![0; tensors.len()];
    let mut order = Vec::with_capacity(entries.len());
    let mut moved_begin = 0;
    let mut next = 0u64;
    for &(_, name, index) in &entries {
        let (dtype, mut shape, bytes) = match index {
            Some(index) => (tensors[index].dtype, tensors[index].shape.to_vec(), tensors[index].bytes),
            None => (Dtype::U8, vec![moved_bytes], moved_bytes),
        };
        if dtype == Dtype::C128 {
            shape.push(2);
        }
        let end =
            next.checked_add(bytes).ok_or_else(|| too_large("the sum of all sizes overflows".to_owned()))?;
        let entry = StoredTensor { dtype: dtype.stored(), shape: Shape(shape), data_offsets: (next, end) };
        stored.tensors.push((name.to_owned(), entry));
        match index {
            Some(index) => {
                begins[index] = next;
                order.push(index);
            }
            None => moved_begin = next,
        }
        next = end;
    }

    let tensor_count = entries.len() as u32;
    Ok((stored, Arranged { begins, order, moved_begin, bytes: next, tensor_count }))
}

/// Where tensors are, from the end of the header on.
struct Arranged {
    begins: Vec<u64>,
    order: Vec<usize>,
    moved_begin: u64,
    bytes: u64,
    tensor_count: u32,
}

impl Arranged {
    fn plan(&self, tensors: &[TensorSpec], header: Vec<u8>, moved: Option<Vec<u8>>) -> Result<PayloadPlan> {
        let (bytes, data_offset) = (self.bytes, header.len() as u64);
        let payload_bytes =
            bytes.checked_add(data_offset).filter(|&bytes| bytes <= MAX_REGION_BYTES).ok_or_else(|| {
                too_large(format!("{bytes} bytes of tensors pass the largest region, {MAX_REGION_BYTES}"))
            })?;
        let placements = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| data_offset + self.begins[tensor.alias_of.unwrap_or(index)])
            .collect();
        Ok(PayloadPlan {
            header,
            payload_bytes,
            placements,
            order: self.order.clone(),
            metadata_tensor: moved
                .map(|data| MetadataTensor { offset: data_offset + self.moved_begin, data }),
            tensor_count: self.tensor_count,
        })
    }
}

/// Length and JSON, padded with spaces to whole blocks.
fn header_bytes(stored: &StoredHeader) -> Result<Vec<u8>> {
    let mut header = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut header, stored)
        .map_err(|error| Error::new(ErrorKind::Internal, OP, error.to_string()))?;
    pad_header(header)
}

/// Pads the JSON behind the room for its length, and writes that.
fn pad_header(mut header: Vec<u8>) -> Result<Vec<u8>> {
    let padded = round_up(header.len() as u64, BLOCK_BYTES)
        .and_then(|bytes| usize::try_from(bytes).ok())
        .ok_or_else(|| too_large("the header overflows".to_owned()))?;
    header.resize(padded, b' ');
    let json_bytes = (padded - LENGTH_BYTES) as u64;
    header[..LENGTH_BYTES].copy_from_slice(&json_bytes.to_le_bytes());
    Ok(header)
}

/// What of a plan depends on the tensors alone, and by what they are known again. Names and shapes one behind the other: they are
/// compared in one pass over little memory, at every save.
struct Known {
    names: String,
    shapes: Vec<u64>,
    /// Of each: where its name and its shape end, dtype, bytes, and what it is tied to.
    tensors: Vec<(usize, usize, Dtype, u64, Option<usize>)>,
    arranged: Arranged,
    own: BTreeMap<String, String>,
    /// The tensors' part of the JSON, without braces.
    json: Vec<u8>,
}

impl Known {
    /// Of tensors that were checked; none where metadata alone would be kept.
    fn of(tensors: &[TensorSpec]) -> Result<Option<Known>> {
        let (stored, arranged) = arrange(tensors, BTreeMap::new(), None)?;
        let mut json = to_json(&stored)?.into_bytes();
        let braces = json.len() >= 2 && json.pop() == Some(b'}') && json.remove(0) == b'{';
        if !braces || json.is_empty() {
            return Ok(None);
        }
        let mut known = Known {
            names: String::new(),
            shapes: Vec::new(),
            tensors: Vec::new(),
            arranged,
            own: own_metadata(tensors)?,
            json,
        };
        for tensor in tensors {
            known.names.push_str(tensor.name);
            known.shapes.extend_from_slice(tensor.shape);
            let ends = (known.names.len(), known.shapes.len());
            known.tensors.push((ends.0, ends.1, tensor.dtype, tensor.bytes, tensor.alias_of));
        }
        Ok(Some(known))
    }

    /// Whether all that a plan looks at is the same.
    fn is_of(&self, tensors: &[TensorSpec]) -> bool {
        let (mut name, mut shape) = (0, 0);
        self.tensors.len() == tensors.len()
            && self.tensors.iter().zip(tensors).all(
                |(&(name_end, shape_end, dtype, bytes, alias_of), tensor)| {
                    let known = (&self.names.as_bytes()[name..name_end], &self.shapes[shape..shape_end]);
                    (name, shape) = (name_end, shape_end);
                    known == (tensor.name.as_bytes(), tensor.shape)
                        && (dtype, bytes, alias_of) == (tensor.dtype, tensor.bytes, tensor.alias_of)
                },
            )
    }

    /// What [`header_bytes`] gives with this metadata.
    fn header(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        let mut header = Vec::with_capacity(self.json.len() + BLOCK_BYTES as usize);
        header.resize(LENGTH_BYTES, 0);
        header.push(b'{');
        if !metadata.is_empty() {
            header.extend_from_slice(format!("\"{METADATA_ENTRY}\":").as_bytes());
            serde_json::to_writer(&mut header, metadata)
                .map_err(|error| Error::new(ErrorKind::Internal, OP, error.to_string()))?;
            header.push(b',');
        }
        header.extend_from_slice(&self.json);
        header.push(b'}');
        pad_header(header)
    }
}

#[cfg(test)]
#[path = "payload_test.rs"]
mod tests;
