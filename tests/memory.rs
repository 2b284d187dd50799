//! Prevents: an engine that needs memory by the size of the state. A process whose staging pool holds an eighth of its
//! state saves, restores and streams; beyond state and pool it may use 64 MiB at its peak, whatever it does.

mod common;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{save_bytes, scratch, WAIT};
use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{IoBackend, Requested};
use pccheck::save::{RawSave, Save};
use pccheck::store::{FormatOptions, OpenOptions};

const MIB: u64 = 1 << 20;
const POOL_BYTES: u64 = 64 * MIB;
const CHUNK_BYTES: u64 = 4 * MIB;
/// What the engine may use beyond its pool: code, threads' stacks, queues, hashes.
const MARGIN_BYTES: u64 = 64 * MIB;
const STATE_BYTES: u64 = 512 * MIB;
const TENSORS: u64 = 8;
const SAVES: u64 = 5;
const STREAMS: u32 = 4;
const STREAM_BYTES: u64 = 128 * MIB;

const ENV_TASK: &str = "PCC_MEMORY_TASK";
const ENV_REGION: &str = "PCC_MEMORY_REGION";
const ENV_POOL: &str = "PCC_MEMORY_POOL";

fn options(pool_bytes: u64, backend: IoBackend, max_in_flight: u32) -> OpenOptions {
    OpenOptions {
        medium: Requested::Direct,
        backend,
        max_in_flight,
        chunk_bytes: CHUNK_BYTES,
        staging_bytes: pool_bytes,
        ..OpenOptions::default()
    }
}

/// A line of /proc/self/status that is in kB, in bytes.
fn status_bytes(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("read status");
    let line =
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("such a line");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}

/// The peak of resident memory while `task` runs, beyond what was resident before.
fn peak_of(task: impl FnOnce()) -> u64 {
    // Sets the peak back to what is resident now.
    fs::write("/proc/self/clear_refs", "5").expect("reset the peak");
    let before = status_bytes("VmRSS");
    assert!(status_bytes("VmHWM") < before + 4 * MIB, "the peak was not reset");
    task();
    status_bytes("VmHWM").saturating_sub(before)
}

