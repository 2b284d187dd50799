//! Prevents: checkpoints that only this engine can read. Python's own `safetensors` package loads what the engine
//! wrote, bit for bit, with every dtype that it knows, and the engine takes what Python wrote.
//!
//! Python is the program that PCC_PYTHON names; otherwise `python3`, if that has the packages; otherwise a virtual
//! environment made here.

mod common;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use common::{disk, region_in, Region, WAIT};
use pccheck::engine::{Select, Store, Tensor};
use pccheck::format::{parse_header, Dtype, Payload};
use pccheck::load::{Checkpoint, Part};
use pccheck::medium::{Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use serde::Deserialize;

const ENV_PYTHON: &str = "PCC_PYTHON";
const PACKAGES: [&str; 2] = ["safetensors==0.8.*", "numpy"];
/// Dtypes of the engine that Python's package shows as numpy arrays.
const NUMPY_DTYPES: usize = 13;
/// Dtypes that Python's package can write.
const WRITABLE_DTYPES: usize = 20;

/// What Python says of a file.
#[derive(Debug, Deserialize, PartialEq)]
struct Found {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, FoundTensor>,
    /// Tensors that were also compared as numpy arrays.
    arrays: usize,
}

#[derive(Debug, Deserialize, PartialEq)]
struct FoundTensor {
    dtype: String,
    shape: Vec<u64>,
    hex: String,
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{text}", output.status);
    output
}

fn has_packages(python: &Path) -> bool {
    let probe = "import numpy, safetensors; assert safetensors.__version__.startswith('0.8.')";
    Command::new(python).args(["-c", probe]).output().is_ok_and(|output| output.status.success())
}

/// A Python that has the packages.
fn python() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Some(given) = env::var_os(ENV_PYTHON) {
            return given.into();
        }
        if has_packages(Path::new("python3")) {
            return "python3".into();
        }
        let venv = disk().join("venv");
        let python = venv.join("bin/python");
        if !has_packages(&python) {
            run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
            let quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"];
            run(Command::new(&python).args(quiet).args(PACKAGES));
        }
        python
    })
}

fn ask_python(what: &str, file: &Path) -> Found {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/safetensors_side.py");
    let output = run(Command::new(python()).arg(script).arg(what).arg(file));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

struct Bed(Region);

impl Bed {
    fn new() -> Bed {
        let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, 4 << 20) };
        Bed(region_in(disk(), &format))
    }

    fn open(&self) -> Store {
        let options = OpenOptions {
            required: Durability::Process,
            chunk_bytes: 4096,
            staging_bytes: 64 << 10,
            ..OpenOptions::default()
        };
        Store::open(&self.0.path, &options).expect("open")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.dir.path().join(name)
    }

    /// Exports by the library: the payload is the file.
    fn write_payload(&self, name: &str) -> PathBuf {
        let store = self.open();
        let opened = store.open_checkpoint(Select::Newest, true).expect("open checkpoint");
        let path = self.file(name);
        fs::write(&path, payload_of(&opened.checkpoint)).expect("write");
        path
    }

    #[cfg(feature = "cli")]
    fn tool(&self, args: &[&str]) {
        run(Command::new(env!("CARGO_BIN_EXE_pccheck")).current_dir(self.0.dir.path()).args(args));
    }
}

fn payload_of(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut bytes = vec![0; checkpoint.record().payload_bytes as usize];
    checkpoint.read(&mut [Part { offset: 0, dst: &mut bytes }]).expect("read");
    bytes
}

fn noise(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(167) ^ (at >> 7) ^ seed.wrapping_mul(29)) as u8).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One tensor per dtype and shape: name, dtype, shape, bytes. The last dimension fills whole bytes of every dtype.
fn tensors_of_all_dtypes() -> Vec<(String, Dtype, Vec<u64>, Vec<u8>)> {
    let shapes: [&[u64]; 4] = [&[4], &[0, 4], &[3, 5, 4], &[1, 1, 8]];
    let mut tensors = Vec::new();
    for (index, dtype) in Dtype::ALL.into_iter().enumerate() {
        for (nth, shape) in shapes.iter().enumerate() {
            let bytes = shape.iter().product::<u64>() * dtype.bits() / 8;
            let mut data = noise(index * 7 + nth, bytes as usize);
            if dtype == Dtype::BOOL {
                data.iter_mut().for_each(|byte| *byte &= 1);
            }
            tensors.push((format!("{}.{nth} é\"\\", dtype.name()), dtype, shape.to_vec(), data));
        }
    }
    tensors
}

fn save(store: &Store, tensors: &[(String, Dtype, Vec<u64>, Vec<u8>)], metadata: &[(&str, &str)]) {
    let tensors: Vec<Tensor<'_>> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| Tensor { name, dtype: *dtype, shape, data })
        .collect();
    store.save(1, &tensors, metadata, WAIT).expect("save").wait_durable(WAIT).expect("durable");
}

