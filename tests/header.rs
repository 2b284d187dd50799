//! The committed header is what the sources say, C and C++ compilers take it, and both sides agree on every struct.
//! A regression here is a program that is compiled against one ABI and runs against another.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::scratch;
use pccheck::capi::infos::*;
use pccheck::capi::options::*;

/// Sources of the header, in the order in which it presents them.
const SOURCES: [&str; 13] = [
    "src/capi/status.rs",
    "src/capi/text.rs",
    "src/capi/codes.rs",
    "src/capi/options.rs",
    "src/capi/infos.rs",
    "src/capi/dtype.rs",
    "src/capi/store.rs",
    "src/capi/health.rs",
    "src/capi/save.rs",
    "src/capi/raw.rs",
    "src/capi/checkpoint.rs",
    "src/capi/read.rs",
    "src/capi/tune.rs",
];

const C_STANDARDS: [&str; 2] = ["c11", "gnu17"];
const CXX_STANDARDS: [&str; 4] = ["c++11", "c++14", "c++17", "c++20"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn committed() -> String {
    std::fs::read_to_string(root().join("include/pccheck.h")).expect("include/pccheck.h")
}

fn generated() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml");
    let builder = SOURCES
        .iter()
        .fold(cbindgen::Builder::new().with_config(config), |b, source| b.with_src(root().join(source)));
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

#[test]
fn every_source_with_exported_functions_is_in_the_header() {
    let mut paths = vec![root().join("src/capi")];
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(std::fs::read_dir(path).expect("list").map(|entry| entry.expect("entry").path()));
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("source");
        let listed = SOURCES.iter().any(|source| root().join(source) == path);
        assert!(listed || !text.contains("no_mangle"), "{} is not among SOURCES", path.display());
    }
}

// ---- what the text may hold ---------------------------------------------------------------------------------

/// Code lines of the header: comments and the prose above it removed.
fn code() -> String {
    let header = committed();
    let (_, code) = header.split_once("#ifndef PCCHECK_H").expect("include guard");
    code.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

#[test]
fn nothing_that_dlopen_users_cannot_reach() {
    let code = code();
    let words: BTreeSet<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    for banned in
        ["enum", "union", "inline", "static", "bool", "_Bool", "size_t", "long", "short", "unsigned"]
    {
        assert!(!words.contains(banned), "the header uses `{banned}`");
    }
    let function_like = |line: &&str| {
        let name = line.trim().strip_prefix("#define ").and_then(|rest| rest.split(' ').next());
        name.is_some_and(|name| name.contains('('))
    };
    assert_eq!(code.lines().find(function_like), None, "a function-like macro");
    let bit_field = code.lines().find(|line| line.contains(':'));
    assert_eq!(bit_field, None, "a bit-field");
}

/// Comment lines and declaration of every function.
fn functions() -> Vec<(Vec<String>, String)> {
    let header = committed();
    let (_, declarations) = header.split_once("#ifndef PCCHECK_H").expect("include guard");
    let (mut found, mut comment) = (Vec::new(), Vec::new());
    let mut lines = declarations.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("//") {
            comment.push(text.trim().to_string());
            continue;
        }
        if line.contains(" pcc_") || line.contains("*pcc_") {
            let mut declaration = line.to_string();
            if line.contains('(') && !line.starts_with("typedef") {
                while !declaration.contains(';') {
                    declaration += lines.next().expect("the end of the declaration");
                }
                found.push((std::mem::take(&mut comment), declaration));
            }
        }
        comment.clear();
    }
    found
}

#[test]
fn every_function_says_what_lasts_who_may_call_who_owns_and_how_it_fails() {
    let functions = functions();
    assert!(functions.len() > 50, "only {} functions were found", functions.len());
    for (comment, declaration) in functions {
        let mut starts = comment.iter().filter_map(|line| line.split_once(':').map(|(word, _)| word));
        for part in ["Durability", "Threads", "Ownership", "Errors"] {
            assert!(
                starts.any(|word| word == part),
                "{declaration} lacks the line {part}, or has it out of order"
            );
        }
        let parameters = declaration.split_once('(').map_or("", |(_, rest)| rest);
        let on_handle = ["pcc_store", "pcc_save", "pcc_raw", "pcc_checkpoint"]
            .iter()
            .any(|handle| parameters.starts_with(&format!("const struct {handle} *")));
        let threads = comment.iter().find_map(|line| line.strip_prefix("Threads: ")).expect("checked above");
        assert!(!on_handle || threads.starts_with("any"), "{declaration} is const, but says: {threads}");
    }
}

// ---- compilers ----------------------------------------------------------------------------------------------

fn compiler(variable: &str, default: &str) -> Command {
    Command::new(std::env::var_os(variable).unwrap_or_else(|| default.into()))
}

