//! What the tests work with: an installed prefix, scratch directories, and processes whose output is kept.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A new directory on a disk: the examples ask for durability that survives power loss.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory")
}

/// How a process ended, and what it said.
pub struct Ended {
    command: String,
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Its output, if it succeeded.
    pub fn ok(self) -> String {
        self.ended(Some(0), None).stdout
    }

    /// Checks how it ended.
    pub fn ended(self, code: Option<i32>, signal: Option<i32>) -> Ended {
        assert!(
            self.code == code && self.signal == signal,
            "{}\nended with code {:?} and signal {:?}, expected {code:?} and {signal:?}\n{}{}",
            self.command,
            self.code,
            self.signal,
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    let text = format!("{command:?}");
    let output = command.output().unwrap_or_else(|error| panic!("{text}: {error}"));
    Ended {
        command: text,
        code: output.status.code(),
        signal: output.status.signal(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// `scripts/install` in a build directory of its own: the one of the tests has their features, and belongs to the
/// cargo that runs them. The dev profile, which builds faster.
pub fn install<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("install");
    let mut command = Command::new(root().join("scripts/install"));
    command.args(["--profile", "dev"]).args(arguments);
    command.env("CARGO_TARGET_DIR", build).env_remove("DESTDIR");
    command
}

/// Where pccheck was installed for these tests, once.
pub fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("prefix");
        if prefix.exists() {
            fs::remove_dir_all(&prefix).expect("remove what an earlier run installed");
        }
        run(&mut install(&[OsStr::new("--prefix"), prefix.as_os_str()])).ok();
        prefix
    })
}

/// A command that finds pccheck below the prefix and nowhere else, run in `directory`.
pub fn command(program: impl AsRef<OsStr>, directory: &Path) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command
        .current_dir(directory)
        .env("PATH", format!("{}:{path}", prefix().join("bin").display()))
        .env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig"))
        .env_remove("CMAKE_PREFIX_PATH")
        .env("LD_LIBRARY_PATH", prefix().join("lib"));
    command
}

/// A line of shell.
pub fn shell(line: &str, directory: &Path) -> Ended {
    run(command("sh", directory).args(["-c", line]))
}

/// Shared libraries that a program names (its `NEEDED` entries).
pub fn needed(program: &Path) -> Vec<String> {
    let text = run(Command::new("readelf").arg("-d").arg(program)).ok();
    let lines = text.lines().filter(|line| line.contains("(NEEDED)"));
    lines.filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned())).collect()
}
