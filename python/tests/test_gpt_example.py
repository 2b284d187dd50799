"""A training run that is killed and resumed must not differ from one that was never disturbed.

The failure this prevents: a resumed run that looks healthy, but has lost or repeated a piece of state (a moment of
Adam, the place in the data, the learning rate, a random number generator), so that its losses are no longer those of
the run it continues. Real processes, a real SIGKILL, the example as users start it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pccheck

pytest.importorskip("torch")

EXAMPLE = Path(__file__).parents[1] / "examples" / "gpt"
STEPS = 24
#: Each of two saves in flight may be lost; everything before them is durable.
MAX_IN_FLIGHT = 2


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # PYTHONPATH may name the package relative to this process's own folder.
    environment["PYTHONPATH"] = str(Path(pccheck.__file__).parents[1])
    command: list[str | Path] = [sys.executable, EXAMPLE / script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def train(folder: Path, *arguments: object, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    common = ("--size", "tiny", "--steps", steps, "--threads", 1, "--quiet")
    return run("train.py", *common, "--region", folder / "gpt.pcc", *arguments)


def losses(log: Path) -> list[tuple[int, str]]:
    """(step, loss as float.hex()) in the order of the log."""
    return [(line["step"], line["loss"]) for line in map(json.loads, log.read_text().splitlines())]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of a run that saves nothing and is not killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, "--every", 0, "--log", folder / "losses.jsonl")
    assert done.returncode == 0, done.stderr
    found = dict(losses(folder / "losses.jsonl"))
    assert list(found) == list(range(STEPS))
    assert len(set(found.values())) == STEPS, "losses that repeat could not tell one step from another"
    return found


@pytest.mark.parametrize("every", [1, 3])
def test_killed_right_after_a_step_and_resumed(tmp_path: Path, undisturbed: dict[int, str], every: int) -> None:
    # The first save must have had time to become durable: otherwise starting anew would be right, and equal.
    kill_at = random.Random(f"{every}").randrange((MAX_IN_FLIGHT + 1) * every, STEPS - 1)
    log = tmp_path / "losses.jsonl"
    killed = train(tmp_path, "--every", every, "--log", log, "--kill-at", kill_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = losses(log)
    assert before[-1][0] == kill_at

    resumed = train(tmp_path, "--every", every, "--log", log)
    assert resumed.returncode == 0, resumed.stderr
    after = losses(log)[len(before) :]
    lost = kill_at + 1 - after[0][0]
    assert 0 <= lost <= (MAX_IN_FLIGHT + 1) * every - 1, f"{lost} steps were lost with a save every {every}"
    assert [step for step, _ in after] == list(range(after[0][0], STEPS))
    for step, loss in before + after:
        assert loss == undisturbed[step], f"step {step}"


def test_killed_at_random_moments(tmp_path: Path) -> None:
    done = run("kill_and_resume.py", "--steps", 200, "--kills", 2, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL" in done.stdout, done.stdout
    assert len(dict(losses(tmp_path / "killed.jsonl"))) == 200


def test_the_comparison_notices_one_wrong_bit_and_a_missing_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import kill_and_resume

    expected = {0: 1.0, 1: 0.5}
    assert kill_and_resume.differences(expected, [(0, 1.0), (0, 1.0), (1, 0.5)]) == []
    assert len(kill_and_resume.differences(expected, [(0, 1.0), (1, 0.5000000000000001)])) == 1
    assert kill_and_resume.differences(expected, [(0, 1.0)]) == ["step 1: missing"]


def test_the_sampler_goes_on_where_it_was_also_across_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import data

    (tmp_path / "text.py").write_bytes(bytes(range(256)))
    corpus = data.Corpus(tmp_path)

    def sampler() -> data.Sampler:
        return data.Sampler(corpus, batch=3, context=16, seed=5)

    whole = sampler()
    batches = [whole.next_batch()[0] for _ in range(12)]  # five batches are an epoch
    assert whole.state_dict()["epoch"] == 2
    for done in (0, 1, 4, 5, 9):
        first, second = sampler(), sampler()
        for _ in range(done):
            first.next_batch()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for expected in batches[done:]:
            assert second.next_batch()[0].equal(expected)


def test_another_text_or_seed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import data

    (tmp_path / "text.py").write_bytes(bytes(range(256)))
    corpus = data.Corpus(tmp_path)
    state = data.Sampler(corpus, batch=3, context=16, seed=5).state_dict()
    with pytest.raises(ValueError, match="use the same text, seed and size"):
        data.Sampler(corpus, batch=3, context=16, seed=6).load_state_dict(state)
    (tmp_path / "text.py").write_bytes(bytes(range(1, 256)) + b"\0")
    with pytest.raises(ValueError, match="use the same text, seed and size"):
        data.Sampler(data.Corpus(tmp_path), batch=3, context=16, seed=5).load_state_dict(state)
