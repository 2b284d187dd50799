//! Prevents: dependencies that point upwards, `unsafe`, atomics and assembly that leak out of the rooms where they
//! are looked after, and a library that prints, exits or panics. The sources are read as text; each rule is shown
//! failing on a snippet.

#[path = "layout/rules.rs"]
mod rules;
#[path = "layout/text.rs"]
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use rules::{Breach, LEVELS, MOST_LINES, RULES, SYNC_ROOMS, UNSAFE_ROOMS};
use text::{test_modules, TestModule, Text};

/// Every source file by its path below `src`.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut found = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                let name = path.strip_prefix(&root).expect("below").display().to_string();
                found.insert(name, fs::read_to_string(&path).expect("read"));
            }
        }
    }
    found
}

/// Files that are compiled for tests only: those that some file declares so, and what is below them.
fn test_files(sources: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut roots: BTreeSet<PathBuf> = BTreeSet::new();
    for (file, raw) in sources {
        let file = Path::new(file);
        let folder = file.parent().unwrap_or(Path::new(""));
        let is_root = matches!(file.file_stem().and_then(|stem| stem.to_str()), Some("mod" | "lib" | "main"));
        let below = if is_root { folder.to_path_buf() } else { file.with_extension("") };
        for TestModule { name, path } in test_modules(raw) {
            match path {
                Some(path) => drop(roots.insert(folder.join(path))),
                None => {
                    roots.insert(below.join(format!("{name}.rs")));
                    roots.insert(below.join(name));
                }
            }
        }
    }
    let is_test = |file: &&String| roots.iter().any(|root| Path::new(file).starts_with(root));
    sources.keys().filter(is_test).cloned().collect()
}

#[test]
fn the_sources_keep_every_rule() {
    let sources = sources();
    let tests = test_files(&sources);
    assert!(sources.len() > 50 && tests.len() > 5, "{} files, {} for tests", sources.len(), tests.len());
    let mut breaches = Vec::new();
    for (file, raw) in &sources {
        let text = Text::new(raw);
        for (name, rule) in RULES {
            // Tests may do as they like, but they are read by people, too.
            if !tests.contains(file) || *name == "length" || *name == "safety comments" {
                breaches.extend(
                    rule(file, &text).iter().map(|(line, what)| format!("src/{file}:{line}: {name}: {what}")),
                );
            }
        }
    }
    assert!(breaches.is_empty(), "\n{}\n", breaches.join("\n"));
}

#[test]
fn the_crate_denies_unsafe_code() {
    let root = &sources()["lib.rs"];
    assert!(Text::new(root).code.contains("#![deny(unsafe_code)]"));
}

/// An exemption for what is not there any more would hide the next breach.
#[test]
fn no_exemption_is_stale() {
    let sources = sources();
    for room in UNSAFE_ROOMS.iter().chain(SYNC_ROOMS).map(|(room, _)| room) {
        // The C boundary may be built without.
        let there =
            sources.keys().any(|file| file == room || (room.ends_with('/') && file.starts_with(room)));
        assert!(there || *room == "capi/", "{room} does not exist");
    }
    let declared: BTreeSet<&str> = sources.keys().filter_map(|file| file.split('/').next()).collect();
    for module in LEVELS.iter().flat_map(|level| level.iter()) {
        let there = declared.contains(module) || declared.contains(format!("{module}.rs").as_str());
        assert!(there, "{module} does not exist");
    }
}

// ---- each rule can fail ---------------------------------------------------------------------------------------

fn check(rule: fn(&str, &Text) -> Vec<Breach>, file: &str, raw: &str) -> Vec<usize> {
    rule(file, &Text::new(raw)).into_iter().map(|(line, _)| line).collect()
}

#[test]
fn direction_catches_every_way_upwards() {
    let up = |file: &str, raw: &str| check(rules::direction, file, raw);
    assert_eq!(up("medium/io.rs", "\nuse crate::store::Region;"), [2]);
    assert_eq!(up("medium/io.rs", "fn f() { crate::engine::x() }"), [1]);
    assert_eq!(up("medium/io.rs", "use crate::{error::Error, format::{a, b}, save::Save};"), [1]);
    assert_eq!(up("medium/io.rs", "use super::super::store::Region;"), [1]);
    assert_eq!(up("recovery.rs", "use super::store::Region;"), [1]);
    assert_eq!(up("save/mod.rs", "use crate::load::Checkpoint;"), [1], "the same level is not lower");
    assert_eq!(up("save/core.rs", "use crate::{\n    load::Checkpoint,\n};"), [1]);
    assert_eq!(up("new_room.rs", ""), [1], "a module that is not in the table");
    assert!(
        up("medium/io.rs", "use super::open::store; use crate::medium::x; use crate::format::y;").is_empty()
    );
    assert!(up("medium/io.rs", "// use crate::store\nconst A: &str = \"crate::store\";").is_empty());
    assert!(up("medium/io.rs", "#[cfg(test)]\nmod tests {\n    use crate::store::Region;\n}").is_empty());
    assert!(up("bin/pccheck/main.rs", "use pccheck::engine::Store; use crate::demo::x;").is_empty());
}

