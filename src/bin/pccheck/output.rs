//! What the tool prints: results to stdout, errors, notes and progress to stderr.

use std::io::{self, ErrorKind as IoErrorKind, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pccheck::{Error, ErrorKind, Result};
use serde_json::Value;

/// Writes a result to stdout. A reader that has gone away (`| head`) is no error.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != IoErrorKind::BrokenPipe => Err(Error::io("write to stdout", &error)),
        _ => Ok(()),
    }
}

/// Writes a result to stdout as JSON.
pub fn print_json(value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::new(ErrorKind::Internal, "write JSON", error.to_string()))?;
    print(&(text + "\n"))
}

/// Writes one line to stderr; there is nobody left to tell when that fails.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A bar of bytes on stderr; hidden with `--json` and where stderr is no terminal.
pub fn bytes_bar(total_bytes: u64, what: &str, json: bool) -> ProgressBar {
    bar(total_bytes, what, json, "{msg:<28} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

/// A bar of counted things on stderr; hidden with `--json` and where stderr is no terminal.
pub fn count_bar(total: u64, what: &str, json: bool) -> ProgressBar {
    bar(total, what, json, "{msg:<44} [{bar:26}] {pos}/{len} {eta}")
}

fn bar(total: u64, what: &str, json: bool, template: &str) -> ProgressBar {
    let target = match json || !io::stderr().is_terminal() {
        true => ProgressDrawTarget::hidden(),
        false => ProgressDrawTarget::stderr_with_hz(10),
    };
    let bar = ProgressBar::with_draw_target(Some(total), target).with_message(what.to_string());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
