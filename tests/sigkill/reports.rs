//! What processes reported before they were killed, and what of it must still be true afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

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
        Ok(())
    }
}

/// Starts a process and kills it `life` after it has said `after`. Returns all that it said.
pub fn run_and_kill(command: &mut Command, after: &str, life: Duration) -> Result<Said, String> {
    let mut process = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("start a child: {error}"))?;
    let mut output = BufReader::new(process.stdout.take().expect("a pipe"));
    let mut said = Said::default();
    let mut waiting = true;
    let mut outcome = Ok(());
    let mut line = String::new();
    while output.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
        let whole = std::mem::take(&mut line);
        // A line without an end was cut short by the kill, on a serial line in the middle of a number.
        let Some(line) = whole.strip_prefix('@').filter(|line| line.ends_with('\n')) else { continue };
        let line = line.trim_end();
        outcome = outcome.and_then(|()| said.hear(line));
        if waiting && line.starts_with(after) {
            waiting = false;
            thread::sleep(life);
            process.kill().map_err(|error| format!("kill: {error}"))?;
        }
    }
    let status = process.wait().map_err(|error| format!("wait: {error}"))?;
    outcome?;
    match waiting || status.success() {
        true => Err(format!("a child ended by itself, {status}")),
        false => Ok(said),
    }
}
