//! The parent: starts trainers, kills them at random moments, and checks what each of them finds.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use pccheck::{Error, ErrorKind, Result};

use super::message::Message;
use super::network::Random;
use super::Args;

const OP: &str = "demo";
/// A trainer that says nothing for so long hangs.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// One kill in so many falls while a trainer starts and recovers.
const START_KILL_ONE_IN: u64 = 4;

/// Where a life begins.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// Updates that the state has seen.
    pub step: u64,
    /// Generation it was restored from; 0 from scratch.
    pub generation: u64,
    /// Opening, recovery and restoring.
    pub took: Duration,
}

/// One process, from start to death or end.
#[derive(Debug, Default)]
pub struct Life {
    /// None where it was killed before it could train.
    pub start: Option<Start>,
    /// Losses in the order of iterations, from `start.step` on, by their bits.
    pub losses: Vec<u32>,
    /// What each save cost the training.
    pub stalls: Vec<Duration>,
    /// From begin to durable of each save.
    pub durable_after: Vec<Duration>,
    /// Newest step that it reported as durable.
    pub newest_durable: Option<u64>,
    /// From its first iteration on.
    pub trained: Duration,
    /// Digest of the final state and accuracy on the test digits, if it came to the end.
    pub done: Option<(u128, f64)>,
}

impl Life {
    /// The iteration after the last one whose loss was reported.
    pub fn end(&self) -> Option<u64> {
        self.start.map(|start| start.step + self.losses.len() as u64)
    }
}

/// Everything that happened.
pub struct Lived {
    /// The run without saves and kills.
    pub reference: Life,
    /// The killed run's processes; the last one came to the end.
    pub lives: Vec<Life>,
    /// Whether the final states are the same, bit for bit.
    pub identical: bool,
}

/// When a trainer is killed.
#[derive(Debug, Clone, Copy)]
enum Kill {
    /// So long after it was started.
    Starting(Duration),
    /// So long after it reported this iteration or a later one.
    Training(u64, Duration),
}

/// A random time below `limit`.
fn random_time(random: &mut Random, limit: Duration) -> Duration {
    Duration::from_nanos(random.below(limit.as_nanos() as u64))
}

/// Runs the reference, then the killed run to its end.
pub fn all(args: &Args, region: &Path, bar: &ProgressBar) -> Result<Lived> {
    let reference = live(args, None, None, bar)?;
    let iteration = reference.trained / args.iterations as u32;
    let mut random = Random(args.seed ^ 0x6b69_6c6c);
    let mut targets: Vec<u64> = (0..args.kills).map(|_| random.below(args.iterations * 9 / 10)).collect();
    targets.sort_unstable();
    let mut lives: Vec<Life> = Vec::new();
    let mut start_took = Duration::ZERO;
    let mut newest_durable = None;
    let mut reached = 0;
    bar.set_position(0);
    for kill in 0..=targets.len() {
        bar.set_message(format!("saving every iteration, {kill} of {} kills", args.kills));
        let plan = targets.get(kill).map(|&target| {
            match !start_took.is_zero() && random.below(START_KILL_ONE_IN) == 0 {
                true => Kill::Starting(random_time(&mut random, start_took * 2)),
                false => Kill::Training(target, random_time(&mut random, iteration * 2)),
            }
        });
        let life = live(args, Some(region), plan, bar)?;
        check(&life, &reference, newest_durable, reached)?;
        if let Some(start) = life.start {
            start_took = start.took;
        }
        newest_durable = newest_durable.max(life.newest_durable);
        reached = reached.max(life.end().unwrap_or(0));
        let done = life.done.is_some();
        lives.push(life);
        if done {
            break;
        }
    }
    let digest = |life: &Life| life.done.map(|(digest, _)| digest);
    let identical = digest(&reference).is_some() && lives.last().and_then(digest) == digest(&reference);
    Ok(Lived { reference, lives, identical })
}

fn broken(message: String) -> Error {
    Error::new(ErrorKind::Internal, OP, message)
}

/// What must hold of a process that was started after kills.
fn check(life: &Life, reference: &Life, newest_durable: Option<u64>, reached: u64) -> Result<()> {
    let Some(start) = life.start else { return Ok(()) };
    if newest_durable.is_some_and(|durable| start.step < durable) {
        return Err(broken(format!(
            "expected recovery to find step {} or later, which was reported durable before the kill, found step {}",
            newest_durable.unwrap_or(0),
            start.step
        )));
    }
    if start.step > reached {
        return Err(broken(format!(
            "expected a checkpoint of a step that was reached, at most {reached}, found step {}",
            start.step
        )));
    }
    for (iteration, &loss) in (start.step..).zip(&life.losses) {
        let expected = reference.losses.get(iteration as usize).copied();
        if expected != Some(loss) {
            return Err(broken(format!(
                "expected the loss of iteration {iteration} to be that of the uninterrupted run, {:?}, found {}",
                expected.map(f32::from_bits),
                f32::from_bits(loss)
            )));
        }
    }
    Ok(())
}

