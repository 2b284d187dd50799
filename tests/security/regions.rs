//! Regions that somebody made up: whatever they claim, reading one costs an error and bounded memory.

use std::alloc::{GlobalAlloc, Layout as Allocation, System};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pccheck::engine::{format_region, Select, Store};
use pccheck::format::codec::checksum;
use pccheck::format::{
    chunk_hash, parse_header, plan, table_hash, Dtype, Layout, PreferredMedium, RecordState, SlotRecord,
    Superblock, TensorSpec, Uuid, BLOCK_BYTES, CONTROL_OFFSETS, FORMAT_VERSION, HEADER_HASHED, LABEL_OFFSETS,
    MAX_CHUNKS, RECORDS_OFFSET, SUPERBLOCK_OFFSETS,
};
use pccheck::medium::{Durability, Requested};
use pccheck::recovery::Verdict;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{ErrorKind, Result};

use super::common::{save_one, scratch, WAIT};
use super::in_child;

const MIB: usize = 1 << 20;
/// What a reader may take of a region of a few MiB, whatever it claims.
const SMALL_REGION_HEAP: usize = 16 * MIB;
/// Bytes of heap for each byte of a header, at most.
const HEADER_FACTOR: usize = 32;

/// Bytes of heap in use, and the most since the last look. Relaxed: read by the one thread that matters, after others ended.
struct Watched;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    let now = IN_USE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Allocation) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Allocation) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Allocation) {
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Allocation, new_size: usize) -> *mut u8 {
        // As if both were there while bytes move.
        taken(new_size);
        IN_USE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// The most heap that `work` had at one time, beyond what there was before; and what it returned.
fn peak_of<T>(work: impl FnOnce() -> T) -> (usize, T) {
    let before = IN_USE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    (PEAK.load(Ordering::Relaxed) - before, result)
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        medium: Requested::Mmap,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: 4096,
        staging_bytes: 16 << 12,
        writers: 1,
        readers: 1,
        lock_wait: Some(Duration::ZERO),
        ..OpenOptions::default()
    }
}

/// Everything that a reader does with a region, or as much of it as it lets be done.
fn read_all(path: &Path, read_only: bool) -> Result<()> {
    let store = Store::open(path, &options(read_only))?;
    store.region().read_table()?;
    let opened = store.open_checkpoint(Select::Newest, true)?;
    for tensor in opened.checkpoint.tensors() {
        opened.checkpoint.read_tensor(&tensor.name)?;
    }
    Ok(())
}

/// A block with `value` at `at`, under a checksum that is right: its last 8 bytes, of the first `sealed`.
fn changed(block: &[u8], at: usize, value: &[u8], sealed: usize) -> Vec<u8> {
    let mut block = block.to_vec();
    block[at..at + value.len()].copy_from_slice(value);
    let sum = checksum(&block[..sealed - 8]);
    block[sealed - 8..sealed].copy_from_slice(&sum.to_le_bytes());
    block
}

/// Every place of every structure gets numbers that no region can have, and its checksum is made right again.
#[test]
fn no_number_in_a_region_decides_how_much_memory_is_taken() {
    if !in_child("regions::no_number_in_a_region_decides_how_much_memory_is_taken", |_| ()) {
        return;
    }
    let dir = scratch();
    let inside = |name: &str| dir.path().join(name);
    let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(2, 1 << 20) };
    let striped =
        FormatOptions { stripe: vec![inside("second")], stripe_unit_bytes: 2 << 20, ..format.clone() };
    format_region(&inside("plain"), &format).expect("format");
    format_region(&inside("first"), &striped).expect("format");
    let paths = [inside("plain"), inside("first")];
    for path in &paths {
        let store = Store::open(path, &options(false)).expect("open");
        save_one(&store, 1, &[7; 100_000], &[("k", "v")]).expect("save").wait_durable(WAIT).expect("durable");
    }
    // Path, places of the copies, bytes that mean something, bytes under the checksum.
    let structures = [
        (&paths[0], SUPERBLOCK_OFFSETS.to_vec(), 88, 4096),
        (&paths[0], CONTROL_OFFSETS.to_vec(), 160, 4096),
        (&paths[0], vec![RECORDS_OFFSET], 152, 512),
        (&paths[1], LABEL_OFFSETS.to_vec(), 128, 4096),
    ];
    let numbers: [&[u8]; 5] =
        [&[0xFF; 4], &[0xFF; 8], &[0; 8], &(1u64 << 40).to_le_bytes(), &[0xFF, 0xFF, 0xFF, 0x7F]];
    let (mut cases, mut errors, mut most) = (0, 0, 0);
    for (path, copies, meaning, sealed) in structures {
        let file = File::options().read(true).write(true).open(path).expect("open the file");
        let mut pristine = vec![0; 2 << 20];
        file.read_exact_at(&mut pristine, 0).expect("read");
        let block = |at: u64| &pristine[at as usize..at as usize + BLOCK_BYTES as usize];
        // The magic, without which nothing else is looked at, stays.
        for at in (8..meaning).step_by(4) {
            for number in numbers {
                for read_only in [true, false] {
                    for &copy in &copies {
                        file.write_all_at(&changed(block(copy), at, number, sealed), copy).expect("write");
                    }
                    let (peak, read) = peak_of(|| read_all(path, read_only));
                    assert!(
                        peak <= SMALL_REGION_HEAP,
                        "{peak} bytes for {number:x?} at {at} of {copies:?} in {}",
                        path.display()
                    );
                    cases += 1;
                    errors += usize::from(read.is_err());
                    most = most.max(peak);
                    file.write_all_at(&pristine, 0).expect("write");
                }
            }
        }
        read_all(path, true).expect("it is whole again");
    }
    println!("{cases} cases, {errors} errors, at most {most} bytes of heap");
    assert!(errors > cases / 4, "only {errors} of {cases} changes were refused: the checksums are wrong");
}

