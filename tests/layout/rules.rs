//! The rules, each a function from one file to what breaks it.

use super::text::Text;

/// Modules by level: a module may import from lower levels and from itself. The one table of the direction.
pub const LEVELS: &[&[&str]] = &[
    &["error", "sync"],
    &["fork", "persist", "partial"],
    &["format", "cuda"],
    &["slots", "staging"],
    &["medium"],
    &["recovery", "source", "metrics"],
    &["store"],
    &["save", "load"],
    &["engine"],
    &["tune"],
    &["capi", "bin"],
];

/// Where `unsafe` may stand: file or folder, and why.
pub const UNSAFE_ROOMS: &[(&str, &str)] = &[
    ("persist/", "intrinsics and copies to raw memory"),
    ("fork.rs", "fork handlers, and closing what a child must not keep"),
    ("medium/", "system calls and mappings"),
    ("staging/mapping.rs", "the pool's memory"),
    ("staging/pool.rs", "buffers are disjoint parts of the pool's memory"),
    ("source/", "the caller's memory"),
    ("cuda/", "calls of a library that is loaded at run time"),
    ("save/device/ring.rs", "words of buffers that devices write and wait for"),
    ("save/device/lane.rs", "buffers are lent to a device's copy engines"),
    ("save/device/on_device.rs", "cuFile reads memory of the device"),
    ("save/device/spare.rs", "cuFile reads memory of the device"),
    ("load/upload.rs", "buffers and destinations are lent to a device's copy engines"),
    ("load/mod.rs", "destinations by address"),
    ("load/reader.rs", "disjoint destinations are filled by several threads"),
    ("save/mod.rs", "the caller's stream, by its handle"),
    ("engine/saves.rs", "the caller's promise that memory outlives the copy"),
    ("capi/", "pointers from C"),
    ("bin/pccheck/bench/ceiling/", "plain I/O to compare with"),
    ("bin/pccheck/commands/import.rs", "a mapped file is the source of a save"),
    ("bin/pccheck/demo/trainer.rs", "saves a network while it is trained"),
];

/// Rooms within those that stay safe.
pub const SAFE_ROOMS: &[&str] = &["medium/sim/"];

/// Where threads meet: nobody else names these, so that the models check the code that ships.
pub const SYNC_ROOMS: &[(&str, &str)] = &[
    ("sync.rs", "the seam itself"),
    ("sync/", "its parts"),
    ("error.rs", "an error is shared outside of models, too"),
];
const SYNC_NAMES: &[&str] = &[
    "std::sync",
    "core::sync",
    "std::thread::spawn",
    "std::thread::scope",
    "std::thread::Builder",
    "loom::",
    "shuttle::",
    "parking_lot",
    "crossbeam_utils::atomic",
];

/// The only intrinsics and assembly.
const ASM_ROOM: &str = "persist/";
const ASM_NAMES: &[&str] = &["asm!", "global_asm!", "naked_asm!", "core::arch", "std::arch"];

/// What a library must not do to the program that uses it.
const FORBIDDEN: &[&str] = &[
    "print!",
    "println!",
    "eprint!",
    "eprintln!",
    "dbg!",
    "process::exit",
    "process::abort",
    "libc::abort",
    "libc::exit",
    "libc::_exit",
    "libc::signal",
    "libc::sigaction",
    "panic!",
    "todo!",
    "unimplemented!",
    "unreachable!",
    ".unwrap()",
    ".expect(",
    ".unwrap_err()",
    ".expect_err(",
];

/// Files in which one of these may stand: file, what, why.
pub const FORBIDDEN_ALLOWED: &[(&str, &str, &str)] = &[];

/// The tool is a program: it may print and exit, and end on what cannot be.
const PROGRAM: &str = "bin/";

pub const MOST_LINES: usize = 600;

/// How far above an unsafe block its comment may begin.
const SAFETY_LINES: usize = 12;

/// One breach: line and what is wrong.
pub type Breach = (usize, String);

fn top_module(file: &str) -> &str {
    let first = file.split('/').next().unwrap_or(file);
    first.strip_suffix(".rs").unwrap_or(first)
}

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&module))
}

/// Imports go downwards only, and every module is in the table.
pub fn direction(file: &str, text: &Text) -> Vec<Breach> {
    let own = top_module(file);
    if own == "lib" {
        return Vec::new();
    }
    let Some(own_level) = level(own) else {
        return vec![(1, format!("module {own} is not in the table of levels"))];
    };
    let mut breaches = Vec::new();
    for (at, module) in imports(file, text) {
        let fine = module == own || level(&module).is_none_or(|level| level < own_level);
        if !fine {
            breaches.push((text.line_of(at), format!("{own} must not import from {module}")));
        }
    }
    breaches
}

