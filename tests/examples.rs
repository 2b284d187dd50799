//! What a user does first works: installing, building the examples in every documented way, running them, being killed
//! and resuming, and typing in the README's programs. A regression here is a page that lies.

#[path = "examples/bench.rs"]
mod bench;
#[path = "examples/readme/rust.rs"]
mod readme_rust;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use pccheck::capi::text::PCC_ABI_MINOR;

use bench::{command, install, needed, prefix, root, run, scratch, shell};

const SIGKILL: i32 = 9;
const LIBRARY: &str = "libpccheck.so.1";
/// Every program of the README ends with this, whatever its language.
const README_RESULT: &str = "step 100, sum 50247000";

// ------------------------------------------------------------------------------------------------ installing

/// Files and links below a directory, with what a link points to.
fn tree(directory: &Path) -> Vec<String> {
    let listed =
        run(Command::new("find").arg(directory).args(["-not", "-type", "d", "-printf", "%P %l\n"])).ok();
    let mut lines: Vec<String> = listed.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn install_lays_out_header_libraries_packages_and_tool() {
    let patch = env!("CARGO_PKG_VERSION_PATCH");
    let expected = [
        "bin/pccheck".to_owned(),
        "include/pccheck.h".to_owned(),
        "lib/cmake/pccheck/pccheckConfig.cmake".to_owned(),
        "lib/cmake/pccheck/pccheckConfigVersion.cmake".to_owned(),
        "lib/libpccheck.a".to_owned(),
        format!("lib/libpccheck.so {LIBRARY}"),
        format!("lib/libpccheck.so.1 libpccheck.so.1.{PCC_ABI_MINOR}.{patch}"),
        format!("lib/libpccheck.so.1.{PCC_ABI_MINOR}.{patch}"),
        "lib/pkgconfig/pccheck.pc".to_owned(),
    ];
    assert_eq!(tree(prefix()), expected);
    let mode = |file: &str| fs::metadata(prefix().join(file)).expect(file).permissions().mode() & 0o777;
    assert_eq!(mode("bin/pccheck"), 0o755);
    assert_eq!(mode("include/pccheck.h"), 0o644);
    assert_eq!(
        fs::read(prefix().join("include/pccheck.h")).expect("installed"),
        fs::read(root().join("include/pccheck.h")).expect("committed")
    );
    let dynamic = run(Command::new("readelf").arg("-d").arg(prefix().join("lib/libpccheck.so"))).ok();
    assert!(dynamic.contains(&format!("Library soname: [{LIBRARY}]")), "{dynamic}");
    let here = scratch();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(shell("pkg-config --modversion pccheck", here.path()).ok().trim(), version);
    assert!(shell("pccheck --version", here.path()).ok().contains(version));
}

#[test]
fn install_respects_destdir_and_libdir_and_can_leave_out_the_tool() {
    prefix(); // one installation at a time: they share a build directory
    let staged = scratch();
    let arguments = ["--prefix=/opt/pccheck-staged", "--libdir=lib/machine", "--no-tool"];
    run(install(&arguments).env("DESTDIR", staged.path())).ok();
    assert!(!Path::new("/opt/pccheck-staged").exists(), "wrote past DESTDIR");
    let to = staged.path().join("opt/pccheck-staged");
    let listed = tree(staged.path());
    assert_eq!(listed.len(), 8, "{listed:?}");
    assert!(to.join("lib/machine").join(LIBRARY).exists() && !to.join("bin").exists(), "{listed:?}");
    let pc = fs::read_to_string(to.join("lib/machine/pkgconfig/pccheck.pc")).expect("pccheck.pc");
    assert!(
        pc.contains("prefix=/opt/pccheck-staged\n") && pc.contains("libdir=${prefix}/lib/machine\n"),
        "{pc}"
    );

    // The CMake package finds its prefix by itself, so it works where it was staged.
    let built = scratch();
    let package = to.join("lib/machine/cmake/pccheck");
    build_with_cmake(built.path(), &format!("-Dpccheck_DIR={}", package.display()), &package, "OFF");
    assert!(built.path().join("train").exists());
}

#[test]
fn install_refuses_what_it_does_not_understand() {
    for (arguments, expected) in [
        (&["--prefx", "/tmp"][..], "unknown argument --prefx"),
        (&["--prefix"], "--prefix takes a value"),
        (&["--prefix", ""], "--prefix is empty"),
        (&["--libdir", "../lib"], "expected a path below the prefix"),
        (&["--prefix", "/tmp/with space"], "cannot name"),
    ] {
        let ended = run(&mut install(arguments)).ended(Some(2), None);
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    }
}

// ------------------------------------------------------------------------------------------- building examples

/// As the examples' Makefile says, by pkg-config.
fn build_with_make(out: &Path, link: &str) {
    let make = format!("make -C {}/c_examples OUT={} LINK={link}", root().display(), out.display());
    // Without LD_LIBRARY_PATH: the Makefile promises that the programs find the library by themselves.
    shell(&format!("unset LD_LIBRARY_PATH; {make}"), out).ok();
}

/// As the examples' CMakeLists.txt says, with the package in `package`; `find` is the argument that names it.
fn build_with_cmake(out: &Path, find: &str, package: &Path, link_static: &str) {
    let mut configure = command("cmake", out);
    configure.arg("-S").arg(root().join("c_examples")).arg("-B").arg(out);
    run(configure.arg(find).arg(format!("-DPCCHECK_STATIC={link_static}"))).ok();
    // CMake looks in many places: it must not be another one that it found.
    let cache = fs::read_to_string(out.join("CMakeCache.txt")).expect("CMakeCache.txt");
    let found = cache.lines().find(|line| line.starts_with("pccheck_DIR:")).expect("the package");
    assert!(found.ends_with(&format!("={}", package.display())), "{found}, expected {package:?}");
    run(command("cmake", out).arg("--build").arg(out)).ok();
}

fn build_with_cmake_at_prefix(out: &Path, link_static: &str) {
    let find = format!("-DCMAKE_PREFIX_PATH={}", prefix().display());
    build_with_cmake(out, &find, &prefix().join("lib/cmake/pccheck"), link_static);
}

/// Checks what the programs were linked with, then runs them all.
fn linked_and_working(programs: &Path, shared: bool) {
    for (program, names_library) in [("save_restore", shared), ("train", shared), ("plugin", false)] {
        let libraries = needed(&programs.join(program));
        assert_eq!(libraries.iter().any(|name| name == LIBRARY), names_library, "{program}: {libraries:?}");
    }
    save_restore(&programs.join("save_restore"));
    train(&programs.join("train"));
    plugin(&programs.join("plugin"));
}

#[test]
fn examples_built_by_make_with_the_shared_library() {
    let programs = scratch();
    build_with_make(programs.path(), "shared");
    linked_and_working(programs.path(), true);
    a_run_does_not_start_from_nothing_in_a_region_of_another(programs.path());
}

#[test]
fn examples_built_by_make_with_the_archive() {
    let programs = scratch();
    build_with_make(programs.path(), "static");
    linked_and_working(programs.path(), false);
}

#[test]
fn examples_built_by_cmake_with_the_shared_library() {
    let programs = scratch();
    build_with_cmake_at_prefix(programs.path(), "OFF");
    linked_and_working(programs.path(), true);
}

#[test]
fn examples_built_by_cmake_with_the_archive() {
    let programs = scratch();
    build_with_cmake_at_prefix(programs.path(), "ON");
    linked_and_working(programs.path(), false);
}

// -------------------------------------------------------------------------------------------- running examples

/// A command that must find the library by itself, or not need it.
fn alone(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).env_remove("LD_LIBRARY_PATH");
    command
}

