//! The header of a payload from arbitrary bytes and from structured input. The parser never panics; what it accepts covers
//! the payload without holes and can be saved again as the same tensors and metadata; what is planned is read back, by
//! us and by safetensors.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use pccheck::format::payload::RAW_TENSOR_NAME;
use pccheck::format::{header_len, parse_header, plan, plan_raw, Dtype, Payload, PayloadPlan, TensorSpec};
use pccheck::ErrorKind;

/// Largest payload that is made in full, to show it to safetensors' own reader.
const COMPLETE_BYTES: u64 = 1 << 20;

/// A number as the JSON has it.
#[derive(Arbitrary, Debug, Clone)]
enum Number {
    Small(u8),
    Medium(u32),
    Large(u64),
    Text(String),
}

/// One tensor as a header could describe it.
#[derive(Arbitrary, Debug)]
struct Entry {
    name: Name,
    dtype: u8,
    shape: Vec<Number>,
    /// Where it says that it lies; none: where it has to.
    offsets: Option<(Number, Number)>,
}

#[derive(Arbitrary, Debug, Clone)]
enum Name {
    Numbered(u8),
    Metadata,
    Raw,
    Moved,
    Free(String),
}

/// What is under one of our own keys.
#[derive(Arbitrary, Debug)]
enum Own {
    Complex(Vec<Name>),
    Tied(Vec<(Name, Name, u8, Vec<Number>)>),
    MetadataTensor(Name),
    Raw,
    Text(u8, String),
}

#[derive(Arbitrary, Debug)]
enum Input {
    /// A payload's bytes, of a payload of as many more.
    Bytes(u32, Vec<u8>),
    /// A JSON text behind a right length.
    Json(u32, String),
    Entries {
        entries: Vec<Entry>,
        metadata: Vec<(String, String)>,
        own: Vec<Own>,
        extra: i8,
        moved: Vec<u8>,
    },
    Plan {
        entries: Vec<Entry>,
        tied: Vec<(u8, u8)>,
        metadata: Vec<(String, String)>,
    },
    PlanRaw(u64, Vec<(String, String)>),
}

impl Name {
    fn text(&self) -> String {
        match self {
            Name::Numbered(number) => format!("t{}", number % 8),
            Name::Metadata => "__metadata__".to_owned(),
            Name::Raw => RAW_TENSOR_NAME.to_owned(),
            Name::Moved => "__pccheck_metadata__".to_owned(),
            Name::Free(text) => text.clone(),
        }
    }
}

impl Number {
    fn value(&self) -> u64 {
        match self {
            Number::Small(value) => u64::from(*value) % 9,
            Number::Medium(value) => u64::from(*value),
            Number::Large(value) => *value,
            Number::Text(text) => text.len() as u64,
        }
    }

    fn json(&self) -> serde_json::Value {
        match self {
            Number::Text(text) => serde_json::from_str(text).unwrap_or_else(|_| text.as_str().into()),
            number => number.value().into(),
        }
    }
}

fn dtype_of(code: u8) -> Dtype {
    Dtype::ALL[code as usize % Dtype::ALL.len()]
}

/// Bytes of a tensor where they fit.
fn size_of(dtype: Dtype, shape: &[u64]) -> u64 {
    let bits = shape.iter().try_fold(dtype.bits(), |bits, &dimension| bits.checked_mul(dimension));
    bits.unwrap_or(0) / 8
}

/// "Takes arbitrary bytes and answers with an error"; what it accepts is consistent.
fn parse(bytes: &[u8], payload_bytes: u64) -> Option<Payload> {
    if let Some(first) = bytes.first_chunk() {
        if let Ok(header_bytes) = header_len(first, payload_bytes) {
            assert!(header_bytes <= payload_bytes);
        }
    }
    match parse_header(bytes, payload_bytes) {
        Ok(payload) => {
            payload_holds(&payload, payload_bytes);
            Some(payload)
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            None
        }
    }
}

