"""What a system really does, tried instead of believed: does it copy, does it verify?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import durability
from .settings import Settings
from .state import State
from .systems import entry_of
from .systems.base import System

#: a part of the state that is looked for in the files
PATTERN_BYTES = 64
#: read at a time
BLOCK_BYTES = 16 << 20


def probe(settings: Settings) -> dict[str, Any]:
    """Changes the state as soon as the trainer may; then flips one stored bit. What is restored tells."""
    folder = Path(settings.folder)
    kind = entry_of(settings.system).load()
    state = kind.state_class(settings.state_bytes, settings.seed)
    system = kind(folder, state)
    system.open()
    for step in (1, 2):
        if step == 2:
            state.change()
        system.changed()
        system.save(step)
        if step == 1:
            system.wait()
    state.change()
    system.wait()
    system.close()
    # The same values again, of which the first two saves were made.
    saved = kind.state_class(settings.state_bytes, settings.seed)
    saved.change()
    step, restored = _restore(kind, folder, saved, 2)
    torn = saved.differing(restored) if step == 2 else len(saved.tensors)
    return {"copied": torn == 0, "immutable": state.immutable, "damage": _damage(kind, folder, saved)}


def _restore(kind: type[System], folder: Path, state: State, step: int) -> tuple[int, Any]:
    durability.drop_cache(folder)
    system, target = kind(folder, state), state.target()
    system.reopen()
    try:
        return system.restore(step, target)
    finally:
        system.close()


def _damage(kind: type[System], folder: Path, saved: State) -> str:
    """What a restore does when one bit of the newest checkpoint is not what was written."""
    tensors = list(saved.tensors.values())
    content = np.asarray(tensors[len(tensors) // 2]).reshape(-1).view(np.uint8)
    middle = len(content) // 2
    if not _flip(folder, content[middle : middle + PATTERN_BYTES].tobytes()):
        return "not tried: the state's bytes are not in its files as they are"
    try:
        step, restored = _restore(kind, folder, saved, 2)
    except Exception as why:
        # Each library has exceptions of its own.
        return f"refused: {type(why).__name__}"
    if step != 2:
        return "refused: an older checkpoint was restored"
    return "restored unnoticed" if saved.differing(restored) else "not tried: what was damaged was not read"


def _flip(folder: Path, pattern: bytes) -> bool:
    for path in sorted(durability.files(folder)):
        with path.open("r+b") as file:
            at, kept = 0, b""
            while block := file.read(BLOCK_BYTES):
                found = (kept + block).find(pattern)
                if found >= 0:
                    where = at - len(kept) + found
                    file.seek(where)
                    file.write(bytes([pattern[0] ^ 1]))
                    file.flush()
                    durability.sync_file(path)
                    return True
                at += len(block)
                kept = block[-PATTERN_BYTES:]
    return False
