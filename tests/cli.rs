//! The command-line tool, run as users run it. A regression here means that a region cannot be looked into, that
//! damage goes unnoticed, that a file is overwritten unasked, or that a script gets the wrong exit code.
#![cfg(feature = "cli")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{scratch, WAIT};
use pccheck::engine::{Store, Tensor};
use pccheck::format::Dtype;
use pccheck::store::OpenOptions;
use safetensors::SafeTensors;
use serde_json::Value;

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: scratch() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the tool in the directory; exit code, stdout, stderr.
    fn run(&self, line: &str) -> (i32, String, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pccheck"));
        let Output { status, stdout, stderr } =
            command.args(line.split_whitespace()).current_dir(self.dir.path()).output().expect("run");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (status.code().expect("no signal"), text(stdout), text(stderr))
    }

    /// Stdout of a command that must succeed.
    #[track_caller]
    fn good(&self, line: &str) -> String {
        let (code, stdout, stderr) = self.run(line);
        assert_eq!(code, 0, "{line}: {stderr}");
        stdout
    }

    #[track_caller]
    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.good(line)).expect("JSON")
    }

    /// Stderr of a command that must fail with `code`; it is one line that starts with `error: `.
    #[track_caller]
    fn bad(&self, line: &str, code: i32) -> String {
        let (found, _, stderr) = self.run(line);
        assert_eq!(found, code, "{line}: {stderr}");
        let last = stderr.lines().last().unwrap_or_default();
        assert!(code == 2 || last.starts_with("error: "), "{line}: {stderr:?}");
        stderr
    }

    fn region_with(&self, steps: std::ops::Range<u64>) -> PathBuf {
        self.good("format r.pcc --slots 4 --state 1M");
        let path = self.path("r.pcc");
        let store = Store::open(&path, &small()).expect("open");
        for step in steps {
            save(&store, step);
        }
        path
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("list");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }
}

fn small() -> OpenOptions {
    OpenOptions {
        chunk_bytes: 64 << 10,
        staging_bytes: 1 << 20,
        max_in_flight: 1,
        keep: 3,
        ..OpenOptions::default()
    }
}

fn save(store: &Store, step: u64) {
    let data: Vec<u8> =
        (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ step as u8).collect();
    let shape = [data.len() as u64];
    let tensors = [
        Tensor { name: "big", dtype: Dtype::U8, shape: &shape, data: &data },
        Tensor { name: "small", dtype: Dtype::F32, shape: &[2], data: &data[..8] },
        Tensor { name: "tied", dtype: Dtype::F32, shape: &[2], data: &data[..8] },
    ];
    store.save(step, &tensors, &[("epoch", "7")], WAIT).expect("save").wait_durable(WAIT).expect("durable");
}

fn flip(path: &Path, offset: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("write");
}

#[test]
fn every_command_explains_itself_and_usage_errors_exit_with_2() {
    let bench = Bench::new();
    let help = bench.good("--help");
    for part in
        ["Exit codes:", "3  no such file", "4  damaged", "5  in use", "6  no space", "7  not supported"]
    {
        assert!(help.contains(part), "{part} is missing from {help}");
    }
    for command in [
        "format", "inspect", "verify", "export", "import", "grow", "pin", "unpin", "relocate", "bench",
        "demo",
    ] {
        let help = bench.good(&format!("{command} --help"));
        assert!(help.contains("Examples:") && help.contains("--json"), "{command}: {help}");
        assert!(help.lines().all(|line| line.chars().count() <= 100), "{command}: too wide");
    }
    assert!(!help.contains("demo-trainer"), "the trainer's mode is hidden");
    for line in [
        "",
        "frobnicate",
        "format r.pcc",
        "format r.pcc --state 10X",
        "format r.pcc --state 1M --payload 1M",
        "format r.pcc --state 1M --slots 1",
        "verify r.pcc --all --step 1",
        "grow r.pcc",
        "bench . --in-flight 0",
        "demo --state 1",
    ] {
        let (code, _, stderr) = bench.run(line);
        assert_eq!(code, 2, "{line}: {stderr}");
    }
    assert!(bench.files().is_empty(), "a refused command left {:?}", bench.files());
}