/// Compiles `text` under every standard; panics with what the compiler says.
fn compile(name: &str, text: &str) {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let all = C_STANDARDS.iter().map(|s| ("CC", "cc", "c", s));
    for (variable, default, extension, standard) in
        all.chain(CXX_STANDARDS.iter().map(|s| ("CXX", "c++", "cpp", s)))
    {
        let source = dir.join(format!("{name}.{extension}"));
        std::fs::write(&source, text).expect("write the source");
        let output = compiler(variable, default)
            .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wundef", "-fsyntax-only"])
            .arg(format!("-std={standard}"))
            .arg("-I")
            .arg(root().join("include"))
            .arg(&source)
            .output()
            .unwrap_or_else(|e| panic!("cannot run the compiler {default}: {e}"));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{standard}: {stderr}");
    }
}

fn macros() -> Vec<String> {
    let code = code();
    let names = code.lines().filter_map(|line| line.strip_prefix("#define PCC_")?.split_once(' '));
    names.map(|(name, _)| format!("PCC_{name}")).collect()
}

#[test]
fn c_and_cpp_take_the_header_twice_and_every_macro_has_a_value() {
    let macros = macros();
    assert!(macros.len() > 60, "only {} macros were found", macros.len());
    let mut text = String::from("#include <pccheck.h>\n#include <pccheck.h>\n");
    text += "typedef void (*pcc_any)(void);\n";
    text += "int main(void) {\n    uint64_t sum = 0;\n    pcc_any volatile function = 0;\n";
    for name in macros {
        writeln!(text, "    sum += (uint64_t)({name});\n    sum -= (uint64_t)(1 - {name} - 1);").unwrap();
    }
    for (_, declaration) in functions() {
        let name = declaration.split('(').next().and_then(|head| head.rsplit([' ', '*']).next()).unwrap();
        writeln!(text, "    function = (pcc_any)&{name};").unwrap();
    }
    text += "    return function != 0 && sum == 0 ? 0 : 1;\n}\n";
    compile("header_macros", &text);
}

/// A struct's fields, and a C assertion for each of size and offset as Rust has them.
macro_rules! layouts {
    ($($type:ident { $($field:ident),* $(,)? })*) => {
        fn layouts() -> Vec<(&'static str, Vec<&'static str>, String)> {
            vec![$({
                let mut text = format!("SAME(sizeof({0}) == {1}, \"size of {0}\");\n", stringify!($type), size_of::<$type>());
                $(writeln!(
                    text,
                    "SAME(offsetof({0}, {1}) == {2}, \"offset of {0}.{1}\");",
                    stringify!($type), stringify!($field), std::mem::offset_of!($type, $field)
                ).unwrap();)*
                (stringify!($type), vec![$(stringify!($field)),*], text)
            }),*]
        }
    };
}

layouts! {
    pcc_format_options {
        struct_bytes, force, prewrite, medium, reserved, stripe_paths, stripe_count, stripe_unit_bytes
    }
    pcc_open_options {
        struct_bytes, read_only, medium, backend, required_durability, max_in_flight, keep, hold, writers, readers,
        queue_depth, lock_memory, rewrite_every, run_id, staging_bytes, chunk_bytes, lock_wait_ms
    }
    pcc_save_options { struct_bytes, wait_ms, stream, confirm, pin, snapshot, flag_waits, device_timeout_ms, direct_storage,
        reserved }
    pcc_tensor { struct_bytes, name, shape, data, bytes, dtype, rank, device, device_index }
    pcc_pair { key, value }
    pcc_select_options { struct_bytes, value, select, verify }
    pcc_read { struct_bytes, name, index, offset, bytes, dst, device, device_index }
    pcc_progress {
        struct_bytes, generation, step, total_bytes, copied_bytes, written_bytes, copied, ended
    }
    pcc_durable { struct_bytes, generation, superseded_by, copied_ns, durable_ns, slot, reserved }
    pcc_checkpoint_info {
        struct_bytes, generation, step, run_id, payload_bytes, chunk_bytes, unix_ns, slot, tensor_count, flags, pinned,
        readers, rejected
    }
    pcc_tensor_info {
        struct_bytes, name, name_bytes, shape, tied_to, bytes, payload_offset, dtype, rank
    }
    pcc_stats_info {
        struct_bytes, saves_begun, saves_durable, saves_superseded, saves_failed, saves_cancelled, durable_bytes,
        busy_ns, copied_ns, durable_ns, newest_generation, in_flight, quarantined_slots, claimable_slots, reserved,
        unchanged_bytes, direct_bytes
    }
    pcc_got_info {
        struct_bytes, path_text, notes_text, region_uuid, slot_bytes, staging_bytes, staging_huge_bytes, chunk_bytes,
        recovered_checkpoints, staging_locked, medium, durability, slot_count, max_in_flight, keep, read_only,
        stripe_unit_bytes, members, reserved
    }
    pcc_verify_report { struct_bytes, intact, damaged, reclaimed, text_bytes }
    pcc_tune_options {
        struct_bytes, state_bytes, iteration_ns, durable_bytes_per_s, stall_ns, max_slowdown_ppm, max_in_flight,
        reserved
    }
    pcc_tuning {
        struct_bytes, interval_iterations, durable_ns, slowdown_ppm, expected_lost_ns, worst_lost_ns
    }
}

