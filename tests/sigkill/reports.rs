//! What processes report, and what of it must still be true after they were killed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

/// Until a process says what it is waited for: an emulated machine boots meanwhile.
const LONGEST_SILENCE: Duration = Duration::from_secs(180);

/// Standard output without a buffer in this process: what was reported is in the pipe when the process dies.
pub struct Reports(File);

impl Reports {
    pub fn open() -> Reports {
        let fd = std::io::stdout().as_fd().try_clone_to_owned().expect("duplicate standard output");
        Reports(File::from(fd))
    }

    pub fn say(&self, line: &str) {
        // One write of less than PIPE_BUF bytes: all of it or nothing. The parent may be gone.
        let _ = (&self.0).write_all(format!("\n@{line}\n").as_bytes());
    }
}

/// What a process said before it died.
#[derive(Default)]
pub struct Said {
    pub path: String,
    pub began: BTreeSet<u64>,
    /// Step by generation.
    pub issued: BTreeMap<u64, u64>,
    pub durable: BTreeMap<u64, u64>,
    /// What it found when it started, newest first: generation and step.
    pub found: Vec<(u64, u64)>,
    pub pinned: BTreeSet<u64>,
    /// A pin may have been lifted since.
    pub unpinned: BTreeSet<u64>,
    pub cancelled: u64,
    /// Saves that a failing disk cost, and slots that were repaired.
    pub failed: u64,
    pub repaired: u64,
}

impl Said {
    pub fn hear(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{line:?}: {error}"));
        match words[..] {
            ["opening"] => {}
            ["ready", ..] => self.path = words[1..].join(" "),
            ["found", generation, step] => self.found.push((number(generation)?, number(step)?)),
            ["begin", step] => drop(self.began.insert(number(step)?)),
            ["issued", generation, step] => {
                if self.issued.insert(number(generation)?, number(step)?).is_some() {
                    return Err(format!("{line:?}: issued twice"));
                }
            }
            ["durable", generation, step] => drop(self.durable.insert(number(generation)?, number(step)?)),
            ["pinned", generation] => drop(self.pinned.insert(number(generation)?)),
            ["unpin", generation] => drop(self.unpinned.insert(number(generation)?)),
            ["cancelled"] => self.cancelled += 1,
            ["failed", _] => self.failed += 1,
            ["repaired", slots] => self.repaired += number(slots)?,
            _ => return Err(format!("a child said {line:?}")),
        }
        Ok(())
    }
}

/// All that is known of a region from the reports of those who saved into it.
#[derive(Default)]
pub struct Known {
    began: BTreeSet<u64>,
    step_of: BTreeMap<u64, u64>,
    newest_durable: u64,
    pinned: BTreeSet<u64>,
    /// No save may use this generation or a lower one.
    pub used_up_to: u64,
}

impl Known {
    /// Takes in reports: no generation may ever come back.
    pub fn learn(&mut self, said: &Said) -> Result<(), String> {
        for (generation, step) in &said.issued {
            if *generation <= self.used_up_to {
                return Err(format!(
                    "generation {generation} of step {step} is at or below {}",
                    self.used_up_to
                ));
            }
        }
        self.step_of.extend(&said.issued);
        self.began.extend(&said.began);
        for (generation, step) in &said.durable {
            if self.step_of.get(generation).is_some_and(|issued| issued != step) {
                return Err(format!("generation {generation} was issued and reported durable for two steps"));
            }
            self.step_of.insert(*generation, *step);
            self.newest_durable = self.newest_durable.max(*generation);
        }
        self.pinned.extend(&said.pinned);
        self.pinned.retain(|generation| !said.unpinned.contains(generation));
        self.used_up_to = self.step_of.keys().last().copied().unwrap_or(0).max(self.used_up_to);
        Ok(())
    }

