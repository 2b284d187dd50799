//! What the demonstration tells at its end: tables or JSON, and the picture of the loss.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pccheck::{Error, ErrorKind, Result};
use serde_json::json;

use super::lives::{Life, Lived};
use super::plot::{self, Curve};
use super::Args;
use crate::table::{pairs, Table};
use crate::{output, units};

/// Lives up to which each gets a row.
const ROWS_MAX: usize = 30;

/// Figures of the killed run.
struct Figures {
    /// Bytes of one save.
    payload_bytes: u64,
    /// Of the whole demonstration.
    took: Duration,
    kills: usize,
    start_kills: usize,
    /// Per kill during training, iterations that had to be run again.
    lost: Vec<u64>,
    stalls: Vec<Duration>,
    durable_after: Vec<Duration>,
    saves: usize,
    trained: Duration,
    iterations_run: usize,
}

impl Figures {
    fn of(lived: &Lived, payload_bytes: u64, took: Duration) -> Figures {
        let lives = &lived.lives;
        let killed = || lives.iter().filter(|life| life.done.is_none());
        let sorted = |of: fn(&Life) -> &Vec<Duration>| {
            let mut all: Vec<Duration> = lives.iter().flat_map(|life| of(life).iter().copied()).collect();
            all.sort_unstable();
            all
        };
        let durable_after = sorted(|life| &life.durable_after);
        Figures {
            payload_bytes,
            took,
            kills: killed().count(),
            start_kills: killed().filter(|life| life.start.is_none()).count(),
            lost: (0..lives.len()).filter_map(|index| lost_after(lives, index)).collect(),
            stalls: sorted(|life| &life.stalls),
            saves: durable_after.len(),
            durable_after,
            trained: lives.iter().map(|life| life.trained).sum(),
            iterations_run: lives.iter().map(|life| life.losses.len()).sum(),
        }
    }
}

/// Iterations of life `index` that were run again; none where it was not killed while it trained.
fn lost_after(lives: &[Life], index: usize) -> Option<u64> {
    let end = lives[index].end()?;
    let resumed = lives[index + 1..].iter().find_map(|life| life.start)?;
    Some(end.saturating_sub(resumed.step))
}

/// The value below which `percent` of the sorted values lie; zero where there is none.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let place = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(place).copied().unwrap_or(Duration::ZERO)
}

/// Prints the result, draws the picture, and fails where the states differ.
pub fn publish(args: &Args, lived: &Lived, payload_bytes: u64, took: Duration) -> Result<()> {
    let figures = Figures::of(lived, payload_bytes, took);
    let picture = draw(args, lived, &figures)?;
    match args.json {
        true => print_json(args, lived, &figures, &picture)?,
        false => print_tables(args, lived, &figures, &picture)?,
    }
    match lived.identical {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Internal,
            "demo",
            "the final state differs from that of the uninterrupted run",
        )),
    }
}

fn curve(lived: &Lived, title: String, subtitle: String) -> Curve {
    let floats = |bits: &[u32]| bits.iter().copied().map(f32::from_bits).collect::<Vec<f32>>();
    let lives = lived.lives.iter().enumerate().filter_map(|(index, life)| {
        // A trainer that was killed before it could train stands where the next one resumed.
        let first = lived.lives[index..].iter().find_map(|life| life.start)?.step;
        Some(plot::Life { first_iteration: first, losses: floats(&life.losses) })
    });
    Curve { title, subtitle, uninterrupted: floats(&lived.reference.losses), lives: lives.collect() }
}

fn draw(args: &Args, lived: &Lived, figures: &Figures) -> Result<PathBuf> {
    let title = match lived.identical {
        true => format!("Killed {} times, and bit for bit the same result", figures.kills),
        false => format!("Killed {} times, and the result differs", figures.kills),
    };
    let subtitle = format!(
        "{} iterations on handwritten digits, {} of state saved every {}, {} saves in flight",
        args.iterations,
        units::size(figures.payload_bytes),
        if args.every == 1 { "iteration".to_string() } else { format!("{} iterations", args.every) },
        args.in_flight
    );
    let path = args.out.join("loss.svg");
    let svg = plot::render_svg(&curve(lived, title, subtitle));
    let mut options = File::options();
    options.write(true).create(true).truncate(true).custom_flags(libc::O_NOFOLLOW);
    let written = options.open(&path).and_then(|mut file| file.write_all(svg.as_bytes()));
    written.map_err(|e| Error::io("write picture", &e).at_path(&path))?;
    Ok(path)
}

fn lives_table(lives: &[Life]) -> String {
    let mut rows =
        Table::new(&["life", "resumed at", "generation", "recovery", "iterations", "lost", "<ended"]);
    for (index, life) in lives.iter().enumerate() {
        let ended = match (life.end(), life.done.is_some()) {
            (None, _) => "killed while recovering".to_string(),
            (Some(end), true) => format!("finished after {end} iterations"),
            (Some(end), false) => format!("killed in iteration {end}"),
        };
        let start = |value: &dyn Fn(&super::lives::Start) -> String| {
            life.start.as_ref().map_or("-".to_string(), value)
        };
        rows.row(vec![
            (index + 1).to_string(),
            start(&|start| start.step.to_string()),
            start(&|start| start.generation.to_string()),
            start(&|start| units::time(start.took)),
            life.losses.len().to_string(),
            lost_after(lives, index).map_or("-".to_string(), |lost| lost.to_string()),
            ended,
        ]);
    }
    rows.render()
}

