//! What a C program holds while it calls: its handles, its memory, and what it was told.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void, CStr, CString};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pccheck::capi::checkpoint::*;
use pccheck::capi::codes::*;
use pccheck::capi::infos::*;
use pccheck::capi::options::*;
use pccheck::capi::raw::*;
use pccheck::capi::read::*;
use pccheck::capi::save::*;
use pccheck::capi::status::*;
use pccheck::capi::store::*;
use pccheck::capi::text::*;
use pccheck_fuzz::scratch;

use crate::args::{Size, Tensors};

/// Calls an exported function.
macro_rules! c {
    ($call:expr) => {
        // SAFETY: the arguments are within what the header asks for, or what it promises to refuse.
        unsafe { $call }
    };
}
pub(crate) use c;

/// A struct of the header with all its bytes zero.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for structs of integers and pointers only.
    unsafe { std::mem::zeroed() }
}

pub struct Store {
    pub handle: *mut pcc_store,
    pub writes: bool,
    /// It is the region of the first path.
    pub first: bool,
    /// Begins of saves find a slot in the end.
    pub reclaims: bool,
}

/// A save and what is known of it.
pub struct Save {
    pub handle: *mut pcc_save,
    pub generation: u64,
    /// Of the region of the first path.
    pub first: bool,
    /// It ends by itself.
    pub ends: bool,
}

pub struct Raw {
    pub handle: *mut pcc_raw,
    pub committed: bool,
    pub ends: bool,
    pub first: bool,
}

/// Saves that free themselves when they have ended.
static SELF_FREED: AtomicU64 = AtomicU64::new(0);

pub extern "C" fn count(user: *mut c_void) {
    // SAFETY: `user` is a counter that outlives every save.
    unsafe { &*user.cast::<AtomicU64>() }.fetch_add(1, Ordering::SeqCst);
}

extern "C" fn free_save(user: *mut c_void) {
    c!(pcc_save_free(user.cast()));
    SELF_FREED.fetch_add(1, Ordering::SeqCst);
}

pub struct World {
    /// The region, another file, one that is not there, and a folder.
    pub paths: [CString; 4],
    pub stores: Vec<Store>,
    pub saves: Vec<Save>,
    pub raws: Vec<Raw>,
    pub checkpoints: Vec<*mut pcc_checkpoint>,
    pub told: Box<AtomicU64>,
    /// Memory that saves read from; nobody changes it.
    pub memory: Vec<Tensors>,
    /// Of each generation of the first path, the tensors by name.
    pub contents: BTreeMap<u64, Vec<(CString, Vec<u8>)>>,
    /// The newest generation of the first path that was reported durable, and not given up since.
    pub durable: u64,
    freeing: u64,
}

pub fn open_options() -> pcc_open_options {
    let mut options: pcc_open_options = zeroed();
    ok(c!(pcc_open_options_init(&mut options, size_of::<pcc_open_options>() as u64)));
    options.required_durability = PCC_DURABILITY_PROCESS;
    options.chunk_bytes = 4096;
    options.staging_bytes = 8 * 4096;
    options.writers = 1;
    options.readers = 1;
    options.lock_wait_ms = 0;
    options
}

fn text_of(fill: impl Fn(*mut c_char, u64) -> u64) -> String {
    let needed = fill(null_mut(), 0) as usize;
    let mut buffer = vec![0x55u8; needed.max(1)];
    assert_eq!(fill(buffer.as_mut_ptr().cast(), buffer.len() as u64) as usize, needed);
    let text = CStr::from_bytes_until_nul(&buffer).expect("a final NUL").to_str().expect("UTF-8").to_owned();
    assert_eq!(needed, if needed == 0 { 0 } else { text.len() + 1 });
    text
}

#[track_caller]
pub fn ok(status: pcc_status) {
    assert_eq!(status, PCC_OK, "{}", text_of(|buf, cap| c!(pcc_last_error(buf, cap))));
}

/// The status is one that the header knows, not one of a defect, and has a text.
#[track_caller]
pub fn checked(status: pcc_status) -> bool {
    if status == PCC_OK {
        return true;
    }
    let text = text_of(|buf, cap| c!(pcc_last_error(buf, cap)));
    assert!((PCC_DEVICE..0).contains(&status), "status {status}: {text}");
    assert!(
        ![PCC_INTERNAL, PCC_FORKED, PCC_IO, PCC_DURABILITY_UNKNOWN].contains(&status),
        "{status}: {text}"
    );
    assert_eq!(pcc_last_error_status(), status);
    assert!(!text.is_empty());
    false
}

