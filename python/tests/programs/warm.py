"""Starts programs quickly: one warm interpreter, in which torch is imported, forks a process for each.

The forked process has run nothing of torch yet and has one thread. It runs the program as ``__main__`` and ends as any
interpreter does, so that exits, signals and SIGKILL are real ones. Run as a script this is the warm interpreter.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent
# Far beyond what anything here takes: a program that is stuck fails its test by this.
PATIENCE_SECONDS = 60.0


@dataclass
class Program:
    """A process that runs one of the programs beside this file."""

    warm: Warm
    number: int
    out: Path

    def text(self) -> str:
        """What it has printed so far, warnings and tracebacks included."""
        return self.out.read_text()

    def lines(self) -> list[str]:
        """Its finished lines."""
        return self.text().split("\n")[:-1]

    def wait_for(self, wanted: str, count: int = 1) -> None:
        """Waits until ``count`` of its lines begin with ``wanted``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while sum(line.startswith(wanted) for line in self.lines()) < count:
            ended = self.warm.ask(poll=self.number)
            found = sum(line.startswith(wanted) for line in self.lines())
            assert found >= count or ended is None, f"it ended ({ended}) before {wanted!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {wanted!r} in time:\n{self.text()}"
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal; one that has ended already is left alone."""
        self.warm.ask(kill=self.number, signal=int(number))

    def wait(self) -> int:
        """How it ended: exit status, or minus the signal's number."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (status := self.warm.ask(poll=self.number)) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it is stuck:\n{self.text()}")
            time.sleep(0.002)
        return int(status)


class Warm:
    """The client's side of the warm interpreter."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._count = 0

    def start(self, program: str, folder: Path, **arguments: Any) -> Program:
        """Starts ``program``, which finds ``arguments`` as JSON in ``sys.argv[1]``."""
        self._count += 1
        out = folder / f"{program}-{self._count}.out"
        out.touch()
        self.ask(start=self._count, program=program, out=str(out), arguments=json.dumps(arguments))
        return Program(self, self._count, out)

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(PATIENCE_SECONDS)


def _serve() -> dict[str, str] | None:
    """Answers requests. Returns the request to run in a forked child, None where the client is gone."""
    # What makes it warm; optimizers import dynamo.
    import torch._dynamo
    import torch.utils.data  # noqa: F401

    import pccheck.torch  # noqa: F401

    # By the client's numbers: the system gives a process id again once its process has been waited for.
    pids: dict[int, int] = {}
    ended: dict[int, int] = {}

    def ending(number: int) -> int | None:
        if number not in ended and (found := os.waitpid(pids[number], os.WNOHANG))[0]:
            ended[number] = os.waitstatus_to_exitcode(found[1])
        return ended.get(number)

    for line in sys.stdin:
        request = json.loads(line)
        reply = None
        if "poll" in request:
            reply = ending(request["poll"])
        elif "kill" in request:
            if ending(request["kill"]) is None:
                os.kill(pids[request["kill"]], request["signal"])
        else:
            pids[request["start"]] = os.fork()
            if pids[request["start"]] == 0:
                return request  # type: ignore[no-any-return]
        print(json.dumps(reply), flush=True)
    return None


if __name__ == "__main__":
    job = _serve()
    if job is not None:
        target = os.open(job["out"], os.O_WRONLY | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.argv = [job["program"], job["arguments"]]
        sys.path.insert(0, str(PROGRAMS))
        runpy.run_path(str(PROGRAMS / f"{job['program']}.py"), run_name="__main__")
