"""Runs a plan: a fresh process and a fresh folder for every job, one after another."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring.figures import size_text

from .environment import ROOT, Environment, variables
from .plan import Job, Plan
from .progress import Progress
from .settings import Settings
from .systems import Entry

#: of the state in probes: above what any system writes at once, and quick
PROBE_BYTES = 64_000_000
#: a worker that takes longer than this and SLOWEST_BYTES_PER_SECOND allow for hangs
PATIENCE_SECONDS = 300
SLOWEST_BYTES_PER_SECOND = 20e6
SAID_LINES = 25


class WorkerFailedError(RuntimeError):
    """A worker ended without a result; the message holds the end of what it wrote."""


class Runner:
    """Starts workers."""

    def __init__(self, environment: Environment, folder: Path, memory_folder: Path, seed: int, saves: int) -> None:
        self._environment = environment
        self._folder, self._memory_folder = folder, memory_folder
        self._seed, self._saves = seed, saves

    def run(self, plan: Plan, probes: list[Entry], progress: Progress) -> dict[str, Any]:
        """All jobs and probes. A system that fails is reported, and the others go on; Ctrl-C keeps what there is."""
        found: dict[str, Any] = {"probes": {}, "runs": [], "failed": [], "interrupted": False}
        try:
            for entry in probes:
                self._probe(entry, found, progress)
            for position, job in enumerate(plan.jobs):
                self._job(job, position, found, progress)
        except KeyboardInterrupt:
            found["interrupted"] = True
        return found

    def _probe(self, entry: Entry, found: dict[str, Any], progress: Progress) -> None:
        progress.now(f"probing {entry.name}")
        began = time.monotonic()
        try:
            found["probes"][entry.name] = self._worker(entry, PROBE_BYTES, 0)
        except WorkerFailedError as why:
            found["failed"].append({"system": entry.name, "probe": True, "message": str(why)})
        progress.step(f"probed {entry.name} in {time.monotonic() - began:.1f} s")

    def _job(self, job: Job, position: int, found: dict[str, Any], progress: Progress) -> None:
        what = f"round {job.round + 1}, {size_text(job.size)}, {job.system.name}"
        named = {"system": job.system.name, "size": job.size, "round": job.round, "position": position}
        progress.now(what)
        began = time.monotonic()
        try:
            found["runs"].append(named | self._worker(job.system, job.size, self._saves))
        except WorkerFailedError as why:
            found["failed"].append(named | {"message": str(why)})
            progress.say(f"{what}: failed: {str(why).splitlines()[-1]}")
        progress.step(f"{what}: {time.monotonic() - began:.1f} s")

    def _worker(self, entry: Entry, state_bytes: int, saves: int) -> dict[str, Any]:
        parent = self._memory_folder if entry.in_memory else self._folder
        with (
            tempfile.TemporaryDirectory(prefix="pccheck-compare-", dir=parent) as folder,
            tempfile.TemporaryDirectory(prefix="pccheck-compare-") as notes,
        ):
            settings = Settings(entry.name, folder, state_bytes, saves, self._seed)
            return self._process(settings, Path(notes))

    def _process(self, settings: Settings, notes: Path) -> dict[str, Any]:
        given, result, said = notes / "settings.json", notes / "result.json", notes / "said.txt"
        given.write_text(json.dumps(dataclasses.asdict(settings)))
        patience = PATIENCE_SECONDS + (settings.saves + 2) * settings.state_bytes / SLOWEST_BYTES_PER_SECOND
        command = [str(self._environment.python), "-m", "comparison.worker", str(given), str(result)]
        with said.open("wb") as stream:
            # Where a worker starts, Python looks for modules first.
            process = subprocess.Popen(
                command, env=self._variables(), cwd=ROOT / "benches", stdout=stream, stderr=subprocess.STDOUT
            )
            try:
                code: int | None = process.wait(patience)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                process.wait()
        if code == 0 and result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
        ending = f"did not end within {patience:.0f} s" if code is None else f"ended with code {code}"
        tail = "\n".join(said.read_text(errors="replace").splitlines()[-SAID_LINES:])
        raise WorkerFailedError(f"{settings.system}: the worker {ending} and said:\n{tail}")

    def _variables(self) -> dict[str, str]:
        paths = [self._environment.site, ROOT / "benches", os.environ.get("PYTHONPATH")]
        return variables(self._environment.python) | {
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "PYTHONDONTWRITEBYTECODE": "1",
            # Torch's threads sleep when they wait for each other: spinning, they take cores from whoever writes.
            "OMP_WAIT_POLICY": "passive",
        }