fn fill(data: &mut [u8], seed: u64) {
    let words = data.chunks_exact_mut(8).zip(seed..);
    words.for_each(|(place, word)| {
        place.copy_from_slice(&word.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
    });
}

/// Saves the state again and again, two at a time, then verifies and reads it back tensor by tensor.
fn save_and_restore(region: &Path, pool_bytes: u64, backend: IoBackend) -> u64 {
    let mut state: Vec<(String, Vec<u8>)> = (0..TENSORS)
        .map(|index| (format!("layer.{index}"), vec![0; (STATE_BYTES / TENSORS) as usize]))
        .collect();
    let mut copy = vec![0xFF; (STATE_BYTES / TENSORS) as usize];
    state.iter_mut().zip(0..).for_each(|((_, data), seed)| fill(data, seed));
    peak_of(|| {
        let store = Store::open(region, &options(pool_bytes, backend, 2)).expect("open");
        let saves: Vec<Save> = (0..SAVES)
            .map(|step| {
                state[0].1[..8].copy_from_slice(&step.to_le_bytes());
                save_bytes(&store, step, &state, &[]).expect("save")
            })
            .collect();
        for save in &saves {
            save.wait_durable(WAIT).expect("durable");
        }
        let opened = store.open_checkpoint(Select::Newest, true).expect("open checkpoint");
        for (name, data) in &state {
            opened.checkpoint.read_tensors(&mut [(name, &mut copy)]).expect("read");
            assert!(copy == *data, "{name} came back changed");
        }
    })
}

/// Several streams at once, of each of which every chunk is half-filled before any is completed.
fn stream_halves(region: &Path, pool_bytes: u64) -> u64 {
    let half = CHUNK_BYTES / 2;
    let mut piece = vec![0; half as usize];
    let mut copy = vec![0xFF; (STREAM_BYTES) as usize];
    peak_of(|| {
        let store = Store::open(region, &options(pool_bytes, IoBackend::Auto, STREAMS)).expect("open");
        let mut streams: Vec<RawSave> = (0..u64::from(STREAMS))
            .map(|step| store.begin_raw(step, STREAM_BYTES, &[], WAIT).expect("begin"))
            .collect();
        for first in [0, half] {
            for at in (first..STREAM_BYTES).step_by(CHUNK_BYTES as usize) {
                for (index, stream) in streams.iter().enumerate() {
                    fill(&mut piece, at + index as u64);
                    stream.write_at(at, &piece).expect("write");
                }
            }
        }
        for stream in &mut streams {
            stream.commit().expect("commit").wait_durable(WAIT).expect("durable");
        }
        drop(streams);
        let opened = store.open_checkpoint(Select::Newest, true).expect("open checkpoint");
        let stream = opened.checkpoint.record().step;
        opened.checkpoint.read_tensors(&mut [("raw", &mut copy)]).expect("read");
        for (at, found) in (0..).step_by(half as usize).zip(copy.chunks(half as usize)) {
            fill(&mut piece, at + stream);
            assert!(found == piece, "byte {at} and later of stream {stream} came back changed");
        }
    })
}

/// The child: does one task and says how much memory it took.
#[test]
fn child_process() {
    let Ok(task) = env::var(ENV_TASK) else { return };
    let region = PathBuf::from(env::var_os(ENV_REGION).expect("the region"));
    let pool_bytes = env::var(ENV_POOL).ok().and_then(|text| text.parse().ok()).expect("the pool's bytes");
    let peak = match task.as_str() {
        "io_uring" => save_and_restore(&region, pool_bytes, IoBackend::Auto),
        "threads" => save_and_restore(&region, pool_bytes, IoBackend::Threads),
        "open" => {
            peak_of(|| drop(Store::open(&region, &options(pool_bytes, IoBackend::Auto, 1)).expect("open")))
        }
        "streams" => stream_halves(&region, pool_bytes),
        other => panic!("no task {other}"),
    };
    println!("\n@peak {peak}");
}

fn peak_of_child(task: &str, region: &Path, pool_bytes: u64) -> u64 {
    let output = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", "child_process", "--nocapture", "--test-threads=1"])
        .env(ENV_TASK, task)
        .env(ENV_REGION, region)
        .env(ENV_POOL, pool_bytes.to_string())
        .output()
        .expect("run the child");
    let text = String::from_utf8_lossy(&output.stdout);
    let peak = text.lines().find_map(|line| line.strip_prefix("@peak ")?.parse().ok());
    let peak = peak.unwrap_or_else(|| panic!("{task}: {text}{}", String::from_utf8_lossy(&output.stderr)));
    println!("{task}: {} MiB beyond what was there, the pool has {} MiB", peak / MIB, POOL_BYTES / MIB);
    peak
}

fn check(peak: u64) -> Result<(), String> {
    match peak {
        // Less than the pool would mean that nothing was measured: it is touched when the store is opened.
        less if less < POOL_BYTES / 2 => Err(format!("{less} bytes are less than the pool")),
        more if more > POOL_BYTES + MARGIN_BYTES => Err(format!("{more} bytes are too much")),
        _ => Ok(()),
    }
}

fn region(dir: &tempfile::TempDir, slots: u32, state_bytes: u64) -> PathBuf {
    let path = dir.path().join(format!("region.{slots}"));
    let payload_bytes = state_bytes + MIB;
    let format = FormatOptions { medium: Requested::Direct, ..FormatOptions::new(slots, payload_bytes) };
    format_region(&path, &format).expect("format");
    path
}

/// One test, so that no two large files and processes are there at once.
#[test]
fn memory_is_bounded_by_the_pool() {
    let dir = scratch();
    let path = region(&dir, 3, STATE_BYTES);
    for task in ["io_uring", "threads"] {
        check(peak_of_child(task, &path, POOL_BYTES)).unwrap_or_else(|what| panic!("{task}: {what}"));
    }
    fs::remove_file(&path).expect("make room");
    let path = region(&dir, STREAMS + 1, STREAM_BYTES);
    check(peak_of_child("streams", &path, POOL_BYTES)).unwrap_or_else(|what| panic!("streams: {what}"));
}

/// The measurement can fail: a pool four times as large is found out.
#[test]
fn a_pool_that_is_too_large_is_caught() {
    let dir = scratch();
    let path = region(&dir, 2, MIB);
    let peak = peak_of_child("open", &path, 4 * POOL_BYTES);
    assert!(check(peak).is_err_and(|what| what.contains("too much")), "{peak} bytes were accepted");
}
