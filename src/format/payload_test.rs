//! Prevents: a payload that safetensors readers refuse, that loses what the user saved, or a header whose bytes
//! make the reader panic or believe something that is not there.

use super::*;
use crate::format::{header_len, parse_header, Payload};
use proptest::prelude::*;
use safetensors::SafeTensors;

/// Writes the file that a plan describes, each tensor filled with its index + 1.
fn file_of(plan: &PayloadPlan, tensors: &[TensorSpec]) -> Vec<u8> {
    let mut file = plan.header.clone();
    file.resize(plan.payload_bytes as usize, 0);
    for &index in &plan.order {
        let start = plan.placements[index] as usize;
        file[start..start + tensors[index].bytes as usize].fill(index as u8 + 1);
    }
    if let Some(metadata) = &plan.metadata_tensor {
        let start = metadata.offset as usize;
        file[start..start + metadata.data.len()].copy_from_slice(&metadata.data);
    }
    file
}

fn parse(file: &[u8]) -> Result<Payload> {
    parse_header(file, file.len() as u64)
}

fn spec<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64]) -> TensorSpec<'a> {
    TensorSpec { name, dtype, shape, bytes: dtype.tensor_bytes(shape).unwrap(), alias_of: None }
}

fn invalid_reason(tensors: &[TensorSpec], metadata: &[(&str, &str)]) -> String {
    let error = plan(tensors, metadata).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    error.message().to_owned()
}

#[test]
fn every_dtype_scalar_empty_unicode_and_tied_tensors_survive() {
    let names: Vec<String> = Dtype::ALL.iter().map(|dtype| format!("w.{}", dtype.name())).collect();
    let mut tensors: Vec<TensorSpec> =
        names.iter().zip(Dtype::ALL).map(|(name, dtype)| spec(name, dtype, &[4, 2])).collect();
    tensors.push(spec("scalar", Dtype::F32, &[]));
    tensors.push(spec("empty", Dtype::F16, &[3, 0]));
    tensors.push(spec("ключ \"重み\"\n\u{0}", Dtype::U8, &[5]));
    tensors.push(spec("complex scalar", Dtype::C128, &[]));
    tensors.push(TensorSpec { alias_of: Some(11), ..spec("tied", Dtype::F32, &[8]) });
    tensors.push(TensorSpec { alias_of: Some(11), ..spec("tied as bytes", Dtype::U8, &[32]) });
    tensors.push(TensorSpec { alias_of: Some(14), ..spec("tied complex", Dtype::C128, &[8]) });
    let metadata = [("epoch", "3"), ("rng \u{1f3b2}", "\u{7}"), ("", "")];
    let planned = plan(&tensors, &metadata).unwrap();
    assert_eq!(planned.header.len() % 4096, 0);
    assert_eq!(planned, plan(&tensors, &metadata).unwrap(), "two plans of one state differ");

    let file = file_of(&planned, &tensors);
    let payload = parse(&file).unwrap();
    assert_eq!(payload.header_bytes, planned.header.len() as u64);
    assert!(!payload.raw && payload.metadata_place.is_none());
    assert_eq!(payload.metadata, check_metadata(&metadata).unwrap());
    assert_eq!(payload.tensors.len(), tensors.len());
    for (index, tensor) in tensors.iter().enumerate() {
        let found = payload.tensor(tensor.name).unwrap();
        assert_eq!((found.dtype, &found.shape[..]), (tensor.dtype, tensor.shape), "{}", tensor.name);
        assert_eq!((found.offset, found.bytes), (planned.placements[index], tensor.bytes));
        assert_eq!(found.alias_of.as_deref(), tensor.alias_of.map(|target| tensors[target].name));
        assert_eq!(found.offset % tensors[tensor.alias_of.unwrap_or(index)].dtype.alignment(), 0);
    }

    // The reader that everybody uses sees the same tensors and bytes.
    let reader = SafeTensors::deserialize(&file).unwrap();
    assert_eq!(reader.len(), planned.tensor_count as usize);
    for &index in &planned.order {
        let tensor = reader.tensor(tensors[index].name).unwrap();
        assert!(tensor.data().iter().all(|&byte| byte == index as u8 + 1));
        assert_eq!(tensor.data().len() as u64, tensors[index].bytes);
    }
    let complex = reader.tensor("w.C128").unwrap();
    assert_eq!((complex.dtype(), complex.shape()), (safetensors::Dtype::F64, &[4, 2, 2][..]));
}

