//! The committed header is what the sources say, C and C++ compilers take it, and both sides agree on every struct.
//! A regression here is a program that is compiled against one ABI and runs against another.

use std::path::Path;

/// Sources of the header, in the order in which it presents them.
const SOURCES: [&str; 8] = [
    "src/capi/status.rs",
    "src/capi/text.rs",
    "src/capi/options.rs",
    "src/capi/store.rs",
    "src/capi/save.rs",
    "src/capi/raw.rs",
    "src/capi/checkpoint.rs",
    "src/capi/tune.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn committed() -> String {
    std::fs::read_to_string(root().join("include/pccheck.h")).expect("include/pccheck.h")
}

fn generated() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml");
    let builder = SOURCES.iter().fold(cbindgen::Builder::new().with_config(config), |builder, source| {
        builder.with_src(root().join(source))
    });
    let mut header = Vec::new();
    builder.generate().expect("cbindgen").write(&mut header);
    String::from_utf8(header).expect("UTF-8")
}

#[test]
fn the_committed_header_is_what_the_sources_say() {
    let generated = generated();
    if std::env::var_os("PCC_BLESS").is_some() {
        std::fs::write(root().join("include/pccheck.h"), &generated).expect("write the header");
    }
    let committed = committed();
    let differs = generated.lines().zip(committed.lines()).position(|(a, b)| a != b);
    assert!(
        generated == committed,
        "include/pccheck.h differs from src/capi, first in line {:?}; PCC_BLESS=1 cargo test --test header writes it",
        differs.map(|line| line + 1)
    );
}
