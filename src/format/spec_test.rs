//! Prevents: a specification that says one thing while the code does another. The tables of `docs/format.md`
//! are parsed and compared with the constants that encode and decode.

use super::codec::Field;
use super::*;

const SPEC: &str = include_str!("../../docs/format.md");

/// The rows of the first table after `marker`, each a list of cells without backticks, header rows left out.
fn table_after(marker: &str) -> Vec<Vec<String>> {
    let at = SPEC.find(marker).unwrap_or_else(|| panic!("the specification lacks {marker:?}"));
    let rows: Vec<Vec<String>> = SPEC[at..]
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().replace('`', "")).collect())
        .collect();
    assert!(!rows.is_empty(), "the table after {marker:?} is empty");
    rows
}

fn compare(marker: &str, fields: &[Field], structure_bytes: usize) {
    let specified: Vec<(usize, usize, String)> = table_after(marker)
        .into_iter()
        .map(|row| (row[0].parse().unwrap(), row[1].parse().unwrap(), row[2].clone()))
        .collect();
    let coded: Vec<(usize, usize, String)> =
        fields.iter().map(|field| (field.offset, field.bytes, field.name.to_owned())).collect();
    assert_eq!(specified, coded, "{marker}");
    let mut next = 0;
    for (offset, bytes, name) in specified {
        assert_eq!(offset, next, "{marker} {name}");
        next += bytes;
    }
    assert_eq!(next, structure_bytes, "{marker}");
}

#[test]
fn every_field_is_where_the_specification_says() {
    compare("<!-- fields: superblock -->", superblock::FIELDS, 4096);
    compare("<!-- fields: control -->", control::FIELDS, 4096);
    compare("<!-- fields: mark -->", control::MARK_FIELDS, 16);
    compare("<!-- fields: record -->", record::FIELDS, 512);
    compare("<!-- fields: label -->", label::FIELDS, 4096);
}

#[test]
fn every_limit_is_what_the_specification_says() {
    let coded: &[(&str, u64)] = &[
        ("FORMAT_VERSION", FORMAT_VERSION.into()),
        ("BLOCK_BYTES", BLOCK_BYTES),
        ("SLOT_ALIGN_BYTES", SLOT_ALIGN_BYTES),
        ("MIN_SLOTS", MIN_SLOTS.into()),
        ("MAX_SLOTS", MAX_SLOTS.into()),
        ("MIN_CHUNK_BYTES", MIN_CHUNK_BYTES),
        ("MAX_CHUNK_BYTES", MAX_CHUNK_BYTES),
        ("MAX_CHUNKS", MAX_CHUNKS),
        ("MAX_GENERATION", MAX_GENERATION),
        ("MAX_LEASE_GENERATIONS", MAX_LEASE_GENERATIONS),
        ("LOST_CEILING_SKIP_GENERATIONS", LOST_CEILING_SKIP_GENERATIONS),
        ("MAX_TENSORS", MAX_TENSORS as u64),
        ("MAX_NAME_BYTES", MAX_NAME_BYTES as u64),
        ("MAX_RANK", MAX_RANK as u64),
        ("MAX_HEADER_JSON_BYTES", MAX_HEADER_JSON_BYTES),
        ("MAX_REGION_BYTES", layout::MAX_REGION_BYTES),
        ("MIN_MEMBERS", MIN_MEMBERS.into()),
        ("MAX_MEMBERS", MAX_MEMBERS.into()),
        ("MIN_UNIT_BYTES", stripe::MIN_UNIT_BYTES),
        ("MAX_UNIT_BYTES", stripe::MAX_UNIT_BYTES),
        ("LABEL_AREA_BYTES", LABEL_AREA_BYTES),
    ];
    let specified = table_after("### Limits");
    assert_eq!(specified.len(), coded.len());
    for (row, (name, value)) in specified.iter().zip(coded) {
        assert_eq!((row[0].as_str(), row[1].parse()), (*name, Ok(*value)));
    }
}

#[test]
fn marks_keys_and_dtypes_are_what_the_specification_says() {
    let flags: Vec<(String, u32)> = table_after("| flag | value")
        .into_iter()
        .map(|row| (row[0].clone(), row[1].parse().unwrap()))
        .collect();
    let coded = [
        ("MARK_PINNED", MARK_PINNED),
        ("MARK_QUARANTINED", MARK_QUARANTINED),
        ("MARK_DISCARDED", MARK_DISCARDED),
    ];
    assert_eq!(flags, coded.map(|(name, value)| (name.to_owned(), value)));

    let keys: Vec<String> = table_after("### Metadata keys").into_iter().map(|row| row[1].clone()).collect();
    let coded = [payload::KEY_TIED, payload::KEY_COMPLEX128, payload::KEY_METADATA_TENSOR, payload::KEY_RAW];
    assert_eq!(keys, coded);

    let dtypes = table_after("### Dtypes");
    assert_eq!(dtypes.len(), Dtype::ALL.len());
    for (row, dtype) in dtypes.iter().zip(Dtype::ALL) {
        let coded = [
            dtype.code().to_string(),
            dtype.name().to_owned(),
            dtype.bits().to_string(),
            dtype.alignment().to_string(),
        ];
        assert_eq!(row[..], coded);
    }
}

/// The map of a region, the magics and the reserved names stand in the text.
#[test]
fn offsets_magics_and_names_stand_in_the_specification() {
    for (offset, what) in [
        (SUPERBLOCK_OFFSETS[0], "superblock, copy A"),
        (SUPERBLOCK_OFFSETS[1], "superblock, copy B"),
        (CONTROL_OFFSETS[0], "control block, copy A"),
        (CONTROL_OFFSETS[1], "control block, copy B"),
        (RECORDS_OFFSET, "slot records, one block per slot"),
    ] {
        let line =
            SPEC.lines().find(|line| line.ends_with(what)).unwrap_or_else(|| panic!("no line on {what}"));
        assert_eq!(line.split_whitespace().next(), Some(&offset.to_string()[..]), "{line}");
    }
    for magic in
        [superblock::SUPERBLOCK_MAGIC, control::CONTROL_MAGIC, record::RECORD_MAGIC, label::LABEL_MAGIC]
    {
        let text = format!("`{}`", magic.escape_ascii().to_string().replace("\\x00", "\\0"));
        assert!(SPEC.contains(&text), "{text}");
    }
    for name in [
        payload::METADATA_TENSOR_NAME,
        payload::RESERVED_NAME_PREFIX,
        payload::RESERVED_KEY_PREFIX,
        payload::RAW_TENSOR_NAME,
        payload::METADATA_ENTRY,
    ] {
        assert!(SPEC.contains(&format!("`{name}`")), "{name}");
    }
}