#[test]
fn a_state_of_nothing_is_a_file() {
    let planned = plan(&[], &[]).unwrap();
    let file = file_of(&planned, &[]);
    assert_eq!(file.len(), 4096);
    assert_eq!(parse(&file).unwrap().tensors, vec![]);
    assert!(SafeTensors::deserialize(&file).unwrap().is_empty());
}

#[test]
fn a_planner_sees_every_change_between_two_saves() {
    let planner = Planner::default();
    let same = |tensors: &[TensorSpec], metadata: &[(&str, &str)], what: &str| {
        for _ in 0..2 {
            let plans = [planner.plan(tensors, metadata), plan(tensors, metadata)];
            let [one, other] = plans.map(|plan| plan.map_err(|error| error.to_string()));
            assert_eq!(one, other, "{what}");
        }
    };
    let base = [spec("a", Dtype::F32, &[2, 3]), spec("b", Dtype::F32, &[6]), spec("c", Dtype::F64, &[])];
    same(&base, &[], "first");
    same(&base, &[("k", "v")], "metadata");
    same(&base, &[("k", "w"), ("l", "\"")], "other metadata");
    let changed = |at: usize, change: &dyn Fn(&mut TensorSpec)| {
        let mut tensors = base;
        change(&mut tensors[at]);
        tensors
    };
    // Each against what is kept of the same tensors unchanged.
    let beside = |tensors: &[TensorSpec], metadata: &[(&str, &str)], what: &str| {
        same(&base, &[], "as before");
        same(tensors, metadata, what);
    };
    beside(&changed(0, &|tensor| tensor.name = "z"), &[], "a name");
    beside(&changed(0, &|tensor| tensor.name = "ab"), &[], "a longer name");
    beside(&changed(0, &|tensor| tensor.shape = &[3, 2]), &[], "a shape");
    beside(&changed(0, &|tensor| tensor.shape = &[6]), &[], "a rank");
    beside(&changed(0, &|tensor| tensor.dtype = Dtype::I32), &[], "a dtype");
    beside(&changed(1, &|tensor| (tensor.shape, tensor.bytes) = (&[7], 28)), &[], "a size");
    beside(&changed(1, &|tensor| tensor.alias_of = Some(0)), &[], "a tie");
    beside(&base[..2], &[], "one less");
    beside(&[base[1], base[0], base[2]], &[], "the order");
    beside(&[], &[], "none");
    beside(&[], &[("k", "v")], "none but metadata");
    same(&changed(0, &|tensor| tensor.name = "b"), &[], "two of one name");
    same(&changed(0, &|tensor| tensor.bytes = 23), &[], "wrong bytes");
    same(&base, &[("pccheck.k", "v")], "a reserved key");
    let long = "v".repeat(MAX_HEADER_BYTES as usize);
    same(&base, &[("k", &long)], "metadata that moves into a tensor");
    same(&base, &[("k", "v")], "as before");
    // What lies one behind the other is not cut at another place.
    same(&[spec("ab", Dtype::U8, &[1]), spec("c", Dtype::U8, &[1])], &[], "names");
    same(&[spec("a", Dtype::U8, &[1]), spec("bc", Dtype::U8, &[1])], &[], "names cut elsewhere");
    same(&[spec("a", Dtype::U8, &[1, 1]), spec("bc", Dtype::U8, &[])], &[], "shapes cut elsewhere");
}