/// A region in a sparse file, which takes no space: some checkpoints, each of so many chunks of 4 KiB, all zeros, and one slot
/// more. Returns the record of the last.
fn sparse(path: &Path, checkpoints: u32, chunk_count: u64) -> SlotRecord {
    let payload_bytes = chunk_count * 4096;
    let data_bytes = payload_bytes - 4096;
    let spec =
        TensorSpec { name: "w", dtype: Dtype::U8, shape: &[data_bytes], bytes: data_bytes, alias_of: None };
    let header = plan(&[spec], &[]).expect("plan").header;
    let slot_bytes = Layout::slot_bytes_for(payload_bytes, 4096).expect("size");
    let layout = Layout::new(checkpoints + 1, slot_bytes).expect("layout");
    let superblock = Superblock {
        format_version: FORMAT_VERSION,
        compat: 0,
        incompat: 0,
        uuid: Uuid([3; 16]),
        layout,
        created_unix_ns: 1,
        preferred_medium: PreferredMedium::Unknown,
    };
    let table_hash = table_hash(&vec![0; chunk_count as usize * 16]);
    let record = |slot: u32| SlotRecord {
        uuid: superblock.uuid,
        slot,
        generation: 1 + u64::from(slot),
        state: RecordState::Committed,
        step: 1,
        run_id: 0,
        payload_bytes,
        header_bytes: header.len() as u64,
        tensor_count: 1,
        chunk_bytes: 4096,
        chunk_count,
        table_offset: payload_bytes,
        table_hash,
        header_hash: chunk_hash(&header),
        unix_ns: 1,
        flags: HEADER_HASHED,
    };
    let file = File::create(path).expect("create");
    file.set_len(layout.region_bytes()).expect("a sparse file");
    for offset in SUPERBLOCK_OFFSETS {
        file.write_all_at(&superblock.encode(), offset).expect("write");
    }
    for slot in 0..checkpoints {
        file.write_all_at(&record(slot).encode(), layout.record_offset(slot)).expect("write");
        file.write_all_at(&header, layout.slot_offset(slot)).expect("write");
    }
    record(checkpoints - 1)
}

#[test]
fn a_sparse_file_takes_no_more_memory_than_a_payload_may_have_chunks() {
    if !in_child("regions::a_sparse_file_takes_no_more_memory_than_a_payload_may_have_chunks", |_| ()) {
        return;
    }
    let dir = scratch();
    let path = dir.path().join("region");

    sparse(&path, 1, MAX_CHUNKS + 1);
    let (peak, store) = peak_of(|| Store::open(&path, &options(true)).expect("open"));
    let verdict = &store.recovered().slots[0].verdict;
    assert!(
        matches!(verdict, Verdict::Rejected(why) if why.contains("at most 16777216 chunks")),
        "{verdict:?}"
    );
    assert!(peak <= SMALL_REGION_HEAP, "{peak} bytes");
    drop(store);

    // The most that is accepted: the table, and the hashes in it.
    let record = sparse(&path, 1, MAX_CHUNKS);
    let store = Store::open(&path, &options(true)).expect("open");
    let table_bytes = record.table_bytes() as usize;
    let (peak, opened) = peak_of(|| store.open_checkpoint(Select::Newest, false).expect("open checkpoint"));
    println!("{} MiB of heap for a table of {} MiB", peak / MIB, table_bytes / MIB);
    assert!(peak <= 2 * table_bytes + SMALL_REGION_HEAP, "{peak} bytes for a table of {table_bytes}");
    let mut first = [1; 100];
    let error = opened
        .checkpoint
        .read(&mut [pccheck::load::Part { offset: 4096, dst: &mut first }])
        .expect_err("zeros");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let used = fs::metadata(&path).expect("stat");
    assert!(std::os::unix::fs::MetadataExt::blocks(&used) < 1000, "it was to be sparse");
}

