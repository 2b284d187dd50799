//! `pccheck relocate`: where a member of a striped region is now.

use std::path::PathBuf;
use std::time::Duration;

use pccheck::medium::relocate_member;
use pccheck::Result;
use serde_json::json;

use crate::output;

/// Tell a striped region where one of its members is now.
///
/// Checks that the file is that member, then notes its place, durably, in member 0. Members that were moved together
/// with member 0 are found without this.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pccheck inspect /nvme0/run.pcc                     says which member is lost, or foreign
  pccheck relocate /nvme0/run.pcc 1 /nvme2/run.pcc   member 1 is there now")]
pub struct Args {
    /// Member 0, by which the region is opened.
    path: PathBuf,
    /// Index of the member, from 1.
    index: u32,
    /// Where it is now.
    to: PathBuf,
    /// Seconds to wait for another writer to close the region.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    relocate_member(&args.path, args.index, &args.to, Duration::from_secs(args.wait))?;
    if args.json {
        return output::print_json(&json!({ "path": args.path, "member": args.index, "to": args.to }));
    }
    output::print(&format!("member {} is {}\n", args.index, args.to.display()))
}