/// Runs one trainer to its end or to its kill.
fn live(args: &Args, region: Option<&Path>, kill: Option<Kill>, bar: &ProgressBar) -> Result<Life> {
    let mut child = spawn(args, region)?;
    let messages = listen(&mut child)?;
    let watched = watch(&mut child, &messages, kill, bar);
    if watched.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| Error::io(OP, &e))?;
    let (life, killed) = watched?;
    let died_as_told = killed && status.signal() == Some(libc::SIGKILL);
    if life.done.is_some() || died_as_told {
        return Ok(life);
    }
    Err(broken(format!(
        "expected the trainer to train until the end, or until it was killed; found {status}"
    )))
}

fn spawn(args: &Args, region: Option<&Path>) -> Result<Child> {
    let program = std::env::current_exe().map_err(|e| Error::io(OP, &e))?;
    let mut command = Command::new(&program);
    command.arg("demo-trainer");
    for (name, value) in [
        ("--state", args.state),
        ("--seed", args.seed),
        ("--iterations", args.iterations),
        ("--every", args.every),
        ("--in-flight", args.in_flight.into()),
    ] {
        command.arg(name).arg(value.to_string());
    }
    if let Some(region) = region {
        command.arg("--region").arg(region);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.spawn().map_err(|e| Error::io(OP, &e).at_path(&program))
}

/// The trainer's messages as they come; ends when the process has ended and all was read.
fn listen(child: &mut Child) -> Result<Receiver<Message>> {
    let stdout = child.stdout.take().ok_or_else(|| broken("the trainer has no output".into()))?;
    let (sender, messages) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            let Some(message) = line.ok().as_deref().and_then(Message::parse) else { return };
            if sender.send(message).is_err() {
                return;
            }
        }
    });
    Ok(messages)
}

/// Takes down what the trainer says, and kills it when its time has come. True where it was killed.
fn watch(
    child: &mut Child,
    messages: &Receiver<Message>,
    kill: Option<Kill>,
    bar: &ProgressBar,
) -> Result<(Life, bool)> {
    let mut life = Life::default();
    let mut started = Instant::now();
    let mut killed = false;
    let mut kill_at = match kill {
        Some(Kill::Starting(after)) => Some(started + after),
        _ => None,
    };
    loop {
        let patience = kill_at.map_or(SILENCE_MAX, |at| at.saturating_duration_since(Instant::now()));
        let message = match messages.recv_timeout(patience) {
            Ok(message) => message,
            Err(RecvTimeoutError::Disconnected) => return Ok((life, killed)),
            Err(RecvTimeoutError::Timeout) if kill_at.is_some() => {
                child.kill().map_err(|e| Error::io(OP, &e))?;
                killed = true;
                kill_at = None;
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(broken(format!("the trainer said nothing for {SILENCE_MAX:?}")))
            }
        };
        match message {
            Message::Started { step, generation, passed_over, after_us } => {
                if passed_over > 0 {
                    return Err(broken(format!(
                        "expected no damaged checkpoint, found {passed_over} newer than generation {generation}"
                    )));
                }
                life.start = Some(Start { step, generation, took: Duration::from_micros(after_us) });
                started = Instant::now();
            }
            Message::Loss { iteration, bits } => {
                if life.end() != Some(iteration) {
                    return Err(broken(format!("expected iteration {:?}, found {iteration}", life.end())));
                }
                life.losses.push(bits);
                life.trained = started.elapsed();
                bar.set_position(iteration + 1);
                if let (Some(Kill::Training(target, after)), None, false) = (kill, kill_at, killed) {
                    if iteration >= target {
                        kill_at = Some(Instant::now() + after);
                    }
                }
            }
            Message::Copied { stall_us, .. } => life.stalls.push(Duration::from_micros(stall_us)),
            Message::Durable { step, after_us } => {
                life.durable_after.push(Duration::from_micros(after_us));
                life.newest_durable = life.newest_durable.max(Some(step));
            }
            Message::Done { digest, accuracy_bits } => {
                life.done = Some((digest, f64::from_bits(accuracy_bits)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(step: u64, losses: &[u32]) -> Life {
        let start = Some(Start { step, generation: 1, took: Duration::ZERO });
        Life { start, losses: losses.to_vec(), ..Life::default() }
    }

    /// The demonstration is worth nothing if it cannot fail.
    #[test]
    fn lost_steps_and_other_losses_are_noticed() {
        let reference = life(0, &[10, 11, 12, 13, 14]);
        let resumed = life(2, &[12, 13]);
        assert!(check(&resumed, &reference, Some(2), 4).is_ok());
        assert!(check(&Life::default(), &reference, Some(4), 4).is_ok());
        let error = check(&resumed, &reference, Some(3), 4).unwrap_err();
        assert!(error.message().contains("find step 3 or later"), "{error}");
        let error = check(&resumed, &reference, None, 1).unwrap_err();
        assert!(error.message().contains("at most 1"), "{error}");
        for different in [&[12, 14][..], &[13], &[12, 13, 14, 15]] {
            assert!(check(&life(2, different), &reference, None, 2).is_err(), "{different:?}");
        }
    }
}
