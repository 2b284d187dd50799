"""Text that every machine with Python has, and a sampler whose place in it can be saved and restored."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Corpus:
    """The sources of Python's standard library (its top-level modules, by name), as one tensor of bytes."""

    def __init__(self, folder: Path | None = None, pattern: str = "*.py") -> None:
        folder = Path(os.__file__).parent if folder is None else folder
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        text = bytearray().join(path.read_bytes() for path in files)
        if not text:
            raise FileNotFoundError(f"no text: nothing in {folder} matches {pattern}; pass --text FOLDER")
        self.tokens = torch.frombuffer(text, dtype=torch.uint8)
        self.sha256 = hashlib.sha256(text).hexdigest()
        self.description = f"{len(files)} files of {folder}, {len(text):,} bytes, sha256 {self.sha256[:16]}"


class Sampler:
    """Batches of windows of the corpus in a shuffled order that depends on the seed and the epoch alone.

    `state_dict()` is three numbers and a hash: the order itself is made again from them. `load_state_dict()`
    refuses the place in another text or another order, where going on would silently be a different run.
    """

    def __init__(self, corpus: Corpus, *, batch: int, context: int, seed: int) -> None:
        self._corpus = corpus
        self._batch = batch
        self._context = context
        self._seed = seed
        self._windows = (len(corpus.tokens) - 1) // context
        if self._windows < batch:
            raise ValueError(f"{len(corpus.tokens)} bytes of text are too few for a batch of {batch} x {context}")
        self._start_epoch(0)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._next = 0
        # A generator of its own: the global one belongs to dropout, and would tie the order to the model.
        shuffle = torch.Generator().manual_seed((self._seed << 20) + epoch)
        self._order = torch.randperm(self._windows, generator=shuffle)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 of shape (batch, context); the targets are the inputs one byte later."""
        if self._next + self._batch > self._windows:
            self._start_epoch(self._epoch + 1)
        starts = self._order[self._next : self._next + self._batch] * self._context
        self._next += self._batch
        windows = self._corpus.tokens[starts[:, None] + torch.arange(self._context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what it is a place in."""
        return {"epoch": self._epoch, "next": self._next, "order": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the place that `state_dict()` named; ValueError where it is of other data."""
        if state["order"] != self._identity():
            raise ValueError(
                f"the checkpoint was made with the data {state['order']}, this run has {self._identity()}; "
                "use the same text, seed and size, or another region"
            )
        self._start_epoch(state["epoch"])
        self._next = state["next"]

    def _identity(self) -> dict[str, Any]:
        return {
            "sha256": self._corpus.sha256,
            "batch": self._batch,
            "context": self._context,
            "seed": self._seed,
        }