fn payload_holds(payload: &Payload, payload_bytes: u64) {
    let mut next = payload.header_bytes;
    let mut names = BTreeSet::new();
    let mut place = payload.metadata_place;
    for tensor in &payload.tensors {
        assert!(names.insert(&tensor.name), "two tensors are called {:?}", tensor.name);
        assert_eq!(tensor.bytes, size_of(tensor.dtype, &tensor.shape), "{tensor:?}");
        if let Some(target) = &tensor.alias_of {
            let target = payload.tensor(target).unwrap_or_else(|| panic!("{tensor:?} is tied to nothing"));
            assert_eq!((target.offset, target.bytes), (tensor.offset, tensor.bytes));
            assert_eq!(target.alias_of, None);
            continue;
        }
        if let Some(moved) = place.take_if(|moved| moved.offset == next && tensor.offset != next) {
            next += moved.bytes;
        }
        assert_eq!(tensor.offset, next, "a hole before {tensor:?}");
        next += tensor.bytes;
    }
    // Moved metadata may also be last, or empty.
    next += place.filter(|moved| moved.offset == next).map_or(0, |moved| moved.bytes);
    assert_eq!(next, payload_bytes);
}

/// What was read can be saved, and is then the same.
fn saved_again(payload: &Payload) {
    let place_of = |name: &String| payload.tensors.iter().position(|tensor| tensor.name == *name);
    let specs: Vec<TensorSpec> = payload
        .tensors
        .iter()
        .map(|tensor| TensorSpec {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: tensor.bytes,
            alias_of: tensor.alias_of.as_ref().and_then(place_of),
        })
        .collect();
    let metadata: Vec<(&str, &str)> =
        payload.metadata.iter().map(|(key, value)| (&key[..], &value[..])).collect();
    // Names that only foreign files have are refused.
    if let Ok(planned) = plan(&specs, &metadata) {
        let again = planned_is_read_back(&planned);
        same(&again, payload);
    }
}

fn same(found: &Payload, expected: &Payload) {
    let view = |payload: &Payload| -> BTreeMap<String, (Dtype, Vec<u64>, u64, Option<String>)> {
        let one = |tensor: &pccheck::format::TensorInfo| {
            (tensor.name.clone(), (tensor.dtype, tensor.shape.clone(), tensor.bytes, tensor.alias_of.clone()))
        };
        payload.tensors.iter().map(one).collect()
    };
    assert_eq!(view(found), view(expected));
    assert_eq!(found.metadata, expected.metadata);
}

fn planned_is_read_back(planned: &PayloadPlan) -> Payload {
    let found = parse_header(&planned.header, planned.payload_bytes).expect("what was planned is read");
    payload_holds(&found, planned.payload_bytes);
    assert_eq!(found.header_bytes, planned.header.len() as u64);
    assert!(found.header_bytes.is_multiple_of(4096));
    if planned.payload_bytes <= COMPLETE_BYTES {
        let mut complete = planned.header.clone();
        complete.resize(planned.payload_bytes as usize, 0);
        safetensors::SafeTensors::deserialize(&complete).expect("every safetensors reader understands it");
    }
    found
}

fn with_length(json: &[u8]) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json);
    bytes
}

fn built(entries: &[Entry], metadata: &[(String, String)], own: &[Own]) -> (Vec<u8>, u64) {
    let mut metadata: BTreeMap<String, String> = metadata.iter().cloned().collect();
    for own in own {
        let (key, value) = match own {
            Own::Complex(names) => {
                let names: Vec<String> = names.iter().map(Name::text).collect();
                ("pccheck.complex128".to_owned(), serde_json::to_string(&names).expect("JSON"))
            }
            Own::Tied(ties) => {
                let ties: serde_json::Map<String, serde_json::Value> = ties
                    .iter()
                    .map(|(name, of, dtype, shape)| {
                        let shape: Vec<_> = shape.iter().map(Number::json).collect();
                        let tie = serde_json::json!({"of": of.text(), "dtype": dtype_of(*dtype).name(), "shape": shape});
                        (name.text(), tie)
                    })
                    .collect();
                ("pccheck.tied".to_owned(), serde_json::Value::Object(ties).to_string())
            }
            Own::MetadataTensor(name) => ("pccheck.metadata_tensor".to_owned(), name.text()),
            Own::Raw => ("pccheck.raw".to_owned(), "1".to_owned()),
            Own::Text(which, text) => {
                let keys = ["complex128", "tied", "metadata_tensor", "raw", "other"];
                (format!("pccheck.{}", keys[*which as usize % keys.len()]), text.clone())
            }
        };
        metadata.insert(key, value);
    }
    // By hand, since a name may come twice.
    let mut parts = Vec::new();
    if !metadata.is_empty() {
        parts.push(format!("\"__metadata__\":{}", serde_json::to_string(&metadata).expect("JSON")));
    }
    let mut next = 0u64;
    for entry in entries {
        let dtype = dtype_of(entry.dtype);
        let shape: Vec<u64> = entry.shape.iter().map(Number::value).collect();
        let end = next.saturating_add(size_of(dtype, &shape));
        let offsets = match &entry.offsets {
            Some((begin, end)) => serde_json::json!([begin.json(), end.json()]),
            None => serde_json::json!([next, end]),
        };
        next = end;
        // C128 is not a stored dtype: F64 pairs stand for it.
        let stored = if dtype == Dtype::C128 { "F64" } else { dtype.name() };
        let shape: Vec<serde_json::Value> = match dtype {
            Dtype::C128 => entry.shape.iter().map(Number::json).chain([2.into()]).collect(),
            _ => entry.shape.iter().map(Number::json).collect(),
        };
        let value = serde_json::json!({"dtype": stored, "shape": shape, "data_offsets": offsets});
        parts.push(format!("{}:{value}", serde_json::Value::from(entry.name.text())));
    }
    (with_length(format!("{{{}}}", parts.join(",")).as_bytes()), next)
}