fn save_restore(program: &Path) {
    let here = scratch();
    let killed = run(alone(program, here.path()).args(["run", "region"])).ended(None, Some(SIGKILL));
    assert!(killed.stdout.contains("step 5 is durable: generation 5"), "{}", killed.stdout);
    assert!(killed.stdout.contains("of step 6 written"), "{}", killed.stdout);
    // Step 6 may have become durable in the instant before the kill.
    let restored = run(alone(program, here.path()).args(["restore", "region"])).ok();
    assert!(
        ["every byte is that of step 5", "every byte is that of step 6"]
            .iter()
            .any(|end| restored.contains(end)),
        "{restored}"
    );
    assert!(restored.contains("schedule cosine"), "{restored}");

    let again = run(alone(program, here.path()).args(["run", "region"])).ended(Some(1), None);
    assert!(again.stderr.contains("format: PCC_ALREADY_EXISTS"), "{}", again.stderr);
    let nothing = run(alone(program, here.path()).args(["restore", "absent"])).ended(Some(1), None);
    assert!(
        nothing.stderr.contains("PCC_NOT_FOUND") && nothing.stderr.contains("absent"),
        "{}",
        nothing.stderr
    );
    run(&mut alone(program, here.path())).ended(Some(2), None);
}

fn training(program: &Path, directory: &Path, region: &str) -> Command {
    let mut command = alone(program, directory);
    command.args(["--steps", "120", "--region", region, "--data"]).arg(root().join("data/digits.csv"));
    command
}