/// What a writer knows of the chunks in its slots is bounded for all of them together.
#[test]
fn a_sparse_file_of_many_checkpoints_takes_no_more_memory_of_a_writer() {
    if !in_child("regions::a_sparse_file_of_many_checkpoints_takes_no_more_memory_of_a_writer", |_| ()) {
        return;
    }
    let dir = scratch();
    let path = dir.path().join("region");
    let peak_with = |checkpoints: u32| {
        sparse(&path, checkpoints, MAX_CHUNKS / 4);
        let wanted = OpenOptions { keep: checkpoints, ..options(false) };
        let (peak, store) = peak_of(|| Store::open(&path, &wanted).expect("open for writing"));
        assert_eq!(store.checkpoints().expect("list").len() as u32, checkpoints);
        peak
    };
    let (half, all, more) = (peak_with(2), peak_with(4), peak_with(6));
    println!("{} MiB, {} MiB, {} MiB", half / MIB, all / MIB, more / MIB);
    assert!(all > half + 32 * MIB, "what is known takes memory: {half}, {all}");
    assert!(more < all + SMALL_REGION_HEAP, "{more} bytes, {all} with as many chunks as may be known");
}

/// What could not be read again is not saved.
#[test]
fn a_state_of_more_chunks_than_readers_hold_is_refused_at_begin() {
    let dir = scratch();
    let path = dir.path().join("region");
    sparse(&path, 1, MAX_CHUNKS + 1);
    let store = Store::open(&path, &options(false)).expect("open");
    let error =
        store.begin_raw(1, MAX_CHUNKS * 4096, &[], WAIT).err().expect("one chunk more, with the header");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    assert!(error.advice().is_some_and(|advice| advice.contains("larger chunks")), "{error}");
}

/// A safetensors header of these entries.
fn header(entries: &str) -> Vec<u8> {
    [&(entries.len() as u64).to_le_bytes()[..], entries.as_bytes()].concat()
}

/// Numbered texts, one after the other, until there are `bytes` of them.
fn repeated(bytes: usize, one: impl Fn(usize) -> String) -> String {
    let mut text = String::with_capacity(bytes + 1000);
    for number in 0.. {
        if text.len() >= bytes {
            break;
        }
        text += if number > 0 { "," } else { "" };
        text += &one(number);
    }
    text
}

/// JSON that makes as many and as large objects as can be from as few bytes.
#[test]
fn a_header_takes_memory_by_its_own_size() {
    if !in_child("regions::a_header_takes_memory_by_its_own_size", |_| ()) {
        return;
    }
    const BYTES: usize = 4 * MIB;
    let metadata = |text: String| format!("{{\"__metadata__\":{{{text}}}}}");
    let quoted = |key: &str, text: String| {
        metadata(format!("\"{key}\":{}", serde_json::to_string(&text).expect("JSON")))
    };
    let headers = [
        ("metadata", metadata(repeated(BYTES, |number| format!("\"{number:x}\":\"\"")))),
        (
            "complex names",
            quoted("pccheck.complex128", format!("[{}]", repeated(BYTES / 2, |_| "\"\"".into()))),
        ),
        (
            "ties",
            quoted(
                "pccheck.tied",
                format!(
                    "{{{}}}",
                    repeated(BYTES / 2, |number| {
                        format!("\"{number:x}\":{{\"of\":\"\",\"dtype\":\"\",\"shape\":[]}}")
                    })
                ),
            ),
        ),
        (
            "tensors",
            format!(
                "{{{}}}",
                repeated(BYTES, |number| {
                    format!("\"{number:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}")
                })
            ),
        ),
        (
            "dimensions",
            format!(
                "{{{}}}",
                repeated(BYTES, |number| {
                    format!(
                        "\"{number:x}\":{{\"dtype\":\"U8\",\"shape\":[{}0],\"data_offsets\":[0,0]}}",
                        "0,".repeat(63)
                    )
                })
            ),
        ),
        ("nothing known", format!("{{\"a\":{}{}}}", "[".repeat(BYTES / 2), "]".repeat(BYTES / 2))),
        ("one long name", format!("{{\"{}\":1}}", "n".repeat(BYTES))),
    ];
    for (what, text) in headers {
        let bytes = header(&text);
        drop(text);
        let (peak, parsed) = peak_of(|| parse_header(&bytes, bytes.len() as u64).map(drop));
        println!(
            "{what}: {:.1} bytes of heap per byte, {}",
            peak as f64 / bytes.len() as f64,
            match parsed {
                Ok(()) => "taken".to_string(),
                Err(error) => error.to_string().chars().take(70).collect(),
            }
        );
        assert!(peak <= HEADER_FACTOR * bytes.len(), "{what}: {peak} bytes for {}", bytes.len());
    }
}