#[test]
fn format_refuses_what_would_destroy_or_cannot_fit() {
    let bench = Bench::new();
    let made = bench.json("format r.pcc --slots 3 --payload 1.5M --json");
    assert_eq!((&made["slots"], &made["slot_bytes"]), (&3.into(), &(2 << 20).into()));
    let error = bench.bad("format r.pcc --slots 3 --payload 1M", 8);
    assert!(error.contains("r.pcc") && error.contains(made["uuid"].as_str().expect("uuid")), "{error}");
    fs::write(bench.path("notes.txt"), "precious").expect("write");
    bench.bad("format notes.txt --slots 3 --payload 1M", 8);
    assert_eq!(fs::read_to_string(bench.path("notes.txt")).expect("read"), "precious");
    let again = bench.json("format r.pcc --slots 3 --payload 1M --prewrite --force --json");
    assert_ne!(again["uuid"], made["uuid"]);
    bench.bad("format missing/r.pcc --state 1M", 3);
    let error = bench.bad("format huge.pcc --slots 3 --payload 5T", 6);
    assert!(error.contains("huge.pcc"), "{error}");
}

#[test]
fn inspect_tells_all_as_text_and_as_json() {
    let bench = Bench::new();
    bench.region_with(10..13);
    let value = bench.json("inspect r.pcc --json --tensors");
    assert_eq!(value["superblock"]["slot_count"], 4);
    assert_eq!(value["slots"][3]["verdict"], "empty");
    let steps: Vec<&Value> =
        value["checkpoints"].as_array().expect("list").iter().map(|info| &info["step"]).collect();
    assert_eq!(steps, [12, 11, 10]);
    assert_eq!(value["tensors"][2]["tied_to"], "small");
    assert_eq!(value["tensors"][1]["name"], "big");
    assert_eq!(value["tensors"][1]["bytes"], 300_000);
    assert_eq!(value["metadata"]["epoch"], "7");
    let text = bench.good("inspect r.pcc --tensors 2");
    for part in ["Checkpoints, newest first", "never used", "Tensors of generation 2, step 11", "epoch"] {
        assert!(text.contains(part), "{part} is missing from\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "too wide:\n{text}");
    bench.bad("inspect r.pcc --tensors 99", 3);
    bench.bad("inspect nothing.pcc", 3);
}

#[test]
fn inspect_says_what_it_can_of_damaged_regions() {
    let bench = Bench::new();
    let path = bench.region_with(0..2);
    flip(&path, 40);
    let value = bench.json("inspect r.pcc --json");
    let damage = value["damage"][0].as_str().expect("a note");
    assert!(damage.contains("superblock copy A"), "{damage}");
    flip(&path, 4096 + 40);
    bench.bad("verify r.pcc", 4);
    let (code, stdout, stderr) = bench.run("inspect r.pcc --json");
    assert_eq!(code, 4, "{stderr}");
    let value: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(value["slot_record_magics"], 2);
    assert!(value["superblocks"][1]["error"].as_str().expect("reason").contains("checksum"), "{stdout}");
    // A slot's record: the checkpoint is rejected, and the reason named.
    flip(&path, 40);
    flip(&path, 16384 + 4096 + 100);
    let value = bench.json("inspect r.pcc --json");
    assert_eq!(value["slots"][1]["verdict"], "rejected");
    assert_eq!(value["checkpoints"].as_array().expect("list").len(), 1);

    fs::write(bench.path("zero"), []).expect("write");
    fs::write(bench.path("text"), "x".repeat(100_000)).expect("write");
    for name in ["zero", "text"] {
        bench.bad(&format!("inspect {name}"), 4);
    }
    let file = fs::OpenOptions::new().write(true).open(&path).expect("open");
    file.set_len(5 << 20).expect("truncate");
    let error = bench.bad("inspect r.pcc", 4);
    assert!(error.contains("truncated"), "{error}");
}

#[test]
fn a_newer_format_is_refused_with_its_own_code() {
    let bench = Bench::new();
    let path = bench.region_with(0..1);
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).expect("open");
    for offset in [0u64, 4096] {
        let mut block = [0u8; 4096];
        file.read_exact_at(&mut block, offset).expect("read");
        block[8] = 9;
        let sum = pccheck::format::codec::checksum(&block[..4088]);
        block[4088..].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&block, offset).expect("write");
    }
    let error = bench.bad("inspect r.pcc", 7);
    assert!(error.contains("expected format version 1, found 9"), "{error}");
}

