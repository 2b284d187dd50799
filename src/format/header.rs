//! Reading the header of a payload: the JSON of a safetensors file, and what our own metadata keys add to it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::payload::{
    Tie, KEY_COMPLEX128, KEY_METADATA_TENSOR, KEY_RAW, KEY_TIED, METADATA_ENTRY, RESERVED_KEY_PREFIX,
};
use super::record::MIN_HEADER_BYTES;
use super::{Dtype, MAX_HEADER_JSON_BYTES, MAX_METADATA_BYTES, MAX_RANK, MAX_TENSORS};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "read payload header";

/// Bytes of the header length that a safetensors file starts with.
pub const LENGTH_BYTES: usize = 8;

/// Metadata that did not fit in the header: a JSON object of strings in a tensor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataPlace {
    /// Byte offset in the payload.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One tensor as the user saved it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, unique in the payload.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major; empty for a scalar.
    pub shape: Vec<u64>,
    /// Byte offset in the payload.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The stored tensor that shares these bytes, if this one was not stored itself.
    pub alias_of: Option<String>,
}

/// A payload as the user saved it: complex128 restored, tied tensors present, our own keys hidden.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Stored tensors in payload order, then tied tensors by name.
    pub tensors: Vec<TensorInfo>,
    /// The user's metadata. Incomplete while `metadata_place` is set: see [`Payload::load_metadata`].
    pub metadata: BTreeMap<String, String>,
    /// Where tensor data starts in the payload, in bytes.
    pub header_bytes: u64,
    /// Where further metadata lies, if it did not fit in the header.
    pub metadata_place: Option<MetadataPlace>,
    /// Whether this is a raw streaming save, whose one tensor is [`super::payload::RAW_TENSOR_NAME`].
    pub raw: bool,
}

impl Payload {
    /// The tensor called `name`. Linear in the number of tensors.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Adds the metadata found at `metadata_place`, which is then cleared.
    ///
    /// # Errors
    ///
    /// `Corrupt` when `bytes` has another length or is not a JSON object of strings; `InvalidState` when there is
    /// nothing to load.
    pub fn load_metadata(&mut self, bytes: &[u8]) -> Result<()> {
        let place = self.metadata_place.ok_or_else(|| {
            Error::new(ErrorKind::InvalidState, OP, "the metadata is complete: none is left to load")
        })?;
        if bytes.len() as u64 != place.bytes {
            return Err(corrupt(format!(
                "expected {} bytes of metadata, found {}",
                place.bytes,
                bytes.len()
            )));
        }
        let more: BTreeMap<String, String> = serde_json::from_slice(bytes)
            .map_err(|error| corrupt(format!("metadata tensor is not a JSON object of strings: {error}")))?;
        self.metadata.extend(more);
        self.metadata_place = None;
        Ok(())
    }
}

/// Where tensor data starts in a payload, from its first 8 bytes: bounded by the payload and by the
/// format's limit, so that it is safe to allocate.
///
/// # Errors
///
/// `Corrupt` for a length outside the bounds.
pub fn header_len(first8: &[u8; LENGTH_BYTES], payload_bytes: u64) -> Result<u64> {
    let json_bytes = u64::from_le_bytes(*first8);
    let fits = |header_bytes: &u64| (MIN_HEADER_BYTES..=payload_bytes).contains(header_bytes);
    if json_bytes <= MAX_HEADER_JSON_BYTES {
        if let Some(header_bytes) = Some(json_bytes + LENGTH_BYTES as u64).filter(fits) {
            return Ok(header_bytes);
        }
    }
    Err(corrupt(format!(
        "header length must be 2 to {MAX_HEADER_JSON_BYTES} and end within the {payload_bytes} bytes of the payload, found {json_bytes}"
    )))
}

