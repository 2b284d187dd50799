"""PyTorch: checkpoint a training run every few iterations, and resume it bit for bit, in three lines.

See :class:`Checkpointer`.
"""

from __future__ import annotations

from .checkpointer import Checkpointer
from .outcomes import CheckpointWarning
from .restoring import TREE_KEY, restore
from .retention import Best

__all__ = ["TREE_KEY", "Best", "CheckpointWarning", "Checkpointer", "restore"]