#[test]
fn unsafe_leaks_are_caught() {
    let leak = |file: &str, raw: &str| check(rules::unsafe_rooms, file, raw);
    assert_eq!(leak("store/region.rs", "fn f() {\n    unsafe { x() }\n}"), [2]);
    assert_eq!(leak("format/codec.rs", "unsafe impl Send for X {}"), [1]);
    assert_eq!(leak("medium/sim/medium.rs", "unsafe fn f() {}"), [1]);
    assert_eq!(leak("staging/set.rs", "unsafe fn f() {}"), [1]);
    assert!(leak("medium/io.rs", "unsafe fn f() {}").is_empty());
    assert!(leak("store/region.rs", "#![deny(unsafe_code)] // unsafe\nfn not_unsafe() {}").is_empty());
}

#[test]
fn atomics_and_assembly_are_caught() {
    let sync = |file: &str, raw: &str| check(rules::sync_seam, file, raw);
    assert_eq!(sync("slots/table.rs", "use std::sync::atomic::AtomicU64;"), [1]);
    assert_eq!(sync("slots/table.rs", "\nfn f(x: std::sync::Arc<u8>) {}"), [2]);
    assert_eq!(sync("slots/table.rs", "use core::sync::atomic::fence;"), [1]);
    assert_eq!(sync("slots/table.rs", "use loom::sync::Arc;"), [1]);
    assert!(sync("slots/table.rs", "#[cfg(loom)] use crate::sync::atomic::AtomicU64;").is_empty());
    assert!(sync("sync.rs", "use std::sync::Mutex;").is_empty());

    let asm = |file: &str, raw: &str| check(rules::asm_room, file, raw);
    assert_eq!(asm("medium/io.rs", "fn f() { core::arch::asm!(\"sfence\") }"), [1, 1]);
    assert_eq!(asm("medium/io.rs", "use std::arch::x86_64::_mm_sfence;"), [1]);
    assert!(asm("persist/x86_64.rs", "use core::arch::x86_64::_mm_sfence;").is_empty());
}

#[test]
fn noise_is_caught() {
    let noise = |file: &str, raw: &str| check(rules::quiet, file, raw);
    for bad in [
        "println!(\"x\")",
        "eprintln!()",
        "dbg!(x)",
        "std::process::exit(1)",
        "std::process::abort()",
        "unsafe { libc::abort() }",
        "panic!(\"x\")",
        "todo!()",
        "unreachable!()",
        "x.unwrap()",
        "x\n.expect(\"y\")",
        "libc::sigaction(1)",
    ] {
        assert_eq!(noise("store/mod.rs", &format!("fn f() {{ {bad} }}")).len(), 1, "{bad}");
    }
    let fine =
        "#[expect(unsafe_code)] fn f() { x.unwrap_or(1); x.expected(); y.unwrap_or_else(|| \"panic!\") }";
    assert!(noise("store/mod.rs", fine).is_empty());
    assert!(noise("store/mod.rs", "/// x.unwrap()\n//! panic!\n/* println!() /* dbg!() */ */ fn f() {}")
        .is_empty());
    assert!(noise("store/mod.rs", "#[cfg(all(test, loom))]\nfn f() { panic!() }\n").is_empty());
    assert_eq!(
        noise("store/mod.rs", "#[cfg(test)]\nmod t { fn f() { panic!() } }\nfn g() { panic!() }"),
        [3]
    );
    assert!(noise("bin/pccheck/main.rs", "fn main() { println!() }").is_empty());
}

#[test]
fn missing_safety_comments_are_caught() {
    let bare = |raw: &str| check(rules::safety_comments, "medium/io.rs", raw);
    assert_eq!(bare("fn f() {\n    unsafe { x() }\n}"), [2]);
    assert_eq!(bare("fn f() {\n    // SAFETY: once.\n    unsafe { x() };\n    unsafe { y() };\n}"), [4]);
    assert_eq!(bare("// SAFETY: far.\n\nunsafe impl Send for X {}"), [3]);
    assert_eq!(bare("// safety, somehow\nunsafe impl Send for X {}"), [2]);
    assert!(bare("// SAFETY: true.\nunsafe impl Send for X {}").is_empty());
    assert!(bare("fn f() {\n    // SAFETY: a true\n    // reason.\n    let x = g(\n        a,\n        unsafe { x() },\n    );\n}").is_empty());
    assert!(bare("/// # Safety\n///\n/// Promise.\nunsafe fn f() {}").is_empty());
}

#[test]
fn long_files_are_caught() {
    let lines = "\n".repeat(MOST_LINES + 1);
    assert_eq!(check(rules::length, "store/mod.rs", &lines), [MOST_LINES + 1]);
    assert!(check(rules::length, "store/mod.rs", &lines[1..]).is_empty());
}

#[test]
fn text_is_told_from_code() {
    let code = |raw: &str| Text::new(raw).code;
    assert_eq!(code("a // b\nc"), "a     \nc");
    assert_eq!(code("a /* b /* c */ d */ e").trim_end(), "a                   e");
    assert_eq!(code(r##"f(r#"x " y"#, "a\"b", 'c', '\'', b"z")"##).replace(' ', ""), "f(,,,,b)");
    assert_eq!(code("fn f<'a>(x: &'a str) -> &'static str {}"), "fn f<'a>(x: &'a str) -> &'static str {}");
    assert_eq!(code("'é' x"), "     x");
    let modules = test_modules("#[cfg(test)]\n#[path = \"recovery_test.rs\"]\nmod tests;\n#[cfg(all(test, loom))]\nmod models;\n#[cfg(test)]\nmod here { }");
    let module =
        |name: &str, path: Option<&str>| TestModule { name: name.into(), path: path.map(str::to_string) };
    assert_eq!(modules, [module("tests", Some("recovery_test.rs")), module("models", None)]);
}