fn planned(entries: &[Entry], tied: &[(u8, u8)], metadata: &[(String, String)]) {
    let owned: Vec<(String, Dtype, Vec<u64>)> = entries
        .iter()
        .map(|entry| {
            (entry.name.text(), dtype_of(entry.dtype), entry.shape.iter().map(Number::value).collect())
        })
        .collect();
    let mut specs: Vec<TensorSpec> = owned
        .iter()
        .map(|(name, dtype, shape)| TensorSpec {
            name,
            dtype: *dtype,
            shape,
            bytes: size_of(*dtype, shape),
            alias_of: None,
        })
        .collect();
    for &(from, to) in tied {
        if let Some(spec) = specs.get_mut(from as usize) {
            spec.alias_of = Some(to as usize);
        }
    }
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (&key[..], &value[..])).collect();
    let Ok(planned) = plan(&specs, &metadata) else { return };
    let found = planned_is_read_back(&planned);
    assert_eq!(found.tensors.len(), specs.len());
    for (spec, &place) in specs.iter().zip(&planned.placements) {
        let tensor = found.tensor(spec.name).expect("every tensor is there");
        assert_eq!((tensor.dtype, &tensor.shape[..]), (spec.dtype, spec.shape));
        assert_eq!((tensor.offset, tensor.bytes), (place, spec.bytes));
        assert_eq!(tensor.alias_of.as_deref(), spec.alias_of.map(|target| specs[target].name));
    }
    let expected: BTreeMap<String, String> =
        metadata.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    assert_eq!(found.metadata, expected);
}

fuzz_target!(|data: &[u8]| {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    match input {
        Input::Bytes(more, bytes) => {
            if let Some(payload) = parse(&bytes, bytes.len() as u64 + u64::from(more)) {
                saved_again(&payload);
            }
        }
        Input::Json(more, text) => {
            let bytes = with_length(text.as_bytes());
            if let Some(payload) = parse(&bytes, bytes.len() as u64 + u64::from(more)) {
                saved_again(&payload);
            }
        }
        Input::Entries { entries, metadata, own, extra, moved } => {
            let (bytes, data_bytes) = built(&entries, &metadata, &own);
            let payload_bytes =
                (bytes.len() as u64).saturating_add(data_bytes).saturating_add_signed(extra.into());
            if let Some(mut payload) = parse(&bytes, payload_bytes) {
                if payload.metadata_place.is_some() {
                    // Only whether it panics: what the tensor holds is anybody's.
                    let _ = payload.load_metadata(&moved);
                }
                saved_again(&payload);
            }
        }
        Input::Plan { entries, tied, metadata } => planned(&entries, &tied, &metadata),
        Input::PlanRaw(bytes, metadata) => {
            let metadata: Vec<(&str, &str)> =
                metadata.iter().map(|(key, value)| (&key[..], &value[..])).collect();
            if let Ok(planned) = plan_raw(bytes, &metadata) {
                let found = planned_is_read_back(&planned);
                assert!(found.raw && found.tensors.len() == 1 && found.tensors[0].bytes == bytes);
            }
        }
    }
});
