"""What the measured systems need: Debian packages, a Python environment outside the checkout, and the wheel.

Runs on the system's Python alone. Everything is installed only where it is missing, and in one place that can be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "benches" / "requirements.txt"
DEEPSPEED = "deepspeed>=0.16"
#: what DeepSpeed would otherwise compile in the middle of a measurement
DEEPSPEED_OPERATORS = (
    "from deepspeed.ops.op_builder import AsyncIOBuilder\n"
    "from deepspeed.ops.op_builder.utils import UtilsBuilder\n"
    "AsyncIOBuilder().load(), UtilsBuilder().load()"
)
#: header that DeepSpeed compiles its file writer against
LIBAIO_HEADER = Path("/usr/include/libaio.h")

Say = Callable[[str], None]


class SetupError(RuntimeError):
    """Something is missing and could not be installed; the message says what to do."""


@dataclass(frozen=True)
class Environment:
    """A Python that has every system, and the folder that holds the built wheel's contents (none: it is installed)."""

    python: Path
    site: Path | None


def cache_folder() -> Path:
    """`$PCC_COMPARE_CACHE`, or the place beside the tests' own environment."""
    named = os.environ.get("PCC_COMPARE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base) / "pccheck" / "compare"


def prepare(say: Say) -> Environment:
    """Makes all of it; takes minutes the first time and seconds later."""
    _native_packages(say)
    folder = cache_folder()
    python = _python(folder / "venv", say)
    return Environment(python, _wheel(python, folder, say))


def _run(command: list[str], what: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise SetupError(f"{what} failed: {' '.join(command)} ended with code {done.returncode}:\n{tail}")


def _native_packages(say: Say) -> None:
    wanted = {"cargo": None, "c++": "g++", "python3": "python3"}
    missing = [package or tool for tool, package in wanted.items() if shutil.which(tool) is None]
    if not LIBAIO_HEADER.exists():
        missing.append("libaio-dev")
    if subprocess.run([sys.executable, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL).returncode:
        missing.append("python3-venv")
    if "cargo" in missing:
        raise SetupError("expected Rust's cargo, found none: install Rust, as README.md says, and run this again")
    if not missing:
        return
    say(f"installing {' '.join(missing)}")
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    try:
        _run([*as_root, "apt-get", "update", "-qq"], "updating the list of packages")
        _run([*as_root, "env", "DEBIAN_FRONTEND=noninteractive", *install], "installing packages")
    except (SetupError, OSError) as why:
        raise SetupError(
            f"missing: {' '.join(missing)} (Debian's names); install these packages and run this again: {why}"
        ) from None


def _python(venv: Path, say: Say) -> Path:
    python, stamp = venv / "bin" / "python", venv / "requirements.sum"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + DEEPSPEED.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"making the Python environment {venv} (PyTorch with its libraries: some 7 GB)")
    shutil.rmtree(venv, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(venv)], "making a Python environment")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--requirement", str(REQUIREMENTS)], "installing the requirements")
    # Its setup imports torch, and its operators are compiled when they are used, not here.
    _run([*pip, "--no-build-isolation", DEEPSPEED], "installing DeepSpeed", os.environ | {"DS_BUILD_OPS": "0"})
    say("compiling DeepSpeed's operators")
    _run([str(python), "-c", DEEPSPEED_OPERATORS], "compiling DeepSpeed's operators", variables(python))
    stamp.write_text(wanted)
    return python


def variables(python: Path) -> dict[str, str]:
    """The environment of a process that runs DeepSpeed: its tools, and where its compiled operators are."""
    return os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "torch_extensions"),
        "DS_ACCELERATOR": "cpu",
    }


def _wheel(python: Path, folder: Path, say: Say) -> Path:
    say("building the wheel in release mode")
    wheels, site = folder / "wheel", folder / "site"
    for each in (wheels, site):
        shutil.rmtree(each, ignore_errors=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    env = variables(python) | {"CARGO_TARGET_DIR": str(folder / "target")}
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT / "python")]
    _run(build, "building the wheel", env)
    (wheel,) = wheels.glob("*.whl")
    _run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], "installing the wheel")
    return site
