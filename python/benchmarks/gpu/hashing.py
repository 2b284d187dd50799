"""The code that hashes chunks on a GPU, run by itself: what the engine embeds, without the engine."""

from __future__ import annotations

import ctypes
import statistics
from pathlib import Path
from typing import Any

import torch

_NAME = b"pccheck_hash_chunks"
#: of hash.cu
_THREADS = 288
_HASH_BYTES = 16
_MIB = 1 << 20
#: bytes of a chunk, and how many: many of the usual size, small ones, and so few that most of the GPU has nothing to do
SHAPES = [(_MIB, 4096), (64 << 10, 1 << 16), (4 * _MIB, 1024), (4 * _MIB, 16), (4 * _MIB, 1)]


def _ptx() -> bytes:
    """Where scripts/gpu has put it, or where it is in the repository."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent, here.parents[2] / "src" / "cuda" / "kernels"):
        if (folder / "hash.ptx").exists():
            return (folder / "hash.ptx").read_bytes() + b"\0"
    raise FileNotFoundError(f"hash.ptx is not in {here.parent}")


class Kernel:
    """Loaded into the context that torch uses."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.cuLaunchKernel.argtypes = (
            [ctypes.c_void_p]
            + [ctypes.c_uint] * 7
            + [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
        )
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), _ptx())
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, _NAME)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {code} {(text.value or b'').decode()}")

    def hash(self, chunks: torch.Tensor, chunk_bytes: int, out: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Enqueues the hashing of all chunks of a tensor of bytes; ``out`` has room for a hash of each."""
        count = chunks.numel() // chunk_bytes
        values = [ctypes.c_uint64(value) for value in (chunks.data_ptr(), chunk_bytes, count, out.data_ptr())]
        places = (ctypes.c_void_p * 4)(*[ctypes.addressof(value) for value in values])
        self._call("cuLaunchKernel", self._function, count, 1, 1, _THREADS, 1, 1, 0, stream.cuda_stream, places, None)


def room_for(chunk_bytes: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of random bytes, and room for their hashes and one more, which must stay as it is."""
    chunks = torch.randint(0, 256, (count * chunk_bytes,), dtype=torch.uint8, device="cuda")
    return chunks, torch.full((_HASH_BYTES * (count + 1),), 0xA5, dtype=torch.uint8, device="cuda")


def hashing(rounds: int) -> list[dict[str, Any]]:
    """Seconds of the GPU per launch, by shape."""
    kernel, stream, found = Kernel(), torch.cuda.Stream(), []
    for chunk_bytes, count in SHAPES:
        chunks, out = room_for(chunk_bytes, count)
        torch.cuda.synchronize()
        seconds = []
        for _ in range(3 * rounds + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            kernel.hash(chunks, chunk_bytes, out, stream)
            end.record(stream)
            stream.synchronize()
            seconds.append(begin.elapsed_time(end) / 1000)
        # The first two are warm-up.
        speed = count * chunk_bytes / statistics.median(seconds[2:])
        found.append({"chunk_bytes": chunk_bytes, "count": count, "bytes_per_second": speed})
        del chunks, out
    return found