impl World {
    pub fn new() -> World {
        let dir = scratch();
        for entry in std::fs::read_dir(dir).expect("list").flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
        let path =
            |name: &str| CString::new(dir.join(name).into_os_string().into_encoded_bytes()).expect("a path");
        World {
            paths: [path("region"), path("other"), path("absent/region"), path("")],
            stores: Vec::new(),
            saves: Vec::new(),
            raws: Vec::new(),
            checkpoints: Vec::new(),
            told: Box::new(AtomicU64::new(0)),
            memory: Vec::new(),
            contents: BTreeMap::new(),
            durable: 0,
            freeing: SELF_FREED.load(Ordering::SeqCst),
        }
    }

    pub fn begin(&mut self, slots: u32, open: bool) {
        ok(c!(pcc_format(self.paths[0].as_ptr(), slots, 1 << 20, null())));
        if open {
            let mut store = null_mut();
            let mut options = open_options();
            options.max_in_flight = (slots - 1).min(2);
            ok(c!(pcc_open(self.paths[0].as_ptr(), &options, &mut store)));
            self.stores.push(Store { handle: store, writes: true, first: true, reclaims: true });
        }
    }

    /// A writer has the region open.
    pub fn written_to(&self) -> bool {
        self.stores.iter().any(|store| store.writes)
    }

    /// Every save that is in flight ends by itself.
    pub fn all_end(&self) -> bool {
        self.saves.iter().all(|save| save.ends) && self.raws.iter().all(|raw| raw.committed && raw.ends)
    }

    /// Whatever was durable may be gone: it was given up, or another region is there.
    pub fn forget(&mut self) {
        self.durable = 0;
        self.contents.clear();
    }

    pub fn ended_durably(&mut self, generation: u64) {
        if self.contents.contains_key(&generation) {
            self.durable = self.durable.max(generation);
        }
    }

    /// Hands a save over to a callback that frees it.
    pub fn free_at_end(&mut self, index: usize) {
        let save = self.saves.swap_remove(index);
        if !save.ends {
            ok(c!(pcc_save_cancel(save.handle)));
        }
        self.freeing += 1;
        ok(c!(pcc_save_on_end(save.handle, Some(free_save), save.handle.cast())));
    }

    pub fn end(mut self, stores_first: bool) {
        if stores_first {
            self.close_stores();
        }
        for save in self.saves.drain(..) {
            c!(pcc_save_free(save.handle));
        }
        for raw in self.raws.drain(..) {
            c!(pcc_raw_free(raw.handle));
        }
        for checkpoint in self.checkpoints.drain(..) {
            c!(pcc_checkpoint_close(checkpoint));
        }
        self.close_stores();
        let patience = Instant::now() + Duration::from_secs(10);
        while SELF_FREED.load(Ordering::SeqCst) < self.freeing {
            assert!(Instant::now() < patience, "a save that ended told nobody");
            std::thread::yield_now();
        }
        if self.durable > 0 {
            self.is_there();
        }
    }

    fn close_stores(&mut self) {
        for store in self.stores.drain(..) {
            c!(pcc_close(store.handle));
        }
    }

    /// The next program finds a checkpoint at least as new as every save that was reported durable, as it was.
    fn is_there(&self) {
        let (mut store, mut checkpoint) = (null_mut(), null_mut());
        let options = pcc_open_options { read_only: 1, ..open_options() };
        ok(c!(pcc_open(self.paths[0].as_ptr(), &options, &mut store)));
        ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
        let mut info: pcc_checkpoint_info = zeroed();
        info.struct_bytes = size_of::<pcc_checkpoint_info>() as u64;
        ok(c!(pcc_checkpoint_get_info(checkpoint, &mut info)));
        assert!(
            info.generation >= self.durable,
            "{} is lost, the newest is {}",
            self.durable,
            info.generation
        );
        for (name, data) in self.contents.get(&info.generation).into_iter().flatten() {
            let mut found = vec![0u8; data.len()];
            let read = pcc_read {
                name: name.as_ptr(),
                bytes: data.len() as u64,
                dst: found.as_mut_ptr().cast(),
                ..zeroed()
            };
            let mut placed = Size::Exact.place(&[read]);
            ok(c!(pcc_checkpoint_read(checkpoint, placed.ptr(), 1)));
            assert!(found == *data, "tensor {name:?} came back changed");
        }
        c!(pcc_checkpoint_close(checkpoint));
        c!(pcc_close(store));
    }
}
