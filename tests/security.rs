//! Prevents: a training run's state that others may read, a file written or destroyed that nobody named, a descriptor that
//! other programs inherit, memory of the process that ends up on a medium, and a region that whoever may write it uses to
//! do worse than to be refused. `docs/threat-model.md` says what each of these shows.

mod common;
#[path = "security/descriptors.rs"]
mod descriptors;
#[path = "security/files.rs"]
mod files;
#[path = "security/padding.rs"]
mod padding;
#[path = "security/regions.rs"]
mod regions;
#[cfg(feature = "cli")]
#[path = "security/tool.rs"]
mod tool;

use std::process::Command;

/// Set in a child process that is to do the work of a test by itself.
const ENV_CHILD: &str = "PCC_SECURITY_CHILD";

/// Whether this is that child; otherwise runs the test named so in one, prepared by `change`, and judges how it ended.
fn in_child(name: &str, change: impl FnOnce(&mut Command)) -> bool {
    if std::env::var_os(ENV_CHILD).is_some() {
        return true;
    }
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(ENV_CHILD, "1");
    change(&mut command);
    let ended = command.output().expect("a child process");
    let said =
        [ended.stdout, ended.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(ended.status.success() && said.contains("1 passed"), "{name}: {said}");
    false
}