fn print_tables(args: &Args, lived: &Lived, figures: &Figures, picture: &Path) -> Result<()> {
    let mut text = String::new();
    if lived.lives.len() <= ROWS_MAX {
        text += &lives_table(&lived.lives);
        text.push('\n');
    }
    let lost: u64 = figures.lost.iter().sum();
    let lost_mean = lost as f64 / figures.lost.len().max(1) as f64;
    let stall = |percent| units::time(percentile(&figures.stalls, percent));
    let durable = |percent| units::time(percentile(&figures.durable_after, percent));
    let accuracy = lived.lives.last().and_then(|life| life.done).map_or(0.0, |done| done.1);
    let reference = &lived.reference;
    let per_iteration = |time: Duration, iterations: usize| {
        units::time(time / iterations.max(1).min(u32::MAX as usize) as u32)
    };
    let digest = |life: Option<&Life>| {
        life.and_then(|life| life.done).map_or("none".to_string(), |done| format!("{:032x}", done.0))
    };
    text += &pairs(&[
        ("iterations", format!("{}, of which {lost} were run again after kills", args.iterations)),
        ("kills", format!("{} by SIGKILL, {} of them while recovering", figures.kills, figures.start_kills)),
        (
            "steps lost per kill",
            format!("{lost_mean:.1} on average, {} at most", figures.lost.iter().max().unwrap_or(&0)),
        ),
        ("state", format!("{} per save", units::size(figures.payload_bytes))),
        ("saves made durable", figures.saves.to_string()),
        ("stall per save", format!("median {}, 99 % below {}", stall(50), stall(99))),
        ("time to durable", format!("median {}, 99 % below {}", durable(50), durable(99))),
        (
            "durable",
            format!(
                "{} sustained while training",
                units::rate(figures.payload_bytes * figures.saves as u64, figures.trained)
            ),
        ),
        (
            "time per iteration",
            format!(
                "{} saving, {} without",
                per_iteration(figures.trained, figures.iterations_run),
                per_iteration(reference.trained, reference.losses.len())
            ),
        ),
        ("time", units::time(figures.took)),
        ("test accuracy", format!("{:.1} %", accuracy * 100.0)),
        ("uninterrupted run", digest(Some(reference))),
        ("killed run", digest(lived.lives.last())),
        ("picture", picture.display().to_string()),
    ]);
    text += match lived.identical {
        true => "\nThe final weights are bit-identical to those of the uninterrupted run.\n",
        false => "\nTHE FINAL WEIGHTS DIFFER from those of the uninterrupted run.\n",
    };
    output::print(&text)
}

fn print_json(args: &Args, lived: &Lived, figures: &Figures, picture: &Path) -> Result<()> {
    let us = |time: Duration| time.as_micros() as u64;
    let lives: Vec<_> = lived
        .lives
        .iter()
        .enumerate()
        .map(|(index, life)| {
            json!({
                "resumed_at_step": life.start.map(|start| start.step),
                "resumed_generation": life.start.map(|start| start.generation),
                "recovery_us": life.start.map(|start| us(start.took)),
                "iterations": life.losses.len(),
                "saves_durable": life.durable_after.len(),
                "newest_durable_step": life.newest_durable,
                "killed": life.done.is_none(),
                "steps_lost": lost_after(&lived.lives, index),
            })
        })
        .collect();
    let digest = |life: Option<&Life>| life.and_then(|l| l.done).map(|done| format!("{:032x}", done.0));
    output::print_json(&json!({
        "identical": lived.identical,
        "digest_uninterrupted": digest(Some(&lived.reference)),
        "digest_killed": digest(lived.lives.last()),
        "iterations": args.iterations,
        "kills": figures.kills,
        "kills_while_recovering": figures.start_kills,
        "steps_lost_per_kill": figures.lost,
        "payload_bytes": figures.payload_bytes,
        "saves_durable": figures.saves,
        "stall_us": { "median": us(percentile(&figures.stalls, 50)), "p99": us(percentile(&figures.stalls, 99)) },
        "durable_us": {
            "median": us(percentile(&figures.durable_after, 50)),
            "p99": us(percentile(&figures.durable_after, 99)),
        },
        "durable_gb_per_s":
            units::gb_per_s(figures.payload_bytes * figures.saves as u64, figures.trained.as_secs_f64()),
        "iteration_us": {
            "saving": us(figures.trained) / figures.iterations_run.max(1) as u64,
            "uninterrupted": us(lived.reference.trained) / args.iterations,
        },
        "seconds": figures.took.as_secs_f64(),
        "test_accuracy": lived.lives.last().and_then(|life| life.done).map(|done| done.1),
        "picture": picture,
        "lives": lives,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::lives::Start;
    use super::*;

    fn life(step: Option<u64>, losses: usize) -> Life {
        let start = step.map(|step| Start { step, generation: 1, took: Duration::ZERO });
        Life { start, losses: vec![0; losses], ..Life::default() }
    }

    #[test]
    fn lost_steps_are_counted_over_kills_during_recovery() {
        let lives = [life(Some(0), 10), life(None, 0), life(Some(8), 5), life(Some(13), 7)];
        let lost: Vec<_> = (0..lives.len()).map(|index| lost_after(&lives, index)).collect();
        assert_eq!(lost, [Some(2), None, Some(0), None]);
    }

    #[test]
    fn percentiles_are_of_the_values() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!(percentile(&times, 50), Duration::from_millis(50));
        assert_eq!(percentile(&times, 99), Duration::from_millis(99));
        assert_eq!(percentile(&times[..1], 99), Duration::from_millis(1));
        assert_eq!(percentile(&[], 50), Duration::ZERO);
    }
}