fn train(program: &Path) {
    let here = scratch();
    let whole = run(&mut training(program, here.path(), "whole")).ok();
    assert!(whole.contains("started from nothing"), "{whole}");
    let end = |output: &str| output.lines().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert!(
        end(&whole)[0].starts_with("step 120, loss ") && end(&whole)[1].starts_with("digest "),
        "{whole}"
    );

    for kill_after in ["30", "31", "77"] {
        let mut killed = training(program, here.path(), "killed");
        let killed = run(killed.args(["--kill-after", kill_after])).ended(None, Some(SIGKILL));
        assert!(
            killed.stdout.ends_with(&format!("killed while step {kill_after} is saved\n")),
            "{}",
            killed.stdout
        );
    }
    let resumed = run(&mut training(program, here.path(), "killed")).ok();
    let from =
        resumed.strip_prefix("resumed from step ").and_then(|rest| rest.split_once(' ')).expect("resumed").0;
    // Two saves are in flight at most, so the kill can cost two steps.
    assert!((75..=77).contains(&from.parse::<u32>().expect("a step")), "{resumed}");
    assert_eq!(end(&resumed), end(&whole), "the resumed run ends differently");

    let refused = run(alone(program, here.path()).args(["--region"])).ended(Some(2), None);
    assert!(refused.stderr.contains("--region takes a value"), "{}", refused.stderr);
}

/// The status that says "no checkpoint yet" must not stand for "a checkpoint of something else".
fn a_run_does_not_start_from_nothing_in_a_region_of_another(programs: &Path) {
    let here = scratch();
    run(alone(&programs.join("save_restore"), here.path()).args(["run", "region"]))
        .ended(None, Some(SIGKILL));
    let refused = run(&mut training(&programs.join("train"), here.path(), "region")).ended(Some(1), None);
    assert!(
        refused.stderr.contains("PCC_INVALID_ARGUMENT") && refused.stderr.contains("no tensor"),
        "{}",
        refused.stderr
    );
}

fn plugin(program: &Path) {
    let here = scratch();
    let library = prefix().join("lib").join(LIBRARY);
    // The second time in a region that is there.
    for _ in 0..2 {
        let output = run(alone(program, here.path()).arg("region").arg(&library)).ok();
        assert!(output.contains("saved and read 1000700 bytes of step 7"), "{output}");
    }
    let without = run(alone(program, here.path()).args(["region", "./libabsent.so"])).ended(Some(3), None);
    assert!(without.stderr.contains("no checkpointing: ./libabsent.so"), "{}", without.stderr);
    let other = run(alone(program, here.path()).args(["region", "libc.so.6"])).ended(Some(3), None);
    assert!(other.stderr.contains("libc.so.6 has no pcc_abi_version"), "{}", other.stderr);
}

#[test]
fn the_python_example() {
    let here = scratch();
    let script = root().join("c_examples/ctypes_example.py");
    // -I -S: neither the environment nor installed packages, only the standard library.
    for _ in 0..2 {
        let output = run(command("python3", here.path()).args(["-I", "-S"]).arg(&script).arg("region")).ok();
        assert!(output.contains("as expected: open /nonexistent/region"), "{output}");
        assert!(output.contains("restored step 5, note größer"), "{output}");
        assert!(output.contains("as expected: pcc_restore: tensor \"weights\" is F32 [1]"), "{output}");
        assert!(output.ends_with("every value is as it was saved\n"), "{output}");
    }
    let absent = run(command("python3", here.path()).arg(&script).args(["region", "./libabsent.so"]));
    assert!(absent.ended(Some(1), None).stderr.contains("ctypes_example: ./libabsent.so"));
}

