//! Gives the shared library its SONAME, which carries the ABI major version.

/// Major version of the C ABI; raised only when an existing call changes its meaning.
const ABI_MAJOR: u32 = 1;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libpccheck.so.{ABI_MAJOR}");
    // The library owns threads and fork handlers: unloading it would pull code from under them.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
