"""Random-number generators of Python, numpy and torch, captured so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from .members import Member
from .planning import ReadPlan

__all__ = ["RNG", "RngMember"]

#: its name among the members
RNG = "rng"


class RngMember(Member):
    """The process's global generators: Python's, numpy's, torch's on the CPU and on every CUDA device in use."""

    def __init__(self) -> None:
        super().__init__(RNG, None)

    def state(self) -> Any:
        state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            state["numpy"] = numpy.random.get_state(legacy=False)
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def plan(self, saved: Any, plan: ReadPlan) -> Any:
        return plan.fill(saved, None, self.name)

    def load(self, filled: Any, plan: ReadPlan) -> None:
        self.set_state(filled)

    def set_state(self, filled: Any) -> None:
        """Sets what :meth:`state` gave."""
        random.setstate(filled["python"])
        torch.set_rng_state(filled["torch"])
        if "numpy" in filled:
            import numpy

            numpy.random.set_state(filled["numpy"])
        if "cuda" in filled and torch.cuda.is_available():
            # A resumed run may see fewer devices; each keeps its own sequence.
            for device, state in enumerate(filled["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state, device)
