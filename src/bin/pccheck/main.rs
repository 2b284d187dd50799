//! The command-line tool: looks into regions, verifies, exports and imports checkpoints, measures, demonstrates.
//!
//! | module | what |
//! |---|---|
//! | [`commands`] | format, grow, inspect, verify, export, import, pin, unpin, relocate |
//! | [`bench`] | the engine beside the ceilings of the machine |
//! | [`demo`] | trains, is killed again and again, and loses nothing |
//! | [`units`], [`table`], [`output`], [`exit`] | sizes and times, aligned tables, what is printed, exit codes |
#![deny(unsafe_code)]

mod bench;
mod commands;
mod demo;
mod exit;
mod output;
mod table;
mod units;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Crash-safe checkpoints of training state: format, inspect, verify, export, import, measure.
#[derive(Parser)]
#[command(
    name = "pccheck",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = exit::HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Format(commands::format::Args),
    Inspect(commands::inspect::Args),
    Verify(commands::verify::Args),
    Export(commands::export::Args),
    Import(commands::import::Args),
    Grow(commands::grow::Args),
    /// Keep a checkpoint, durably, until it is unpinned (needs the writer's lock).
    Pin(commands::pin::Args),
    /// Lift a pin, durably (needs the writer's lock).
    Unpin(commands::pin::Args),
    Relocate(commands::relocate::Args),
    Bench(bench::Args),
    Demo(demo::Args),
    #[command(hide = true)]
    DemoTrainer(demo::trainer::Args),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Format(args) => commands::format::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Grow(args) => commands::grow::run(&args),
        Command::Pin(args) => commands::pin::run(&args, true),
        Command::Unpin(args) => commands::pin::run(&args, false),
        Command::Relocate(args) => commands::relocate::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::DemoTrainer(args) => demo::trainer::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("error: {error}"));
            exit::Status::of(error.kind()).into()
        }
    }
}