/// Top-level names that a file reaches through `crate::`, through `super::` from the top, or by the crate's name.
fn imports(file: &str, text: &Text) -> Vec<(usize, String)> {
    let depth = file.trim_end_matches("/mod.rs").matches('/').count();
    let mut roots = vec!["crate::".to_string(), "pccheck::".to_string()];
    roots.push("super::".repeat(depth + 1));
    let mut found = Vec::new();
    for root in &roots {
        for at in text.words(root) {
            // `super::super::` also contains `super::`.
            if root.starts_with("super") && text.code[..at].ends_with("super::") {
                continue;
            }
            let rest = &text.code[at + root.len()..];
            found.extend(heads(rest).into_iter().map(|name| (at, name)));
        }
    }
    found
}

/// First names of a path: one, or several in braces.
fn heads(rest: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let Some(group) = rest.strip_prefix('{') else { return vec![name(rest)] };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            ',' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
            }
            '}' if depth == 0 => {
                names.push(name(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names
}

fn in_rooms(file: &str, rooms: impl IntoIterator<Item = &'static str>) -> bool {
    rooms.into_iter().any(|room| file == room || (room.ends_with('/') && file.starts_with(room)))
}

fn named(text: &Text, names: &[&str], says: impl Fn(&str) -> String) -> Vec<Breach> {
    let hits = names.iter().flat_map(|name| text.words(name).map(|at| (text.line_of(at), says(name))));
    hits.collect()
}

/// `unsafe` stands in its rooms only.
pub fn unsafe_rooms(file: &str, text: &Text) -> Vec<Breach> {
    let rooms = UNSAFE_ROOMS.iter().map(|(room, _)| *room);
    if in_rooms(file, rooms) && !in_rooms(file, SAFE_ROOMS.iter().copied()) {
        return Vec::new();
    }
    named(text, &["unsafe"], |_| "unsafe has no room here".to_string())
}

/// Atomics, locks and loom come through `crate::sync`.
pub fn sync_seam(file: &str, text: &Text) -> Vec<Breach> {
    if in_rooms(file, SYNC_ROOMS.iter().map(|(room, _)| *room)) || file.starts_with(PROGRAM) {
        return Vec::new();
    }
    named(text, SYNC_NAMES, |name| format!("{name} is named outside of sync.rs: import from crate::sync"))
}

/// Intrinsics and assembly stand in `persist` only.
pub fn asm_room(file: &str, text: &Text) -> Vec<Breach> {
    if file.starts_with(ASM_ROOM) {
        return Vec::new();
    }
    named(text, ASM_NAMES, |name| format!("{name} outside of {ASM_ROOM}"))
}

/// The library never prints, exits, installs handlers or panics by intent.
pub fn quiet(file: &str, text: &Text) -> Vec<Breach> {
    if file.starts_with(PROGRAM) {
        return Vec::new();
    }
    let allowed = |what: &str| FORBIDDEN_ALLOWED.iter().any(|(at, name, _)| *at == file && *name == what);
    let names: Vec<&str> = FORBIDDEN.iter().copied().filter(|what| !allowed(what)).collect();
    named(text, &names, |name| format!("{name} in a library"))
}

/// Every unsafe block and impl says why it is sound, above it.
pub fn safety_comments(_file: &str, text: &Text) -> Vec<Breach> {
    let lines: Vec<&str> = text.raw.lines().collect();
    let code: Vec<&str> = text.code.lines().collect();
    let mut breaches = Vec::new();
    for at in text.words("unsafe") {
        let rest = text.code[at + "unsafe".len()..].trim_start();
        if !rest.starts_with('{') && !rest.starts_with("impl") {
            continue;
        }
        let line = text.line_of(at);
        if !has_comment(&lines, &code, line - 1) {
            breaches.push((line, "unsafe without a SAFETY comment".to_string()));
        }
    }
    breaches
}

fn has_comment(lines: &[&str], code: &[&str], of: usize) -> bool {
    for index in (of.saturating_sub(SAFETY_LINES)..=of).rev() {
        if lines[index].contains("// SAFETY: ") {
            return true;
        }
        let ended = code[index].trim_end();
        let statement_before = ended.ends_with([';', '{', '}']);
        if index < of && (statement_before || lines[index].trim().is_empty()) {
            return false;
        }
    }
    false
}

/// Files are rooms, not halls.
pub fn length(_file: &str, text: &Text) -> Vec<Breach> {
    let lines = text.raw.lines().count();
    if lines <= MOST_LINES {
        return Vec::new();
    }
    vec![(lines, format!("{lines} lines, the limit is {MOST_LINES}"))]
}

/// A rule, with its name.
pub type Rule = (&'static str, fn(&str, &Text) -> Vec<Breach>);

pub const RULES: &[Rule] = &[
    ("direction", direction),
    ("unsafe rooms", unsafe_rooms),
    ("sync seam", sync_seam),
    ("asm room", asm_room),
    ("quiet", quiet),
    ("safety comments", safety_comments),
    ("length", length),
];