#[test]
fn everything_that_reads_works_beside_a_live_writer_and_nothing_that_writes() {
    let bench = Bench::new();
    let path = bench.region_with(0..3);
    let store = Store::open(&path, &small()).expect("open");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut step = 3;
            while !stop.load(Ordering::Relaxed) {
                save(&store, step);
                step += 1;
            }
        });
        let mut newest = 0;
        for _ in 0..10 {
            let value = bench.json("inspect r.pcc --json");
            let step = value["checkpoints"][0]["step"].as_u64().expect("a checkpoint");
            assert!(step >= newest, "step {step} after {newest}");
            newest = step;
            // The writer may overtake a verification, which is no damage.
            let (code, _, stderr) = bench.run("verify r.pcc");
            assert!(code == 0 || code == 5, "{code}: {stderr}");
        }
        assert!(newest > 3, "the writer came no further than {newest}");
        fs::write(bench.path("in.st"), foreign_file()).expect("write");
        for line in ["import r.pcc in.st", "pin r.pcc 1", "unpin r.pcc 1", "grow r.pcc --slots 5"] {
            let error = bench.bad(line, 5);
            assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn verify_names_the_damaged_chunks_and_tensors() {
    let bench = Bench::new();
    let path = bench.region_with(0..3);
    let value = bench.json("verify r.pcc --all --json");
    assert_eq!(value["checkpoints"].as_array().expect("list").len(), 3);
    assert!(value["checkpoints"][0]["intact"].as_bool().expect("bool"));
    let region = bench.json("inspect r.pcc --json");
    let slot = region["checkpoints"][0]["slot"].as_u64().expect("slot");
    let slot_bytes = region["superblock"]["slot_bytes"].as_u64().expect("bytes");
    let start = region["superblock"]["payload_offset"].as_u64().expect("offset") + slot * slot_bytes;
    flip(&path, start + 3 * 65_536 + 17);
    let (code, stdout, stderr) = bench.run("verify r.pcc --json");
    assert_eq!(code, 4, "{stderr}");
    let value: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(value["checkpoints"][0]["damaged_chunks"], serde_json::json!([3]));
    assert_eq!(value["checkpoints"][0]["damaged_tensors"], serde_json::json!(["big"]));
    assert!(stderr.contains("1 of 1 checkpoints are damaged"), "{stderr}");
    bench.good("verify r.pcc --step 1");
    bench.good("verify r.pcc --generation 1");
    bench.bad("verify r.pcc --all", 4);
    bench.bad("verify r.pcc --step 77", 3);
    // Export falls back, and says so; asked for exactly the damaged one, it refuses and leaves nothing.
    let (code, _, stderr) = bench.run("export r.pcc -o newest.st");
    assert!(code == 0 && stderr.contains("generation 3 was passed over"), "{code} {stderr}");
    bench.bad("export r.pcc -o exact.st --generation 3", 4);
    assert_eq!(bench.files(), ["newest.st", "r.pcc"]);
}

/// A safetensors file of one tensor of every dtype, as other writers make it: header padded to 8 bytes only.
fn foreign_file() -> Vec<u8> {
    let mut header = String::from("{\"__metadata__\":{\"who\":\"somebody else\"}");
    let mut data = Vec::new();
    for (index, dtype) in Dtype::ALL.into_iter().filter(|dtype| *dtype != Dtype::C128).enumerate() {
        let begin = data.len();
        let bytes = dtype.bits() as usize * 24 / 8;
        data.extend((0..bytes).map(|i| (i * 37 + index * 11) as u8));
        header += &format!(
            ",\"t{index}.{0}\":{{\"dtype\":\"{0}\",\"shape\":[2,12],\"data_offsets\":[{begin},{1}]}}",
            dtype.name(),
            data.len()
        );
    }
    header.push('}');
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

#[track_caller]
fn assert_same_tensors(left: &[u8], right: &[u8]) {
    let (left, right) =
        (SafeTensors::deserialize(left).expect("left"), SafeTensors::deserialize(right).expect("right"));
    assert_eq!(left.len(), right.len());
    for (name, tensor) in left.tensors() {
        let other = right.tensor(&name).expect("the same names");
        assert_eq!((tensor.dtype(), tensor.shape()), (other.dtype(), other.shape()), "{name}");
        assert!(tensor.data() == other.data(), "{name} changed");
    }
}

#[test]
fn files_of_every_dtype_go_in_and_come_out_the_same() {
    let bench = Bench::new();
    bench.good("format r.pcc --slots 3 --state 1M");
    let python = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/python.safetensors");
    fs::write(bench.path("foreign.st"), foreign_file()).expect("write");
    fs::copy(python, bench.path("python.st")).expect("copy");
    for (step, name) in [(1, "foreign.st"), (2, "python.st")] {
        let value = bench.json(&format!("import r.pcc {name} --step {step} --json"));
        assert_eq!(value["step"], step);
        bench.good(&format!("export r.pcc -o out{step}.st --step {step}"));
        let (before, after) = (fs::read(bench.path(name)), fs::read(bench.path(&format!("out{step}.st"))));
        assert_same_tensors(&before.expect("read"), &after.expect("read"));
    }
    assert_eq!(bench.json("inspect r.pcc --json --tensors 1")["metadata"]["who"], "somebody else");
    // Exported again after an import of what was exported: the same bytes.
    bench.good("import r.pcc out1.st --step 3");
    bench.good("export r.pcc -o again.st --step 3");
    assert_eq!(
        fs::read(bench.path("out1.st")).expect("read"),
        fs::read(bench.path("again.st")).expect("read")
    );
}

#[test]
fn export_and_import_refuse_without_harm() {
    let bench = Bench::new();
    bench.region_with(0..1);
    fs::write(bench.path("precious"), "data").expect("write");
    bench.bad("export r.pcc -o precious", 8);
    assert_eq!(fs::read_to_string(bench.path("precious")).expect("read"), "data");
    bench.good("export r.pcc -o precious --force");
    assert!(fs::metadata(bench.path("precious")).expect("exists").len() > 300_000);
    let error = bench.bad("export r.pcc -o r.pcc --force", 2);
    assert!(error.contains("is a region"), "{error}");
    bench.good("format s0.pcc --stripe s1.pcc --slots 3 --state 1M");
    let member = fs::read(bench.path("s1.pcc")).expect("read");
    let error = bench.bad("export r.pcc -o s1.pcc --force", 2);
    assert!(error.contains("a member of one"), "{error}");
    assert_eq!(fs::read(bench.path("s1.pcc")).expect("read"), member);
    bench.bad("export r.pcc -o missing/x", 3);
    bench.bad("export r.pcc -o x --step 9", 3);
    let mut torn = foreign_file();
    torn.pop();
    fs::write(bench.path("torn.st"), &torn).expect("write");
    let error = bench.bad("import r.pcc torn.st", 4);
    assert!(error.contains("torn.st"), "{error}");
    fs::write(bench.path("empty.st"), []).expect("write");
    bench.bad("import r.pcc empty.st", 4);
    bench.bad("import r.pcc missing.st", 3);
    bench.bad("import r.pcc .", 2);
    let large = foreign_of(8 << 20);
    fs::write(bench.path("large.st"), large).expect("write");
    let error = bench.bad("import r.pcc large.st", 6);
    assert!(error.contains("grow"), "{error}");
    assert_eq!(bench.json("inspect r.pcc --json")["checkpoints"].as_array().expect("list").len(), 1);
    assert_eq!(bench.files(), ["empty.st", "large.st", "precious", "r.pcc", "s0.pcc", "s1.pcc", "torn.st"]);
}

fn foreign_of(bytes: usize) -> Vec<u8> {
    let header = format!("{{\"w\":{{\"dtype\":\"U8\",\"shape\":[{bytes}],\"data_offsets\":[0,{bytes}]}}}}");
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![5; bytes]].concat()
}

#[test]
fn pins_last_and_growing_loses_nothing() {
    let bench = Bench::new();
    let path = bench.region_with(0..3);
    drop(Store::open(&path, &OpenOptions { run_id: 77, ..small() }).expect("open"));
    bench.good("pin r.pcc 1");
    assert_eq!(bench.json("inspect r.pcc --json")["control"]["run_id"], 77, "a pin changed the run");
    let pinned = |bench: &Bench| -> Vec<u64> {
        let value = bench.json("inspect r.pcc --json");
        let list = value["checkpoints"].as_array().expect("list").clone();
        list.iter()
            .filter(|c| c["pinned"] == true)
            .map(|c| c["generation"].as_u64().expect("number"))
            .collect()
    };
    assert_eq!(pinned(&bench), [1]);
    bench.bad("pin r.pcc 77", 3);
    let grown = bench.json("grow r.pcc --slots 6 --json");
    assert_eq!(grown["before"]["slot_bytes"], grown["after"]["slot_bytes"]);
    bench.good("grow r.pcc --state 9M");
    let value = bench.json("inspect r.pcc --json");
    assert_eq!(value["damage"], serde_json::json!([]), "growing is no damage");
    assert_eq!(value["superblock"]["slot_count"], 6);
    bench.good("verify r.pcc --all");
    assert_eq!(pinned(&bench), [1]);
    bench.good("unpin r.pcc 1");
    assert!(pinned(&bench).is_empty());
    bench.bad("grow r.pcc --slots 2", 2);
    assert_eq!(bench.files(), ["r.pcc"]);
}

#[test]
fn a_small_demo_is_killed_three_times_and_ends_identical() {
    let bench = Bench::new();
    let value = bench.json("demo --state 256K --iterations 40 --kills 3 --seed 5 --out out --json");
    assert_eq!(value["identical"], true);
    assert_eq!(value["digest_killed"], value["digest_uninterrupted"]);
    assert_eq!(value["kills"], 3);
    let lives = value["lives"].as_array().expect("lives");
    assert_eq!(lives.len(), 4);
    let resumed = lives.iter().filter(|life| life["resumed_generation"].as_u64() > Some(0)).count();
    assert!(resumed > 0, "no life resumed from a checkpoint: {value}");
    let picture = fs::read_to_string(bench.path("out/loss.svg")).expect("a picture");
    assert!(picture.starts_with("<svg") && picture.contains("Killed 3 times"), "{picture}");
    assert_eq!(fs::read_dir(bench.path("out")).expect("list").count(), 1, "only the picture stays");
}

#[test]
fn a_tiny_bench_measures_everything_and_cleans_up() {
    let bench = Bench::new();
    let value = bench.json(
        "bench . --sizes 4M --chunk 256K --staging 2M,state --in-flight 1,2 --writers 1,2 --medium direct,mmap \
         --repeat 2 --json",
    );
    let settings = value["settings"].as_array().expect("settings");
    assert_eq!(settings.len(), 16);
    for setting in settings {
        for figure in ["durable_ratio", "copied_ratio", "restore_ratio"] {
            assert!(setting[figure]["median"].as_f64() > Some(0.0), "{figure} of {setting}");
        }
        assert_eq!(setting["rounds"].as_array().expect("rounds").len(), 2);
    }
    let all = "--measure transfer,small,unchanged,opening,tensor --staging 8M --chunk 64K --medium direct";
    let value = bench.json(&format!("bench . --sizes 8M --repeat 2 --backend threads {all} --json"));
    assert!(value["settings"][0]["cpu_ratio"]["median"].as_f64() > Some(0.0), "{value}");
    for (what, count) in [("small", 1), ("unchanged", 3), ("opening", 1), ("tensor", 2)] {
        let results = value[what].as_array().unwrap_or_else(|| panic!("{what} in {value}"));
        assert_eq!(results.len(), count, "{what}");
    }
    // Of 128 chunks one changes; where it moves, its slot lacks two.
    let written = |index: usize| value["unchanged"][index]["rounds"][1]["written_bytes"].as_u64();
    assert_eq!((0..3).map(written).collect::<Vec<_>>(), [1, 1, 2].map(|chunks| Some(chunks << 16)));
    // A small tensor's chunk or two, the header and the table, not the checkpoint.
    let read = value["tensor"][1]["read_bytes"].as_u64();
    assert!(read.is_some_and(|bytes| bytes < 1 << 20), "{value}");
    let text = bench.good(&format!("bench . --sizes 8M --repeat 6 {all}"));
    assert!(text.contains("Restoring with verification") && text.contains("by hand"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "too wide:\n{text}");
    assert!(bench.files().is_empty(), "left {:?}", bench.files());
    fs::write(bench.path("file"), "x").expect("write");
    bench.bad("bench file", 2);
    bench.bad("bench missing", 3);
}

#[test]
fn a_striped_region_is_made_looked_into_and_told_where_a_member_is() {
    let bench = Bench::new();
    fs::create_dir(bench.path("a")).expect("a folder");
    let made =
        bench.json("format a/r0 --stripe a/r1 --stripe a/r2 --stripe-unit 2MiB --slots 4 --state 5M --json");
    assert_eq!(made["members"], 3);
    let store = Store::open(&bench.path("a/r0"), &small()).expect("open");
    (1..4).for_each(|step| save(&store, step));
    drop(store);
    let seen = bench.json("inspect a/r0 --json");
    assert_eq!(
        (&seen["medium"]["members"], &seen["medium"]["stripe_unit_bytes"]),
        (&3.into(), &(2 << 20).into())
    );
    assert!(bench.good("inspect a/r0").contains("3 members, units of 2 MiB"));
    // Everything goes the same way as without members.
    bench.good("verify a/r0 --all");
    bench.good("pin a/r0 3");
    bench.good("unpin a/r0 3");
    bench.good("export a/r0 --output out.safetensors");
    bench.good("import a/r0 out.safetensors --step 9");
    assert_eq!(bench.json("inspect a/r0 --json")["checkpoints"][0]["step"], 9);
    assert!(bench.bad("grow a/r0 --slots 6", 7).contains("import"));

    assert!(bench.bad("inspect a/r1", 4).contains("a/r0"));
    fs::rename(bench.path("a/r2"), bench.path("moved")).expect("move");
    let lost = bench.bad("inspect a/r0", 4);
    assert!(lost.contains("member 2") && lost.contains("pccheck relocate a/r0 2 PATH"), "{lost}");
    assert!(bench.bad("relocate a/r0 2 a/r1", 4).contains("found member 1"));
    bench.bad("relocate a/r0 3 moved", 2);
    bench.bad("relocate a/r0 2 nothing", 3);
    assert_eq!(bench.json("relocate a/r0 2 moved --json")["member"], 2);
    bench.good("verify a/r0 --all");
    assert!(bench.bad("format a/r0 --slots 3 --state 1M", 8).contains("striped"));
    bench.bad("format b --stripe-unit 1M --stripe c --slots 3 --state 1M", 2);
    bench.bad("format b --stripe-unit 2M --slots 3 --state 1M", 2);
}
