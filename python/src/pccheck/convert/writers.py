"""Makes checkpoints of any kind of what a reader found. Each is whole and durable, or absent."""

from __future__ import annotations

import json
import time
from pathlib import Path

from .. import files
from ..region import format_region, payload_bytes
from ..save import Save
from ..store import Store
from .kinds import Kind
from .progress import Progress
from .readers import STEP_KEY, Found

__all__ = ["write"]

_BLOCK_BYTES = 16 << 20
_POLL_SECONDS = 0.05
_HEADER_ALIGN_BYTES = 4096


def write(found: Found, destination: Path, kind: Kind, *, slots: int, replace: bool, progress: Progress) -> None:
    """Makes ``destination``.

    ``replace=False``: what has appeared there meanwhile is not replaced (:class:`FileExistsError`).
    """
    files.make_folders(destination.parent)
    try:
        if kind is Kind.DCP:
            from . import dcp_folders

            with files.replaced_folder(destination, replace=replace) as folder:
                dcp_folders.write(folder, found.state, found.flat, found.metadata, found.step)
            return
        with files.replaced_file(destination, replace=replace) as beside:
            if kind is Kind.REGION:
                _write_region(found, beside, slots, progress)
            elif kind is Kind.TORCH:
                from . import torch_files

                torch_files.write(beside, found.state, found.tensor_bytes, progress)
            elif found.checkpoint is not None:
                _write_payload(found, beside, progress)
            else:
                _write_through_region(found, beside, progress)
    finally:
        progress.end()


def _write_region(found: Found, path: Path, slots: int, progress: Progress) -> None:
    from ..torch.restoring import TREE_KEY

    flat = found.flat
    metadata = {**found.metadata, TREE_KEY: flat.json}
    needed = payload_bytes(flat.tensors, metadata)
    format_region(path, slots=slots, payload_bytes=needed)
    with Store(path, durability="process", max_in_flight=1, keep=1) as store:
        progress.begin("saving", needed)
        save = store.save(found.step, flat.tensors, metadata, timeout=None)
        _follow(save, progress)
        save.durable()


def _follow(save: Save, progress: Progress) -> None:
    while not save.done():
        time.sleep(_POLL_SECONDS)
        progress.advance(save.progress().written_bytes)
    progress.advance(save.progress().written_bytes)


def _write_payload(found: Found, path: Path, progress: Progress) -> None:
    """A checkpoint's payload is a safetensors file: it is copied, and verified on the way. The step is noted in it."""
    checkpoint = found.checkpoint
    assert checkpoint is not None
    total = checkpoint.info.payload_bytes
    progress.begin("copying", total)
    length = bytearray(8)
    checkpoint.read_payload(0, length)
    header = bytearray(int.from_bytes(length, "little"))
    checkpoint.read_payload(8, header)
    begin = 8 + len(header)
    with path.open("wb") as file:
        file.write(_with_step(header, found.step))
        block = bytearray(min(_BLOCK_BYTES, total - begin))
        for offset in range(begin, total, _BLOCK_BYTES):
            piece = memoryview(block)[: min(_BLOCK_BYTES, total - offset)]
            checkpoint.read_payload(offset, piece)
            file.write(piece)
            progress.advance(offset + len(piece))


def _with_step(header: bytearray, step: int) -> bytes:
    """The header of a safetensors file, its length first; tensor offsets count from its end, so it may grow."""
    members = json.loads(header)
    noted = {"__metadata__": {STEP_KEY: str(step), **members.get("__metadata__", {})}}
    text = json.dumps({**noted, **{name: member for name, member in members.items() if name not in noted}}).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def _write_through_region(found: Found, path: Path, progress: Progress) -> None:
    """The engine knows how a state becomes a safetensors file: a region is made, and its payload copied."""
    region = path.with_name(path.name + ".region")
    try:
        _write_region(found, region, 2, progress)
        with Store(region, read_only=True, durability="process") as store, store.open(verify=False) as checkpoint:
            _write_payload(Found(step=found.step, checkpoint=checkpoint), path, progress)
    finally:
        region.unlink(missing_ok=True)