// ------------------------------------------------------------------------------------------------- the README

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("README.md")
}

/// The one block of `language` in the README's section on use.
fn block(language: &str) -> String {
    let readme = readme();
    let section = readme.split_once("\n## Use\n").expect("a section on use").1;
    let section = section.split_once("\n## ").expect("a next section").0;
    let fence = format!("```{language}\n");
    let mut blocks = section.split(&fence).skip(1);
    let block = blocks.next().unwrap_or_else(|| panic!("no {language} in the README"));
    assert!(blocks.next().is_none(), "more than one block of {language}");
    block.split_once("```").expect("its end").0.to_owned()
}

/// The README's program of `language`, inside what it calls its own.
fn whole_program(language: &str, frame: &str) -> String {
    let frame = fs::read_to_string(root().join("tests/examples/readme").join(frame)).expect(frame);
    assert_eq!(frame.matches("@README@").count(), 1);
    frame.replace("@README@", &block(language))
}

/// Runs a program of the README twice in a new region: it trains, and it only restores. Both end the same.
fn trains_and_restores(directory: &Path, program: &mut Command) {
    let formatted = shell(&block("sh"), directory).ok();
    assert!(directory.join("run.pcc").exists(), "{formatted}");
    for _ in 0..2 {
        assert_eq!(run(program).ok().trim(), README_RESULT);
    }
    let listed = shell("pccheck inspect run.pcc", directory).ok();
    assert!(listed.contains("100"), "{listed}");
}

#[test]
fn the_readme_in_c_by_each_of_its_commands() {
    for line in [
        "cc prog.c $(pkg-config --cflags --libs pccheck)",
        "cc prog.c $(pkg-config --cflags pccheck) $(pkg-config --variable=static_libs pccheck)",
    ] {
        assert!(readme().contains(&format!("`{line}`")), "the README no longer says {line}");
        let here = scratch();
        fs::write(here.path().join("prog.c"), whole_program("c", "main.c")).expect("write");
        shell(&format!("{line} -std=c11 -Wall -Wextra -Werror -Wpedantic"), here.path()).ok();
        trains_and_restores(here.path(), &mut command("./a.out", here.path()));
    }
}

#[test]
fn the_readme_in_cpp() {
    let here = scratch();
    fs::write(here.path().join("prog.cpp"), whole_program("cpp", "main.cpp")).expect("write");
    let line =
        "c++ prog.cpp $(pkg-config --cflags --libs pccheck) -std=c++17 -Wall -Wextra -Werror -Wpedantic";
    shell(line, here.path()).ok();
    trains_and_restores(here.path(), &mut command("./a.out", here.path()));
}

#[test]
fn the_readme_in_python() {
    let here = scratch();
    fs::write(here.path().join("prog.py"), whole_program("python", "main.py")).expect("write");
    trains_and_restores(here.path(), command("python3", here.path()).args(["-S", "prog.py"]));
}

#[test]
fn the_readme_in_rust() {
    const CHILD: &str = "PCC_README_RUST";
    if std::env::var_os(CHILD).is_some() {
        // The program's paths are relative, and a directory belongs to a whole process.
        println!("\nreadme: {}", readme_rust::run().expect("the README's program"));
        return;
    }
    let source = include_str!("examples/readme/rust.rs");
    let lines = source.split("    // README\n").nth(1).expect("two marks");
    let lines: Vec<&str> = lines.lines().map(|line| line.strip_prefix("    ").unwrap_or(line)).collect();
    assert_eq!(
        lines.join("\n").trim(),
        block("rust").trim(),
        "README and tests/examples/readme/rust.rs differ"
    );

    let here = scratch();
    shell(&block("sh"), here.path()).ok();
    let this = std::env::current_exe().expect("this program");
    for _ in 0..2 {
        let mut child = Command::new(&this);
        child.args(["--exact", "the_readme_in_rust", "--nocapture"]).env(CHILD, "1").current_dir(here.path());
        let output = run(&mut child).ok();
        assert!(output.contains(&format!("readme: {README_RESULT}")), "{output}");
    }
}
