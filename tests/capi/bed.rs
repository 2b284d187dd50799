//! What a C program has at hand: the header's names, a region, a state, and what every call must answer.

pub use std::ffi::{c_char, c_void, CStr, CString};
pub use std::ptr::{null, null_mut};

pub use pccheck::capi::checkpoint::*;
pub use pccheck::capi::codes::*;
pub use pccheck::capi::dtype::*;
pub use pccheck::capi::health::*;
pub use pccheck::capi::infos::*;
pub use pccheck::capi::options::*;
pub use pccheck::capi::raw::*;
pub use pccheck::capi::read::*;
pub use pccheck::capi::save::*;
pub use pccheck::capi::status::*;
pub use pccheck::capi::store::*;
pub use pccheck::capi::text::*;
pub use pccheck::capi::tune::*;

use super::common::scratch;

pub const WAIT_MS: i64 = 60_000;

/// Calls an exported function.
macro_rules! c {
    ($call:expr) => {
        // SAFETY: the arguments are what the header asks for, or what it promises to refuse.
        unsafe { $call }
    };
}

/// A zeroed struct with its size set, as C programs make it.
macro_rules! sized {
    ($type:ident) => {{
        let mut value: $type = zeroed();
        value.struct_bytes = size_of::<$type>() as u64;
        value
    }};
}

pub(crate) use {c, sized};

/// A struct of the header with all its bytes zero.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for structs of integers and pointers only.
    unsafe { std::mem::zeroed() }
}

pub fn text_of(fill: impl Fn(*mut c_char, u64) -> u64) -> String {
    let needed = fill(null_mut(), 0);
    let mut buffer = vec![0u8; needed as usize + 1];
    assert_eq!(fill(buffer.as_mut_ptr().cast(), buffer.len() as u64), needed);
    let text = CStr::from_bytes_until_nul(&buffer).expect("a final NUL").to_str().expect("UTF-8").to_string();
    assert_eq!(needed, if needed == 0 { 0 } else { text.len() as u64 + 1 });
    text
}

pub fn last_error() -> String {
    text_of(|buf, cap| c!(pcc_last_error(buf, cap)))
}

#[track_caller]
pub fn ok(status: pcc_status) {
    assert_eq!(status, PCC_OK, "{}", last_error());
}

/// The call fails so, and its text says all of `parts`.
#[track_caller]
pub fn fails(status: pcc_status, expected: pcc_status, parts: &[&str]) {
    let text = last_error();
    assert_eq!(status, expected, "{text}");
    assert_eq!(pcc_last_error_status(), expected);
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

pub struct Region {
    _dir: tempfile::TempDir,
    pub path: CString,
}

pub fn region(slots: u32, payload_bytes: u64) -> Region {
    let dir = scratch();
    let path = CString::new(dir.path().join("region").to_str().expect("UTF-8")).expect("a path");
    ok(c!(pcc_format(path.as_ptr(), slots, payload_bytes, null())));
    Region { _dir: dir, path }
}

pub fn open_options() -> pcc_open_options {
    let mut options = sized!(pcc_open_options);
    ok(c!(pcc_open_options_init(&mut options, size_of::<pcc_open_options>() as u64)));
    options.chunk_bytes = 64 << 10;
    options.staging_bytes = 1 << 20;
    options.required_durability = PCC_DURABILITY_PROCESS;
    options
}

pub fn open_with(region: &Region, options: &pcc_open_options) -> *mut pcc_store {
    let mut store = null_mut();
    ok(c!(pcc_open(region.path.as_ptr(), options, &mut store)));
    assert!(!store.is_null());
    store
}

pub fn open(region: &Region) -> *mut pcc_store {
    open_with(region, &open_options())
}

/// Tensors that own what they point to.
pub struct State {
    pub names: Vec<CString>,
    pub shapes: Vec<[u64; 2]>,
    pub data: Vec<Vec<f32>>,
}

impl State {
    pub fn new(seed: u32) -> State {
        let sizes = [(3u64, 5u64), (1, 1), (200, 321), (0, 7), (64, 256)];
        let value = |i: usize, k: u64| (seed as f32) + (i as f32) * 0.5 + (k as f32) * 0.25;
        State {
            names: (0..sizes.len()).map(|i| CString::new(format!("läyer.{i}")).unwrap()).collect(),
            shapes: sizes.iter().map(|&(a, b)| [a, b]).collect(),
            data: (0..sizes.len())
                .map(|i| (0..sizes[i].0 * sizes[i].1).map(|k| value(i, k)).collect())
                .collect(),
        }
    }

    pub fn zeroed(&self) -> State {
        let data = self.data.iter().map(|data| vec![0.0; data.len()]).collect();
        State { names: self.names.clone(), shapes: self.shapes.clone(), data }
    }

    pub fn tensors(&mut self) -> Vec<pcc_tensor> {
        let parts = self.names.iter().zip(&self.shapes).zip(&mut self.data);
        parts
            .map(|((name, shape), data)| pcc_tensor {
                name: name.as_ptr(),
                shape: shape.as_ptr(),
                rank: 2,
                dtype: PCC_DTYPE_F32,
                data: data.as_mut_ptr().cast(),
                bytes: (data.len() * 4) as u64,
                ..sized!(pcc_tensor)
            })
            .collect()
    }
}

pub fn begin(store: *const pcc_store, step: u64, state: &mut State) -> *mut pcc_save {
    let tensors = state.tensors();
    let pairs = [pcc_pair { key: c"epoch".as_ptr(), value: c"drei".as_ptr() }];
    let mut save = null_mut();
    let count = tensors.len() as u64;
    ok(c!(pcc_save_begin(store, step, tensors.as_ptr(), count, pairs.as_ptr(), 1, null(), &mut save)));
    save
}

pub fn save_durably(store: *const pcc_store, step: u64, state: &mut State) -> u64 {
    let save = begin(store, step, state);
    ok(c!(pcc_save_wait_copied(save, WAIT_MS)));
    let mut durable = sized!(pcc_durable);
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, &mut durable)));
    c!(pcc_save_free(save));
    assert!(durable.durable_ns >= durable.copied_ns && durable.copied_ns > 0);
    durable.generation
}

pub fn restores(store: *const pcc_store, expected: &State) -> pcc_checkpoint_info {
    let mut found = expected.zeroed();
    let tensors = found.tensors();
    let mut checkpoint = null_mut();
    ok(c!(pcc_restore(store, null(), tensors.as_ptr(), tensors.len() as u64, &mut checkpoint)));
    assert!(found.data == expected.data, "the state came back changed");
    let mut info = sized!(pcc_checkpoint_info);
    ok(c!(pcc_checkpoint_get_info(checkpoint, &mut info)));
    c!(pcc_checkpoint_close(checkpoint));
    info
}

/// A raw save that was begun and not committed keeps its slot for as long as a test likes.
pub fn occupy(store: *const pcc_store) -> *mut pcc_raw {
    let mut raw = null_mut();
    ok(c!(pcc_raw_begin(store, 1, 100, null(), 0, null(), &mut raw)));
    raw
}
