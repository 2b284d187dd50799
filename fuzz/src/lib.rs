//! What several targets need.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

extern "C" {
    fn atexit(function: extern "C" fn()) -> i32;
}

/// A folder that goes when the program ends: in `PCC_FUZZ_DIR`, else in memory.
pub fn scratch() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let root = std::env::var_os("PCC_FUZZ_DIR").unwrap_or("/dev/shm".into());
        let dir = tempfile::Builder::new().prefix("pccheck-fuzz-").tempdir_in(root).expect("a folder");
        let path = dir.keep();
        extern "C" fn remove() {
            if let Some(dir) = DIR.get() {
                let _ = std::fs::remove_dir_all(dir);
            }
        }
        // SAFETY: a function that may run at any time.
        unsafe { atexit(remove) };
        path
    })
}