#[test]
fn a_raw_stream_is_one_tensor_and_known_as_raw() {
    let planned = plan_raw(1000, &[("framework", "x")]).unwrap();
    assert_eq!((planned.payload_bytes, planned.placements[0]), (5096, 4096));
    let payload = parse_header(&planned.header, planned.payload_bytes).unwrap();
    assert!(payload.raw);
    assert_eq!(payload.tensor(RAW_TENSOR_NAME).unwrap().bytes, 1000);
    assert_eq!(payload.metadata.len(), 1);
    // From 2^61 bytes on the bits cannot be counted: what is planned must be readable.
    for bytes in [1 << 61, 6_052_854_358_574_956_544, u64::MAX] {
        assert_eq!(plan_raw(bytes, &[]).unwrap_err().kind(), ErrorKind::TooLarge, "{bytes}");
    }
    let most = plan_raw((1 << 61) - 1, &[]).unwrap();
    assert!(parse_header(&most.header, most.payload_bytes).is_ok());
}

#[test]
fn metadata_that_passes_the_header_limit_moves_into_a_tensor() {
    let tensors = [spec("a", Dtype::F32, &[3]), spec("z", Dtype::U8, &[3])];
    let value = "v".repeat(5000);
    let user = check_metadata(&[("long", &value)]).unwrap();
    let fits = plan_within(&tensors, user.clone(), BTreeMap::new(), 8192).unwrap();
    assert_eq!(fits.metadata_tensor, None);
    let moved = plan_within(&tensors, user.clone(), BTreeMap::new(), 4096).unwrap();
    assert_eq!((moved.header.len(), moved.tensor_count), (4096, 3));

    let file = file_of(&moved, &tensors);
    SafeTensors::deserialize(&file).unwrap();
    let mut payload = parse(&file).unwrap();
    assert_eq!(payload.tensors.len(), 2);
    assert!(payload.metadata.is_empty());
    let place = payload.metadata_place.unwrap();
    let bytes = &file[place.offset as usize..][..place.bytes as usize];
    assert_eq!(payload.load_metadata(&bytes[1..]).unwrap_err().kind(), ErrorKind::Corrupt);
    let wrong = vec![b'['; bytes.len()];
    assert_eq!(payload.load_metadata(&wrong).unwrap_err().kind(), ErrorKind::Corrupt);
    payload.load_metadata(bytes).unwrap();
    assert_eq!(payload.metadata, user);
    assert_eq!(payload.load_metadata(bytes).unwrap_err().kind(), ErrorKind::InvalidState);

    let error = plan_within(&tensors, user, BTreeMap::new(), 4095).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
}

/// The limit itself, at its real size: the longest header that is still a multiple of a block.
#[test]
fn metadata_of_the_real_limit_moves() {
    let value = "v".repeat(100_000_000);
    let planned = plan(&[], &[("k", &value)]).unwrap();
    assert_eq!(planned.header.len(), 4096);
    assert!(planned.metadata_tensor.unwrap().data.len() > 100_000_000);
}

