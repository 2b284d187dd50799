"""A first page that does not work: the README's PyTorch program and the wheel's own are run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]

# What the program calls its own.
FRAME = """
import torch
torch.manual_seed(0)
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
steps = {steps}

def batch(i):
    return torch.randn(5, 4)

{program}
print(last, [p.double().sum().item().hex() for p in model.parameters()])
"""


def program_of(page: str) -> str:
    """The first Python block of a page."""
    program = (ROOT / page).read_text().split("```python\n", 1)[1].split("```", 1)[0]
    # The wheel's page leaves the iteration to the reader.
    return program.replace(
        "    ...                                    # forward, backward, optimizer.step(), scheduler.step()\n",
        "    model(batch(i)).square().mean().backward(); optimizer.step(); scheduler.step(); optimizer.zero_grad()\n",
    )


def run(folder: Path, page: str, steps: int) -> str:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(FRAME.format(program=program_of(page), steps=steps))
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("page", ["README.md", "python/README.md"])
def test_the_program_of_the_page_resumes_exactly(tmp_path: Path, page: str) -> None:
    whole = run(tmp_path / "whole", page, 9)
    assert whole.startswith("None ")
    run(tmp_path / "stopped", page, 5)
    resumed = run(tmp_path / "stopped", page, 9)
    assert resumed == whole.replace("None ", "4 ", 1)


def test_the_transformers_example_runs_and_has_nothing_left_to_do(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    example = ROOT / "python" / "examples" / "huggingface_example.py"
    assert len(example.read_text().splitlines()) <= 40
    for _ in range(2):
        command = [sys.executable, str(example), str(tmp_path / "run.pccheck")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.resume"))
