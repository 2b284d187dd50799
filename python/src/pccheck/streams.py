"""CUDA streams of torch: which one a save comes after, and which ones wait for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from . import errors

__all__ = ["joined", "of_device", "synchronize"]


def of_device(gpu: int, stream: Any = None) -> int:
    """The handle of a stream: torch's current one of that device where none is given."""
    if stream is None:
        return int(_torch().cuda.current_stream(gpu).cuda_stream)
    handle = getattr(stream, "cuda_stream", stream)
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise errors.InvalidArgument(
            f"stream={stream!r}: expected a torch.cuda.Stream, the number of a CUDA stream, or None"
        )
    return handle


def joined(gpus: Sequence[int], stream: Any = None) -> int:
    """The handle of one stream that comes after everything that tensors on these devices depend on: the given one, or
    the current one of the first device, which is made to wait for those of the others."""
    if stream is None and len(gpus) > 1:
        cuda = _torch().cuda
        first = cuda.current_stream(gpus[0])
        for other in gpus[1:]:
            first.wait_stream(cuda.current_stream(other))
    return of_device(gpus[0], stream)


def synchronize(gpus: Sequence[int]) -> None:
    """Waits until torch's current streams of these devices are done: what they work on may then be written to."""
    for gpu in gpus:
        _torch().cuda.current_stream(gpu).synchronize()


def _torch() -> Any:
    # Only tensors of torch are on GPUs here.
    return sys.modules["torch"]