/// What Python must find: complex128 as pairs of float64.
fn check_found(found: &Found, tensors: &[(String, Dtype, Vec<u64>, Vec<u8>)]) {
    assert_eq!(found.tensors.len(), tensors.len());
    for (name, dtype, shape, data) in tensors {
        let tensor = &found.tensors[name];
        let mut expected = shape.clone();
        let mut stored = dtype.name();
        if *dtype == Dtype::C128 {
            expected.push(2);
            stored = "F64";
        }
        assert_eq!((tensor.dtype.as_str(), &tensor.shape), (stored, &expected), "{name}");
        assert!(tensor.hex == hex(data), "tensor {name} came out changed");
    }
}

#[test]
fn python_loads_what_the_engine_wrote() {
    let bed = Bed::new();
    let tensors = tensors_of_all_dtypes();
    save(&bed.open(), &tensors, &[("epoch", "3"), ("über", "\"all\"\n\\")]);
    let file = bed.write_payload("exported.safetensors");
    let found = ask_python("read", &file);
    check_found(&found, &tensors);
    assert_eq!(found.metadata["epoch"], "3");
    assert_eq!(found.metadata["über"], "\"all\"\n\\");
    // Complex128 comes as float64, which numpy knows as well.
    assert_eq!(found.arrays, 4 * (NUMPY_DTYPES + 1));
}

/// One tensor that numpy cannot show must not keep a file of others from `load_file`.
#[test]
fn python_loads_the_whole_file_as_numpy_arrays() {
    let bed = Bed::new();
    let known = |dtype: Dtype| {
        !dtype.name().starts_with('F') || matches!(dtype, Dtype::F16 | Dtype::F32 | Dtype::F64)
    };
    let tensors: Vec<_> = tensors_of_all_dtypes()
        .into_iter()
        .filter(|(_, dtype, ..)| known(*dtype) && *dtype != Dtype::BF16)
        .collect();
    save(&bed.open(), &tensors, &[]);
    let found = ask_python("read", &bed.write_payload("exported.safetensors"));
    check_found(&found, &tensors);
    assert_eq!(found.arrays, tensors.len());
}

#[test]
fn python_loads_raw_streams_and_empty_states() {
    let bed = Bed::new();
    let store = bed.open();
    let data = noise(3, 100_001);
    let mut raw = store.begin_raw(1, data.len() as u64, &[], WAIT).expect("begin");
    raw.write_at(0, &data).expect("write");
    raw.commit().expect("commit").wait_durable(WAIT).expect("durable");
    drop((raw, store));
    let found = ask_python("read", &bed.write_payload("raw.safetensors"));
    assert_eq!(found.tensors["raw"].shape, [data.len() as u64]);
    assert!(found.tensors["raw"].hex == hex(&data));

    save(&bed.open(), &[], &[("only", "metadata")]);
    let found = ask_python("read", &bed.write_payload("empty.safetensors"));
    assert!(found.tensors.is_empty());
    assert_eq!(found.metadata["only"], "metadata");
}

fn read_header(path: &Path) -> Payload {
    let file = File::open(path).expect("open");
    let len = file.metadata().expect("metadata").len();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    parse_header(&bytes, len).expect("a safetensors header")
}

#[test]
fn the_engine_reads_what_python_wrote() {
    let bed = Bed::new();
    let path = bed.file("python.safetensors");
    let found = ask_python("write", &path);
    // F4 has no scalar.
    assert_eq!(found.tensors.len(), 4 * WRITABLE_DTYPES - 1);
    let payload = read_header(&path);
    let bytes = fs::read(&path).expect("read");
    assert_eq!(payload.metadata, found.metadata);
    assert_eq!(payload.tensors.len(), found.tensors.len());
    let mut dtypes = std::collections::BTreeSet::new();
    for tensor in &payload.tensors {
        let expected = &found.tensors[&tensor.name];
        assert_eq!(
            (tensor.dtype.name(), &tensor.shape),
            (expected.dtype.as_str(), &expected.shape),
            "{}",
            tensor.name
        );
        let data = &bytes[tensor.offset as usize..][..tensor.bytes as usize];
        assert!(hex(data) == expected.hex, "tensor {} is elsewhere", tensor.name);
        dtypes.insert(tensor.dtype.name());
    }
    assert_eq!(dtypes.len(), WRITABLE_DTYPES);

    // Saved and exported again, Python finds the same.
    let tensors: Vec<_> = payload
        .tensors
        .iter()
        .map(|tensor| {
            let data = bytes[tensor.offset as usize..][..tensor.bytes as usize].to_vec();
            (tensor.name.clone(), tensor.dtype, tensor.shape.clone(), data)
        })
        .collect();
    let metadata: Vec<(&str, &str)> =
        payload.metadata.iter().map(|(key, value)| (&**key, &**value)).collect();
    save(&bed.open(), &tensors, &metadata);
    assert_eq!(ask_python("read", &bed.write_payload("back.safetensors")), found);
}

/// The same way round by the command-line tool.
#[cfg(feature = "cli")]
#[test]
fn import_and_export_give_python_its_file_back() {
    let bed = Bed::new();
    let found = ask_python("write", &bed.file("python.safetensors"));
    bed.tool(&["import", "region", "python.safetensors", "--step", "7"]);
    bed.tool(&["export", "region", "-o", "back.safetensors", "--step", "7"]);
    assert_eq!(ask_python("read", &bed.file("back.safetensors")), found);
}
