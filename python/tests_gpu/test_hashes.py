"""The code that hashes chunks on a GPU gives the hashes that everyone else computes. Needs the package xxhash."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import xxhash

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "benchmark"), str(HERE.parent / "benchmarks" / "gpu")]
from hashing import Kernel, room_for  # noqa: E402

KIB = 1 << 10
#: around what a thread block adds up at a time, and the usual size
SIZES = [4, 8, 12, 60, 64, 68, 128, 196, 1024, 1028, 4096]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel()


def wrong(kernel: Kernel, chunk_bytes: int, count: int) -> list[int]:
    stream = torch.cuda.Stream()
    chunks, out = room_for(chunk_bytes, count)
    torch.cuda.synchronize()
    kernel.hash(chunks, chunk_bytes, out, stream)
    stream.synchronize()
    hashes, data = bytes(out.cpu().numpy()), memoryview(chunks.cpu().numpy())
    assert hashes[16 * count :] == b"\xa5" * 16, "beside the hashes"
    right = (xxhash.xxh3_128_intdigest(data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes))
    found = (int.from_bytes(hashes[at : at + 16], "little") for at in range(0, 16 * count, 16))
    return [at for at, (one, other) in enumerate(zip(right, found, strict=True)) if one != other]


@pytest.mark.parametrize("kib", SIZES)
def test_hashes_are_right_at_every_size(kernel, kib):
    for count in (1, 3, 40):
        assert wrong(kernel, kib * KIB, count) == []


def test_there_may_be_more_chunks_than_most_dimensions_of_a_grid_take(kernel):
    assert wrong(kernel, 4 * KIB, 70_000) == []


def test_a_first_launch_waits_for_no_other_stream():
    """The pump must not be held up by a stream of the program."""
    kernel, stream, busy = Kernel(), torch.cuda.Stream(), torch.cuda.Stream()
    chunks, out = room_for(4 * KIB, 1)
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(1_500_000_000)
    kernel.hash(chunks, 4 * KIB, out, stream)
    stream.synchronize()
    assert not busy.query()
    busy.synchronize()