    /// Every listed checkpoint, newest first, is one that was begun.
    pub fn check_listed(&mut self, listed: &[(u64, u64)]) -> Result<(), String> {
        for &(generation, step) in listed {
            // A child may die between the begin of a save and its report.
            let issued = *self.step_of.entry(generation).or_insert(step);
            if issued != step || !self.began.contains(&step) {
                return Err(format!(
                    "generation {generation} is step {step}, it was issued for step {issued}"
                ));
            }
        }
        if listed.windows(2).any(|pair| pair[0].0 <= pair[1].0) {
            return Err(format!("not newest first: {listed:?}"));
        }
        Ok(())
    }

    /// Whatever was reported durable is there, or has been followed by as many newer ones as are kept.
    pub fn check_durable(&self, listed: &[(u64, u64)], keep: u32, said: &Said) -> Result<(), String> {
        let newest = listed.first().map_or(0, |&(generation, _)| generation);
        if newest < self.newest_durable {
            return Err(format!(
                "generation {} was reported durable, the newest is {newest}",
                self.newest_durable
            ));
        }
        for generation in said.durable.keys() {
            let is_there = listed.iter().any(|(listed, _)| listed == generation);
            let newer = listed.iter().filter(|(listed, _)| listed > generation).count();
            if !is_there && newer < keep as usize {
                return Err(format!(
                    "generation {generation} was reported durable and is gone; kept are {keep}, found {listed:?}"
                ));
            }
        }
        match self.pinned.iter().find(|pinned| !listed.iter().any(|(listed, _)| listed == *pinned)) {
            Some(pinned) => Err(format!("generation {pinned} was pinned and is gone; found {listed:?}")),
            None => Ok(()),
        }
    }
}

/// Starts a process and kills it `life` after it has said `after`. Returns all that it said.
pub fn run_and_kill(command: &mut Command, after: &str, life: Duration) -> Result<Said, String> {
    let (said, status) = run_and_end(command, after, |process| {
        thread::sleep(life);
        process.kill()
    })?;
    match status {
        Some(status) if !status.success() => Ok(said),
        status => Err(format!("a child ended by itself, {status:?}")),
    }
}

/// Starts a process, and lets `end` end it when it has said `after`. Returns all that it said, and its status; none where it
/// ended without having said that.
pub fn run_and_end(
    command: &mut Command,
    after: &str,
    end: impl FnOnce(&mut Child) -> io::Result<()>,
) -> Result<(Said, Option<ExitStatus>), String> {
    let mut process = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start a child: {error}"))?;
    let output = process.stdout.take().expect("a pipe");
    let (tells, told) = channel();
    thread::scope(|scope| {
        // All the while, so that the pipe never stops the process.
        let listening = scope.spawn(|| listen(output, after, tells));
        let was_told = match told.recv_timeout(LONGEST_SILENCE) {
            Ok(()) => true,
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => {
                // So that the listener comes to an end, too.
                process.kill().map_err(|error| format!("end a child: {error}"))?;
                return Err(format!("a child did not say {after:?} within {LONGEST_SILENCE:?}"));
            }
        };
        if was_told {
            end(&mut process).map_err(|error| format!("end a child: {error}"))?;
        }
        let said = listening.join().map_err(|_| "the listener panicked".to_string())?;
        let status = process.wait().map_err(|error| format!("wait: {error}"))?;
        Ok((said?, was_told.then_some(status)))
    })
}

/// Hears all that a process says; tells when it has said `after`.
fn listen(output: ChildStdout, after: &str, tells: Sender<()>) -> Result<Said, String> {
    let mut output = BufReader::new(output);
    let mut said = Said::default();
    let mut outcome = Ok(());
    let mut tells = Some(tells);
    let mut line = String::new();
    while output.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
        let whole = std::mem::take(&mut line);
        // A line without an end was cut short by the kill, on a serial line in the middle of a number.
        let Some(line) = whole.strip_prefix('@').filter(|line| line.ends_with('\n')) else { continue };
        let line = line.trim_end();
        outcome = outcome.and_then(|()| said.hear(line));
        if line.starts_with(after) {
            if let Some(tells) = tells.take() {
                let _ = tells.send(());
            }
        }
    }
    outcome.map(|()| said)
}
