//! Gives the shared library its SONAME, which carries the ABI major version; for the Python wheel (feature `python`)
//! also writes the C header in the form that cffi reads.

use std::path::PathBuf;

/// Major version of the C ABI; raised only when an existing call changes its meaning.
const ABI_MAJOR: u32 = 1;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libpccheck.so.{ABI_MAJOR}");
    // The library owns threads and fork handlers: unloading it would pull code from under them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    if std::env::var_os("CARGO_FEATURE_PYTHON").is_some() {
        println!("cargo:rerun-if-changed=include/pccheck.h");
        let header = std::fs::read_to_string("include/pccheck.h").expect("include/pccheck.h");
        let path = target_dir().join("header.h");
        std::fs::write(&path, cffi_declarations(&header)).expect("write the declarations for cffi");
    }
}

/// Where maturin looks for `header.h`: the folder that cargo builds in. `OUT_DIR` is `PROFILE/build/PACKAGE/out` in it, or
/// that in a folder of the target's name, where one was given.
fn target_dir() -> PathBuf {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("OUT_DIR"));
    let target = std::env::var_os("TARGET").expect("TARGET");
    let above_profile = out.ancestors().nth(4).expect("OUT_DIR lies in the target folder");
    match above_profile.file_name() == Some(&target) {
        true => above_profile.parent().unwrap_or(above_profile).to_path_buf(),
        false => above_profile.to_path_buf(),
    }
}

/// cffi knows no preprocessor but for `#define NAME number`.
fn cffi_declarations(header: &str) -> String {
    let mut depth_cplusplus = false;
    let mut declarations = String::new();
    for line in header.lines() {
        match line.trim() {
            "#ifdef __cplusplus" => depth_cplusplus = true,
            _ if depth_cplusplus && line.starts_with("#endif") => depth_cplusplus = false,
            _ if depth_cplusplus => {}
            _ if line.starts_with('#') && !line.starts_with("#define PCC_") => {}
            "#define PCC_NO_OFFSET UINT64_MAX" => {
                declarations += "#define PCC_NO_OFFSET 0xFFFFFFFFFFFFFFFF\n"
            }
            _ => {
                declarations += line;
                declarations.push('\n');
            }
        }
    }
    declarations
}
