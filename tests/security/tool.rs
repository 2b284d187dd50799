//! The command-line tool writes where it is told and nowhere else, and prints nothing that acts on a terminal.

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use pccheck::engine::{format_region, Store, Tensor};
use pccheck::format::{Dtype, MAX_CHUNK_BYTES};
use pccheck::medium::{Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};

use super::common::{save_one, scratch, WAIT};

/// Names that would lead elsewhere if they were taken for paths, and that would act if they were printed as they are.
const NAMES: [&str; 5] =
    ["../escaped", "/tmp/pccheck-escaped", "a/b/c", "\u{1b}]0;owned\u{7}", "two\nlines\u{202e}"];

struct Bench {
    /// The folder above, in which nothing may appear.
    above: tempfile::TempDir,
    dir: PathBuf,
}

impl Bench {
    /// A region `r.pcc` with one checkpoint of tensors and metadata that are called so.
    fn new() -> Bench {
        let above = scratch();
        let dir = above.path().join("here");
        fs::create_dir(&dir).expect("mkdir");
        let path = dir.join("r.pcc");
        let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, 100_000) };
        format_region(&path, &format).expect("format");
        let options = OpenOptions { required: Durability::Process, ..OpenOptions::default() };
        let store = Store::open(&path, &options).expect("open");
        let data = [7; 100];
        let tensors = NAMES.map(|name| Tensor { name, dtype: Dtype::U8, shape: &[100], data: &data });
        let metadata: Vec<(&str, &str)> = NAMES.iter().map(|&name| (name, name)).collect();
        store.save(1, &tensors, &metadata, WAIT).expect("save").wait_durable(WAIT).expect("durable");
        Bench { above, dir }
    }

    /// Exit code and all that was printed.
    fn run(&self, arguments: &[&str]) -> (i32, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pccheck"));
        let ended = command.args(arguments).current_dir(&self.dir).output().expect("run");
        let said = [ended.stdout, ended.stderr].concat();
        (ended.status.code().expect("no signal"), String::from_utf8(said).expect("UTF-8"))
    }

    #[track_caller]
    fn good(&self, arguments: &[&str]) -> String {
        let (code, said) = self.run(arguments);
        assert_eq!(code, 0, "{arguments:?}: {said}");
        said
    }

    /// Everything below the folder above.
    fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.above.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("list") {
                let path = entry.expect("entry").path();
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("stat").permissions().mode() & 0o7777
}

#[test]
fn export_makes_one_file_whatever_the_tensors_are_called() {
    let bench = Bench::new();
    let mut expected = bench.files();
    bench.good(&["export", "r.pcc", "-o", "out.safetensors"]);
    expected.push(bench.path("out.safetensors"));
    expected.sort();
    assert_eq!(bench.files(), expected);
    assert!(!Path::new(NAMES[1]).exists());
    // And back again, as names.
    bench.good(&["import", "r.pcc", "out.safetensors", "--step", "2"]);
    assert_eq!(bench.files(), expected);
}

#[test]
fn exported_files_are_their_owners_alone() {
    let bench = Bench::new();
    let tool = env!("CARGO_BIN_EXE_pccheck");
    let line = format!("umask 0; exec '{tool}' export r.pcc -o out.safetensors");
    let status = Command::new("sh").args(["-c", &line]).current_dir(&bench.dir).status().expect("sh");
    assert!(status.success());
    assert_eq!(mode(&bench.path("out.safetensors")), 0o600);
}

#[test]
fn export_follows_no_link_and_replaces_nothing_unasked() {
    let bench = Bench::new();
    let elsewhere = scratch();
    let (notes, nothing) = (elsewhere.path().join("notes"), elsewhere.path().join("nothing"));
    fs::write(&notes, "dear diary").expect("write");
    fs::write(bench.path("mine"), "mine").expect("write");
    symlink(&notes, bench.path("link")).expect("symlink");
    symlink(&nothing, bench.path("dangling")).expect("symlink");
    symlink(bench.path("r.pcc"), bench.path("loop")).expect("symlink");
    symlink(elsewhere.path(), bench.path("folder")).expect("symlink");
    let before = bench.files();
    let region = fs::read(bench.path("r.pcc")).expect("read");
    for name in ["mine", "link", "dangling", "loop", "folder", "..", "."] {
        let (code, said) = bench.run(&["export", "r.pcc", "-o", name]);
        assert_ne!(code, 0, "{name}: {said}");
        assert_eq!(bench.files(), before, "{name}: {said}");
    }
    // Where it may replace, it replaces the link itself.
    for name in ["link", "dangling"] {
        bench.good(&["export", "r.pcc", "-o", name, "--force"]);
        assert!(fs::symlink_metadata(bench.path(name)).expect("stat").is_file(), "{name} is a link still");
        assert_eq!(mode(&bench.path(name)), 0o600);
    }
    for name in ["loop", "folder"] {
        let (code, said) = bench.run(&["export", "r.pcc", "-o", name, "--force"]);
        assert_ne!(code, 0, "{name}: {said}");
    }
    assert_eq!(bench.files(), before);
    assert_eq!(fs::read(&notes).expect("read"), b"dear diary");
    assert!(!nothing.exists());
    assert!(fs::read(bench.path("r.pcc")).expect("read") == region, "the region was changed");
}

#[test]
fn what_a_region_holds_does_not_act_on_the_terminal() {
    let bench = Bench::new();
    let acts = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    let said = bench.good(&["inspect", "r.pcc", "--tensors"]);
    assert_eq!(said.find(acts), None, "{said:?}");
    assert!(said.contains(r"\u{1b}]0;owned\u{7}") && said.contains(r"two\nlines\u{202e}"), "{said}");
    // Paths in the labels of members, too.
    let other = bench.path("\u{1b}[2J");
    let striped = FormatOptions {
        medium: Requested::Mmap,
        stripe: vec![other.clone()],
        stripe_unit_bytes: 2 << 20,
        ..FormatOptions::new(3, 100_000)
    };
    format_region(&bench.path("s.pcc"), &striped).expect("format");
    fs::remove_file(other).expect("remove");
    let (code, said) = bench.run(&["inspect", "s.pcc"]);
    assert_ne!(code, 0);
    assert_eq!(said.find(acts), None, "{said:?}");
    assert!(said.contains(r"\u{1b}[2J"), "{said}");
}

/// Buffers are taken for chunks as they are, not as large as their record calls them.
#[test]
fn the_tool_takes_no_buffers_for_chunks_that_are_not_there() {
    let dir = scratch();
    let path = dir.path().join("r.pcc");
    let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, 100_000) };
    format_region(&path, &format).expect("format");
    let options = OpenOptions {
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: MAX_CHUNK_BYTES,
        staging_bytes: 2 * MAX_CHUNK_BYTES,
        ..OpenOptions::default()
    };
    let store = Store::open(&path, &options).expect("open");
    save_one(&store, 1, &[7; 50_000], &[]).expect("save").wait_durable(WAIT).expect("durable");
    drop(store);
    // Addresses for far less than its buffers for chunks of that size.
    let limited = format!("ulimit -v 800000; exec {} verify r.pcc", env!("CARGO_BIN_EXE_pccheck"));
    let mut tool = Command::new("sh");
    tool.args(["-c", &limited]).env("MALLOC_ARENA_MAX", "1").current_dir(dir.path());
    let ended = tool.output().expect("run the tool");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
}