#[test]
fn bad_states_are_refused_with_the_reason() {
    let good = spec("a", Dtype::F32, &[2]);
    assert!(invalid_reason(&[spec("", Dtype::U8, &[1])], &[]).contains("empty name"));
    assert!(invalid_reason(&[good, good], &[]).contains("two tensors"));
    assert!(invalid_reason(&[spec("__metadata__", Dtype::U8, &[1])], &[]).contains("reserved"));
    assert!(invalid_reason(&[spec(METADATA_TENSOR_NAME, Dtype::U8, &[1])], &[]).contains("reserved"));
    let long = "n".repeat(MAX_NAME_BYTES + 1);
    assert!(invalid_reason(&[spec(&long, Dtype::U8, &[1])], &[]).contains("limit"));
    assert!(invalid_reason(&[spec("a", Dtype::U8, &[1; MAX_RANK + 1])], &[]).contains("dimensions"));
    assert!(invalid_reason(&[TensorSpec { bytes: 7, ..good }], &[]).contains("8 bytes"));
    let overflow =
        TensorSpec { name: "a", dtype: Dtype::U8, shape: &[u64::MAX, 2], bytes: 0, alias_of: None };
    assert!(invalid_reason(&[overflow], &[]).contains("overflows"));
    let half = TensorSpec { name: "a", dtype: Dtype::F4, shape: &[3], bytes: 1, alias_of: None };
    assert!(invalid_reason(&[half], &[]).contains("whole bytes"));
    assert!(invalid_reason(&[], &[("pccheck.x", "")]).contains("reserved"));
    assert!(invalid_reason(&[], &[("a", "1"), ("a", "2")]).contains("two metadata"));

    let other = spec("b", Dtype::F32, &[3]);
    for target in [0, 1, 9] {
        // Itself, a tensor of another size, no tensor.
        assert!(invalid_reason(&[TensorSpec { alias_of: Some(target), ..good }, other], &[]).contains("tied"));
    }
    let chain = [
        good,
        TensorSpec { name: "b", alias_of: Some(0), ..good },
        TensorSpec { name: "c", alias_of: Some(1), ..good },
    ];
    assert!(invalid_reason(&chain, &[]).contains("tied"));

    // Five pass the largest region, nine overflow the sum.
    for count in [5, 9] {
        let names: Vec<String> = (0..count).map(|index| index.to_string()).collect();
        let huge: Vec<TensorSpec> = names.iter().map(|name| spec(name, Dtype::U8, &[u64::MAX / 8])).collect();
        assert_eq!(plan(&huge, &[]).unwrap_err().kind(), ErrorKind::TooLarge);
    }
}

/// A file as other writers make it: the header padded to 8 bytes only, tensors in any order in the JSON.
fn foreign(json: &str, data_bytes: usize) -> Vec<u8> {
    let mut text = json.as_bytes().to_vec();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.resize(file.len() + data_bytes, 7);
    file
}

#[test]
fn files_of_other_writers_are_read() {
    let file = foreign(
        r#"{"b":{"dtype":"U8","shape":[3],"data_offsets":[8,11]},"__metadata__":null,
            "a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":1},"e":{"dtype":"I8","shape":[0],"data_offsets":[8,8]}}"#,
        11,
    );
    let payload = parse(&file).unwrap();
    let places: Vec<_> = payload.tensors.iter().map(|tensor| (&tensor.name[..], tensor.bytes)).collect();
    assert_eq!(places, [("a", 8), ("e", 0), ("b", 3)]);
    assert_eq!(payload.tensors[2].offset, file.len() as u64 - 3);
}