/// Reads a header. `bytes` starts with the payload's first byte and holds at least the header;
/// what follows is not looked at.
///
/// Takes every safetensors file, whoever wrote it: tensor data need not start on a block boundary.
///
/// # Errors
///
/// `Corrupt`, with the reason.
pub fn parse_header(bytes: &[u8], payload_bytes: u64) -> Result<Payload> {
    let Some((first8, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(corrupt(format!("expected at least {LENGTH_BYTES} bytes, found {}", bytes.len())));
    };
    let header_bytes = header_len(first8, payload_bytes)?;
    let json = usize::try_from(header_bytes).ok().and_then(|end| rest.get(..end - LENGTH_BYTES)).ok_or_else(
        || corrupt(format!("header of {header_bytes} bytes, of which {} are given", bytes.len())),
    )?;
    let stored: StoredHeader = serde_json::from_slice(json)
        .map_err(|error| corrupt(format!("header is not that of a safetensors file: {error}")))?;
    place(stored, header_bytes, payload_bytes).map_err(corrupt)
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, OP, message)
}

/// Checks that the tensors fill the payload without holes, and restores the user's view.
fn place(stored: StoredHeader, header_bytes: u64, payload_bytes: u64) -> Result<Payload, String> {
    let mut entries = stored.tensors;
    entries.sort_by(|(left_name, left), (right_name, right)| {
        (left.data_offsets, left_name).cmp(&(right.data_offsets, right_name))
    });
    let mut tensors = Vec::with_capacity(entries.len());
    let mut next = header_bytes;
    for (name, entry) in entries {
        let dtype = Dtype::from_stored(entry.dtype)
            .ok_or_else(|| format!("tensor {name:?} has the unknown dtype {}", entry.dtype))?;
        let bytes =
            dtype.tensor_bytes(&entry.shape.0).map_err(|reason| format!("tensor {name:?}: {reason}"))?;
        let (begin, end) = entry.data_offsets;
        if begin.checked_add(header_bytes) != Some(next) || begin.checked_add(bytes) != Some(end) {
            return Err(format!(
                "tensor {name:?} has {bytes} bytes and must start at {}, found data_offsets [{begin}, {end}]",
                next - header_bytes
            ));
        }
        let offset = next;
        next = next
            .checked_add(bytes)
            .filter(|&next| next <= payload_bytes)
            .ok_or_else(|| format!("tensor {name:?} ends beyond the payload's {payload_bytes} bytes"))?;
        tensors.push(TensorInfo { name, dtype, shape: entry.shape.0, offset, bytes, alias_of: None });
    }
    if next != payload_bytes {
        return Err(format!("tensors end at {next}, the payload has {payload_bytes} bytes"));
    }
    restore(tensors, stored.metadata, header_bytes)
}

/// Applies our own metadata keys to the stored tensors.
fn restore(
    mut tensors: Vec<TensorInfo>,
    metadata: BTreeMap<String, String>,
    header_bytes: u64,
) -> Result<Payload, String> {
    let (ours, metadata): (BTreeMap<String, String>, BTreeMap<String, String>) =
        metadata.into_iter().partition(|(key, _)| key.starts_with(RESERVED_KEY_PREFIX));
    let index: HashMap<String, usize> =
        tensors.iter().enumerate().map(|(place, tensor)| (tensor.name.clone(), place)).collect();
    if index.len() != tensors.len() {
        return Err("two tensors have one name".to_owned());
    }
    let bad = |key: &str, reason: &dyn fmt::Display| format!("metadata key {key:?}: {reason}");

    if let Some(text) = ours.get(KEY_COMPLEX128) {
        let names: Vec<String> = serde_json::from_str(text).map_err(|error| bad(KEY_COMPLEX128, &error))?;
        for name in names {
            let tensor = index
                .get(&name)
                .map(|&place| &mut tensors[place])
                .filter(|tensor| tensor.dtype == Dtype::F64 && tensor.shape.last() == Some(&2))
                .ok_or_else(|| bad(KEY_COMPLEX128, &format!("{name:?} is not an F64 tensor of pairs")))?;
            tensor.dtype = Dtype::C128;
            tensor.shape.pop();
        }
    }
    if let Some(text) = ours.get(KEY_TIED) {
        let ties: BTreeMap<String, Tie> =
            serde_json::from_str(text).map_err(|error| bad(KEY_TIED, &error))?;
        for (name, tie) in ties {
            let tensor = tied(&name, &tie, &tensors, &index).map_err(|reason| bad(KEY_TIED, &reason))?;
            tensors.push(tensor);
        }
        if tensors.len() > MAX_TENSORS {
            return Err(bad(KEY_TIED, &format!("more than {MAX_TENSORS} tensors")));
        }
    }
    let mut metadata_place = None;
    if let Some(name) = ours.get(KEY_METADATA_TENSOR) {
        let place = index
            .get(name)
            .copied()
            .filter(|&place| tensors[place].dtype == Dtype::U8)
            .ok_or_else(|| bad(KEY_METADATA_TENSOR, &format!("{name:?} is not a U8 tensor")))?;
        if tensors.iter().any(|tensor| tensor.alias_of.as_ref() == Some(name)) {
            return Err(bad(KEY_METADATA_TENSOR, &format!("a tensor is tied to {name:?}")));
        }
        let tensor = tensors.remove(place);
        if tensor.bytes > MAX_METADATA_BYTES {
            let reason = format!("{name:?} has {} bytes, the limit is {MAX_METADATA_BYTES}", tensor.bytes);
            return Err(bad(KEY_METADATA_TENSOR, &reason));
        }
        metadata_place = Some(MetadataPlace { offset: tensor.offset, bytes: tensor.bytes });
    }
    let raw = ours.contains_key(KEY_RAW);
    Ok(Payload { tensors, metadata, header_bytes, metadata_place, raw })
}

