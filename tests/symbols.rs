//! What the shared library exports is a committed list, and its name carries the ABI's major version. A symbol that
//! vanishes breaks programs at start; one that slips out becomes a promise.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use pccheck::capi::text::PCC_ABI_MAJOR;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Cargo builds the library's crate types together, next to the tests that use it.
fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let library = test.with_file_name("libpccheck.so");
    assert!(library.exists(), "no {}: was the cdylib dropped from Cargo.toml?", library.display());
    library
}

fn output(program: &str, arguments: &[&str], library: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(library)
        .output()
        .unwrap_or_else(|e| panic!("cannot run {program} (package binutils): {e}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn exported() -> BTreeSet<String> {
    let listing = output("nm", &["-D", "--defined-only"], &library());
    listing.lines().filter_map(|line| line.split_whitespace().nth(2)).map(String::from).collect()
}

#[test]
fn the_exported_symbols_are_the_committed_list() {
    let path = root().join("tests/symbols.txt");
    let exported = exported();
    if std::env::var_os("PCC_BLESS").is_some() {
        let text: String = exported.iter().map(|name| format!("{name}\n")).collect();
        std::fs::write(&path, text).expect("write tests/symbols.txt");
    }
    let text = std::fs::read_to_string(&path).expect("tests/symbols.txt");
    let committed: BTreeSet<String> = text.lines().map(String::from).collect();
    let missing: Vec<_> = committed.difference(&exported).collect();
    let extra: Vec<_> = exported.difference(&committed).collect();
    assert!(
        missing.is_empty() && extra.is_empty(),
        "missing {missing:?}, not in tests/symbols.txt {extra:?}; only additions may be written with PCC_BLESS=1"
    );
}

#[test]
fn the_header_declares_exactly_what_is_exported() {
    let header = std::fs::read_to_string(root().join("include/pccheck.h")).expect("include/pccheck.h");
    let code = header.lines().filter(|line| !line.starts_with("//") && !line.starts_with(" *"));
    let declared: BTreeSet<String> = code
        .filter(|line| !line.starts_with("typedef"))
        .filter_map(|line| line.split_once('(')?.0.rsplit([' ', '*']).next().map(String::from))
        .filter(|name| name.starts_with("pcc_"))
        .collect();
    assert_eq!(declared, exported());
}

#[test]
fn the_name_carries_the_abi_version_and_the_library_stays_loaded() {
    let dynamic = output("readelf", &["-dW"], &library());
    let soname = format!("[libpccheck.so.{PCC_ABI_MAJOR}]");
    assert!(dynamic.contains(&soname), "no SONAME {soname} in:\n{dynamic}");
    assert!(dynamic.contains("NODELETE"), "dlclose would unload the fork handlers:\n{dynamic}");
}
