//! A virtual machine with persistent memory: part of its memory, which lies in a file of ours and outlives it.

use std::env;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use super::reports::{self, Said};

/// Names the folder with `vmlinuz` and `initrd` that `scripts/guest` made.
pub const ENV_GUEST: &str = "PCC_GUEST";

/// Memory of the guest, all below the addresses that the machine keeps for devices, so that offset in the file is address.
const MEMORY_MIB: u64 = 1536;
const PMEM_START_MIB: u64 = 1024;
/// mkfs.xfs refuses less than 300.
const PMEM_MIB: u64 = 384;

/// All the engine's tests take this long at most.
const TESTS_SECONDS: u64 = 900;

/// A machine that is off; its persistent memory holds an empty file system.
pub struct Machine {
    guest: PathBuf,
    file_system: String,
    /// In memory: the guest's stores go straight into it.
    memory: tempfile::NamedTempFile,
}

impl Machine {
    pub fn new(file_system: &str) -> Machine {
        let guest = PathBuf::from(env::var_os(ENV_GUEST).expect("scripts/guest prepares the guest"));
        let memory = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file for the guest's memory");
        memory.as_file().set_len(MEMORY_MIB << 20).expect("size");
        let image = tempfile::NamedTempFile::new_in("/dev/shm").expect("an image");
        image.as_file().set_len(PMEM_MIB << 20).expect("size");
        let (program, options): (_, &[&str]) = match file_system {
            // DAX needs blocks of the size of pages.
            "ext4" => ("mkfs.ext4", &["-q", "-b", "4096"]),
            "xfs" => ("mkfs.xfs", &["-q", "-m", "reflink=0"]),
            other => panic!("no file system {other}"),
        };
        let made = Command::new(program).args(options).arg(image.path()).output().expect(program);
        assert!(made.status.success(), "{program}: {}", String::from_utf8_lossy(&made.stderr));
        copy_into(image.path(), memory.as_file(), PMEM_START_MIB << 20);
        Machine { guest, file_system: file_system.to_string(), memory }
    }

    fn command(&self, environment: &[(&str, String)]) -> Command {
        let memory = format!(
            "memory-backend-file,id=ram,size={MEMORY_MIB}M,share=on,mem-path={}",
            self.memory.path().display()
        );
        // What the kernel does not know and looks like NAME=value becomes the environment of its first process.
        let mut line = format!(
            "console=ttyS0 loglevel=3 panic=-1 memmap={PMEM_MIB}M!{PMEM_START_MIB}M PCC_GUEST_FS={}",
            self.file_system
        );
        for (name, value) in environment {
            line += &format!(" {name}={value}");
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-no-reboot"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .args(["-m", &format!("{MEMORY_MIB}M"), "-object", &memory, "-machine", "pc,memory-backend=ram"])
            .arg("-kernel")
            .arg(self.guest.join("vmlinuz"))
            .arg("-initrd")
            .arg(self.guest.join("initrd"))
            .args(["-append", &line]);
        command
    }

    /// Starts it and kills it `life` after its process has said `after`.
    pub fn run_and_kill(
        &self,
        environment: &[(&'static str, String)],
        after: &str,
        life: Duration,
    ) -> Result<Said, String> {
        reports::run_and_kill(&mut self.command(environment), after, life)
    }

    /// Runs the tests that the guest brings, in `folder`: names of the programs and how many tests passed.
    pub fn run_tests(&self, folder: &Path) -> Vec<(String, usize)> {
        let machine = self.command(&[("PCC_TEST_DISK", folder.display().to_string())]);
        let Output { stdout, .. } = Command::new("timeout")
            .arg(TESTS_SECONDS.to_string())
            .arg(machine.get_program())
            .args(machine.get_args())
            .stdin(Stdio::null())
            .output()
            .expect("run the guest");
        let said = String::from_utf8_lossy(&stdout).replace('\r', "");
        let ended = said.lines().any(|line| line == "@ended");
        assert!(ended && !said.contains("@failed"), "{}:\n{said}", self.file_system);
        said.lines()
            .filter_map(|line| line.strip_prefix("@passed ")?.split_once(' '))
            .map(|(program, passed)| (program.to_string(), passed.parse().expect("a number")))
            .collect()
    }
}

fn copy_into(image: &Path, memory: &File, offset: u64) {
    let mut from = File::open(image).expect("open the image");
    let mut to = memory;
    to.seek(SeekFrom::Start(offset)).expect("seek");
    let copied = std::io::copy(&mut from, &mut to).expect("copy");
    assert_eq!(copied, fs::metadata(image).expect("size").len());
}