/// Structs of the header with their fields, in order.
fn structs() -> BTreeMap<String, Vec<String>> {
    let code = code();
    let mut found = BTreeMap::new();
    for part in code.split("typedef struct ").skip(1) {
        let Some((name, rest)) = part.split_once(" {") else { continue };
        if name.contains(';') {
            continue;
        }
        let (fields, _) = rest.split_once('}').expect("the end of the struct");
        let field = |line: &str| {
            let name = line.trim().trim_end_matches(';').rsplit([' ', '*']).next()?;
            let name = name.split('[').next()?;
            (!name.is_empty()).then(|| name.to_string())
        };
        found.insert(name.to_string(), fields.lines().filter_map(field).collect());
    }
    found
}

#[test]
fn structs_have_no_padding_and_are_the_same_on_both_sides() {
    let layouts = layouts();
    let listed: BTreeMap<String, Vec<String>> = layouts
        .iter()
        .map(|(name, fields, _)| (name.to_string(), fields.iter().map(|f| f.to_string()).collect()))
        .collect();
    assert_eq!(structs(), listed, "a struct or field of the header is not checked here");
    let mut text =
        "#include <pccheck.h>\n#include <stddef.h>\n#ifdef __cplusplus\n#define SAME static_assert\n#else\n\
                    #define SAME _Static_assert\n#endif\n"
            .to_string();
    for (name, fields, assertions) in &layouts {
        text += assertions;
        let sum: Vec<String> = fields.iter().map(|field| format!("sizeof((({name} *)0)->{field})")).collect();
        writeln!(text, "SAME(sizeof({name}) == {}, \"padding in {name}\");", sum.join(" + ")).unwrap();
        writeln!(text, "SAME(sizeof({name}) % 8 == 0, \"size of {name}\");").unwrap();
    }
    text += "int main(void) { return 0; }\n";
    compile("header_layout", &text);
}

// ---- programs -----------------------------------------------------------------------------------------------

/// Builds a program against the shared library and runs it in `dir`; its standard output.
fn build_and_run(variable: &str, default: &str, flags: &[&str], source: &Path, dir: &Path) -> String {
    let library = std::env::current_exe().expect("this test's path").with_file_name("libpccheck.so");
    for name in ["libpccheck.so", "libpccheck.so.1"] {
        let link = dir.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(&library, link).expect("a link to the library");
        }
    }
    let program = dir.join("program");
    let output = compiler(variable, default)
        .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1"])
        .args(flags)
        .arg("-I")
        .arg(root().join("include"))
        .arg(source)
        .args(["-L", dir.to_str().expect("UTF-8"), "-lpccheck", "-pthread", "-o"])
        .arg(&program)
        .arg(format!("-Wl,-rpath,{}", dir.display()))
        .output()
        .unwrap_or_else(|e| panic!("cannot run the compiler {default}: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).current_dir(dir).output().expect("run the program");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{:?}\n{stdout}{stderr}", output.status);
    assert!(stderr.is_empty(), "the library wrote to standard error: {stderr}");
    stdout.into_owned()
}

#[test]
fn the_example_in_the_header_runs_and_resumes() {
    let header = committed();
    let (_, rest) = header.split_once(" * EXAMPLE").expect("an example");
    let (example, _) = rest.split_once(" * CONVENTIONS").expect("its end");
    let lines: Vec<&str> = example.lines().skip(1).map(|line| line.trim_start_matches(" *")).collect();
    assert!((20..=45).contains(&lines.len()), "{} lines", lines.len());
    let text = format!(
        "#include <pccheck.h>\n#include <stdio.h>\n#include <stdlib.h>\n\
         static void die(void) {{ char text[512]; pcc_last_error(text, sizeof text); puts(text); exit(1); }}\n\
         static int trained = 0;\nstatic void train(float *weights) {{ weights[0] += 1; trained++; }}\n\
         int main(void) {{\n{}\nprintf(\"%d %g\\n\", trained, (double)weights[0]);\nreturn 0;\n}}\n",
        lines.join("\n")
    );
    let dir = scratch();
    let source = dir.path().join("example.c");
    std::fs::write(&source, text).expect("write the source");
    assert_eq!(build_and_run("CC", "cc", &["-std=c11"], &source, dir.path()), "100 100\n");
    let again = build_and_run("CC", "cc", &["-std=c11"], &source, dir.path());
    assert_eq!(again, "0 100\n", "the second run starts from what the first one saved");
}

#[test]
fn one_program_works_as_c_and_as_cpp() {
    let source = root().join("tests/c/abi.c");
    for (variable, default, flags) in
        [("CC", "cc", ["-std=c11", "-xc"]), ("CXX", "c++", ["-std=c++11", "-xc++"])]
    {
        let dir = scratch();
        assert_eq!(build_and_run(variable, default, &flags, &source, dir.path()), "ok\n", "as {default}");
    }
}