/// The user's view of one tied tensor.
fn tied(
    name: &str,
    tie: &Tie,
    tensors: &[TensorInfo],
    index: &HashMap<String, usize>,
) -> Result<TensorInfo, String> {
    if index.contains_key(name) {
        return Err(format!("{name:?} is also stored"));
    }
    let target = index
        .get(&tie.of)
        .map(|&place| &tensors[place])
        .ok_or_else(|| format!("{name:?} is tied to {:?}, which is not stored", tie.of))?;
    let dtype = Dtype::from_name(&tie.dtype)
        .ok_or_else(|| format!("{name:?} has the unknown dtype {:?}", tie.dtype))?;
    let bytes = dtype.tensor_bytes(&tie.shape.0)?;
    if bytes != target.bytes {
        return Err(format!(
            "{name:?} has {bytes} bytes, {:?}, to which it is tied, has {}",
            tie.of, target.bytes
        ));
    }
    Ok(TensorInfo {
        name: name.to_owned(),
        dtype,
        shape: tie.shape.0.clone(),
        offset: target.offset,
        bytes,
        alias_of: Some(tie.of.clone()),
    })
}

/// Dimensions of a tensor, at most [`MAX_RANK`] and one for the halves of complex numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape(pub Vec<u64>);

impl Serialize for Shape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Shape, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {} dimensions", MAX_RANK + 1)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Shape, A::Error> {
                let mut dimensions = Vec::new();
                while let Some(dimension) = sequence.next_element()? {
                    if dimensions.len() > MAX_RANK {
                        return Err(A::Error::invalid_length(dimensions.len() + 1, &self));
                    }
                    dimensions.push(dimension);
                }
                Ok(Shape(dimensions))
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// One entry of the header as stored.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StoredTensor {
    pub dtype: safetensors::Dtype,
    pub shape: Shape,
    pub data_offsets: (u64, u64),
}

/// The header as stored. Not safetensors' own type: that one writes metadata in random order, silently
/// keeps one of two tensors of one name, and has host-sized integers.
#[derive(Debug, Default)]
pub(crate) struct StoredHeader {
    pub metadata: BTreeMap<String, String>,
    pub tensors: Vec<(String, StoredTensor)>,
}

impl Serialize for StoredHeader {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_ENTRY, &self.metadata)?;
        }
        for (name, tensor) in &self.tensors {
            map.serialize_entry(name, tensor)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for StoredHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<StoredHeader, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = StoredHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StoredHeader, A::Error> {
                let mut header = StoredHeader::default();
                let mut metadata: Option<Option<BTreeMap<String, String>>> = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_ENTRY {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::duplicate_field(METADATA_ENTRY));
                        }
                        continue;
                    }
                    if header.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
                    }
                    let tensor = map.next_value()?;
                    header.tensors.push((name, tensor));
                }
                header.metadata = metadata.flatten().unwrap_or_default();
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}