#[test]
fn bad_headers_are_corrupt_with_the_reason() {
    let good = r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#;
    parse(&foreign(good, 3)).unwrap();
    let cases = [
        (r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}"#, 4, "must start at 0"),
        (good, 4, "the payload has"),
        (good, 2, "beyond the payload"),
        (r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,4]}}"#, 4, "has 3 bytes"),
        (r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[3,0]}}"#, 3, "data_offsets"),
        (r#"{"a":{"dtype":"Q8","shape":[3],"data_offsets":[0,3]}}"#, 3, "Q8"),
        (r#"{"a":{"dtype":"U8","shape":[-3],"data_offsets":[0,3]}}"#, 3, "-3"),
        (r#"{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,3]}}"#, 3, "overflows"),
        (
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#,
            3,
            "one name",
        ),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "duplicate"),
        (r#"{"__metadata__":{"a":1}}"#, 0, "string"),
        ("[]", 0, "object"),
        ("{", 0, "EOF"),
        (r#"{"__metadata__":{"pccheck.complex128":"[\"a\"]"}}"#, 0, "F64 tensor of pairs"),
        (r#"{"__metadata__":{"pccheck.complex128":"7"}}"#, 0, "pccheck.complex128"),
        (r#"{"__metadata__":{"pccheck.metadata_tensor":"m"}}"#, 0, "U8 tensor"),
        (
            r#"{"__metadata__":{"pccheck.metadata_tensor":"m","pccheck.tied":"{\"t\":{\"of\":\"m\",\"dtype\":\"U8\",\"shape\":[2]}}"},"m":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
            2,
            "is tied to",
        ),
        (
            r#"{"__metadata__":{"pccheck.tied":"{\"b\":{\"of\":\"a\",\"dtype\":\"U8\",\"shape\":[]}}"}}"#,
            0,
            "not stored",
        ),
        (
            r#"{"__metadata__":{"pccheck.tied":"{\"b\":{\"of\":\"a\",\"dtype\":\"U8\",\"shape\":[9]}}"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#,
            3,
            "has 9 bytes",
        ),
        (
            r#"{"__metadata__":{"pccheck.tied":"{\"a\":{\"of\":\"a\",\"dtype\":\"U8\",\"shape\":[3]}}"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}"#,
            3,
            "also stored",
        ),
    ];
    for (json, data_bytes, reason) in cases {
        let error = parse(&foreign(json, data_bytes)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains(reason), "{json}: {error}");
    }
    let ranks =
        format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(MAX_RANK + 1));
    assert!(parse(&foreign(&ranks, 1)).unwrap_err().message().contains("dimensions"));
}

/// Whoever opens a checkpoint holds this in memory: what the payload's size allows once ended the process.
#[test]
fn metadata_tensor_is_bounded_before_it_is_read() {
    let with = |bytes: u64| {
        let json = format!(
            r#"{{"__metadata__":{{"pccheck.metadata_tensor":"m"}},"m":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[0,{bytes}]}}}}"#
        );
        let header = foreign(&json, 0);
        parse_header(&header, header.len() as u64 + bytes)
    };
    let limit = crate::format::MAX_METADATA_BYTES;
    assert_eq!(with(limit).unwrap().metadata_place.unwrap().bytes, limit);
    for bytes in [limit + 1, 1 << 40, 1 << 59] {
        let error = with(bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains("limit"), "{error}");
    }
}

#[test]
fn header_length_is_bounded_before_anything_is_read() {
    let limit = crate::format::MAX_HEADER_JSON_BYTES;
    assert_eq!(header_len(&limit.to_le_bytes(), u64::MAX).unwrap(), limit + 8);
    for (json_bytes, payload_bytes) in
        [(limit + 1, u64::MAX), (u64::MAX, u64::MAX), (100, 107), (1, 100), (0, 0)]
    {
        let error = header_len(&json_bytes.to_le_bytes(), payload_bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{json_bytes} of {payload_bytes}");
    }
    for len in 0..8 {
        assert_eq!(parse_header(&vec![0; len], 4096).unwrap_err().kind(), ErrorKind::Corrupt);
    }
    let planned = plan(&[], &[]).unwrap();
    assert!(parse_header(&planned.header[..4000], 4096).unwrap_err().message().contains("4000"));
}

prop_compose! {
    fn state()(parts in proptest::collection::vec(
        (".{1,12}", 0usize..23, proptest::collection::vec(0u64..5, 0..4), any::<bool>()), 0..12,
    )) -> Vec<(String, Dtype, Vec<u64>, bool)> {
        parts.into_iter().enumerate().map(|(index, (name, code, mut shape, tie))| {
            // Whole bytes for elements of 4 and 6 bits.
            shape.push(4);
            (format!("{index}{name}"), Dtype::ALL[code], shape, tie)
        }).collect()
    }
}

proptest! {
    #[test]
    fn any_state_round_trips(parts in state(), metadata in proptest::collection::btree_map("[^p].{0,9}", ".{0,20}", 0..5)) {
        let mut tensors: Vec<TensorSpec> = parts.iter().map(|(name, dtype, shape, _)| spec(name, *dtype, shape)).collect();
        for index in 1..tensors.len() {
            if parts[index].3 {
                let target = tensors[..index].iter().position(|tensor| {
                    tensor.alias_of.is_none() && tensor.bytes == tensors[index].bytes
                });
                tensors[index].alias_of = target;
            }
        }
        let pairs: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (&key[..], &value[..])).collect();
        let planned = plan(&tensors, &pairs).unwrap();
        let planner = Planner::default();
        for pairs in [&pairs[..], &[], &pairs[..]] {
            prop_assert_eq!(planner.plan(&tensors, pairs).unwrap(), plan(&tensors, pairs).unwrap());
        }
        let file = file_of(&planned, &tensors);
        SafeTensors::deserialize(&file).unwrap();
        let payload = parse(&file).unwrap();
        prop_assert_eq!(&payload.metadata, &metadata);
        prop_assert_eq!(payload.tensors.len(), tensors.len());
        for (index, tensor) in tensors.iter().enumerate() {
            let found = payload.tensor(tensor.name).unwrap();
            prop_assert_eq!((found.dtype, &found.shape[..]), (tensor.dtype, tensor.shape));
            prop_assert_eq!((found.offset, found.bytes), (planned.placements[index], tensor.bytes));
        }
        let by_rule = |left: &usize, right: &usize| {
            let key = |index: usize| (Reverse(tensors[index].dtype.alignment()), tensors[index].name);
            key(*left) < key(*right)
        };
        prop_assert!(planned.order.is_sorted_by(by_rule));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), length in 0u64..400, payload_bytes in any::<u64>()) {
        let _ = parse_header(&bytes, payload_bytes);
        let mut bytes = bytes;
        if let Some(first8) = bytes.first_chunk_mut() {
            *first8 = length.to_le_bytes();
        }
        prop_assert!(parse_header(&bytes, payload_bytes).is_err());
    }

    /// Damage inside a real header: the answer is an error or tensors that lie within the payload.
    #[test]
    fn damaged_headers_never_panic_or_point_outside(at in 8usize..500, with in any::<u8>(), more in any::<u8>()) {
        let tensors = [spec("c", Dtype::C128, &[2]), spec("w", Dtype::F32, &[3]), TensorSpec { alias_of: Some(1), ..spec("v", Dtype::F32, &[3]) }];
        let planned = plan(&tensors, &[("k", "v")]).unwrap();
        let mut file = file_of(&planned, &tensors);
        file[at] = with;
        file[at + 1] = file[at + 1].wrapping_add(more);
        if let Ok(payload) = parse(&file) {
            for tensor in payload.tensors {
                prop_assert!(tensor.offset >= payload.header_bytes);
                prop_assert!(tensor.offset.checked_add(tensor.bytes).unwrap() <= file.len() as u64);
            }
        }
    }
}

/// A file that Python's safetensors 0.8 wrote.
#[test]
fn a_file_of_python_s_safetensors_is_read() {
    let file = include_bytes!("../../tests/data/python.safetensors");
    let payload = parse(file).unwrap();
    assert_ne!(payload.header_bytes % 4096, 0);
    assert_eq!(payload.metadata["epoch"], "3");
    let expected: [(&str, Dtype, &[u64], &[u8]); 5] = [
        (
            "w",
            Dtype::F32,
            &[2, 3],
            &[0, 0, 0, 0, 0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64, 0, 0, 128, 64, 0, 0, 160, 64],
        ),
        ("b", Dtype::BOOL, &[3], &[1, 0, 1]),
        ("s", Dtype::I64, &[], &[7, 0, 0, 0, 0, 0, 0, 0]),
        ("e", Dtype::F16, &[0, 4], &[]),
        ("вес", Dtype::C64, &[1], &[0, 0, 128, 63, 0, 0, 0, 64]),
    ];
    assert_eq!(payload.tensors.len(), expected.len());
    for (name, dtype, shape, bytes) in expected {
        let tensor = payload.tensor(name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape[..]), (dtype, shape), "{name}");
        assert_eq!(&file[tensor.offset as usize..][..tensor.bytes as usize], bytes, "{name}");
    }
}
