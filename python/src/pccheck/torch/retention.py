"""Which checkpoints are kept beyond the newest: every M-th step, and the best by a metric. Both are pins."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from .. import errors
from ..store import Store

__all__ = ["PINNED_KEY", "Best", "Retention", "TRAINER_KEY"]

#: metadata key of what the trainer says of a checkpoint
TRAINER_KEY = "trainer"
#: what it says there of why a checkpoint was pinned: "every" or "best"
PINNED_KEY = "pinned"


@dataclass(frozen=True)
class Best:
    """Keep the best checkpoints by a metric that is given to ``step(i, metrics={...})``.

    Args:
        metric: its name.
        mode: "min" or "max".
        count: how many are kept.
    """

    metric: str
    mode: str = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max") or not isinstance(self.count, int) or self.count < 1:
            raise errors.InvalidArgument(f"{self}: expected mode 'min' or 'max' and a count of 1 or more")

    def order(self, value: float) -> float:
        """Smaller is better."""
        return value if self.mode == "min" else -value


@dataclass(frozen=True)
class _Kept:
    order: float
    generation: int


class Retention:
    """Decides which saves are pinned when they begin, and unpins what a better one displaced."""

    def __init__(self, every: int | None, best: Best | None) -> None:
        if every is not None and (not isinstance(every, int) or every < 1):
            raise errors.InvalidArgument(f"keep_every={every!r}: expected a number of steps, 1 or more")
        if best is not None and not isinstance(best, Best):
            raise errors.InvalidArgument(f"keep_best={best!r}: expected a Best, such as Best('loss')")
        self._every = every
        self._best = best
        self._kept: list[_Kept] = []

    @property
    def first_pins(self) -> int:
        """Slots for pins that a new region gets."""
        return (self._best.count + 1 if self._best else 0) + (2 if self._every else 0)

    def adopt(self, store: Store) -> None:
        """Learns which checkpoints were pinned for being the best from what the region holds, and unpins surplus ones,
        such as those of a process that was killed before it could. Other pins are left alone.
        """
        self._kept = []
        if self._best is None:
            return
        for info in store.checkpoints():
            if not info.pinned:
                continue
            try:
                with store.open(generation=info.generation, verify=False) as checkpoint:
                    value = _metric_of_best(checkpoint.metadata, self._best.metric)
            except errors.Corrupt as why:
                warnings.warn(
                    f"the pinned checkpoint of step {info.step} is damaged, and not counted among the best: {why}",
                    stacklevel=2,
                )
                continue
            if value is not None and not math.isnan(value):
                self._kept.append(_Kept(self._best.order(value), info.generation))
        self._unpin_surplus(store, self._best.count)

    def wants_pin(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the save of this step is pinned from its commit on."""
        return self._is_periodic(step) or self._is_best(metrics)

    def why_pinned(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """What is said of the pin in the checkpoint; None: it is not pinned."""
        return "every" if self._is_periodic(step) else "best" if self._is_best(metrics) else None

    def durable(self, store: Store, step: int, generation: int, metrics: Mapping[str, float]) -> None:
        """A pinned save is durable: unpins what it displaced."""
        if self._best is None or self._is_periodic(step) or self._best.metric not in metrics:
            return
        self._kept.append(_Kept(self._best.order(metrics[self._best.metric]), generation))
        self._unpin_surplus(store, self._best.count)

    def _unpin_surplus(self, store: Store, count: int) -> None:
        # Among equals the older one stays.
        self._kept.sort(key=lambda kept: (kept.order, kept.generation))
        while len(self._kept) > count:
            displaced = self._kept.pop()
            try:
                store.unpin(displaced.generation)
            except errors.NotFound:
                continue
            except errors.PccheckError as why:
                warnings.warn(f"generation {displaced.generation} stays pinned: {why}", stacklevel=2)

    def _is_periodic(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        if self._best is None or self._best.metric not in metrics:
            return False
        value = metrics[self._best.metric]
        if math.isnan(value):
            return False
        better = [kept for kept in self._kept if kept.order <= self._best.order(value)]
        return len(better) < self._best.count


def _metric_of_best(metadata: Mapping[str, str], name: str) -> float | None:
    """The metric of a checkpoint that was pinned for being the best; None for others."""
    try:
        trainer = json.loads(metadata[TRAINER_KEY])
        return float(trainer["metrics"][name]) if trainer.get(PINNED_KEY) == "best" else None
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
