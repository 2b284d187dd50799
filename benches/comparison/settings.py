"""What a worker is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One process."""

    system: str
    folder: str
    state_bytes: int
    #: the first and the later ones; 0: do not measure, but probe whether it copies, syncs and verifies
    saves: int
    seed: int
