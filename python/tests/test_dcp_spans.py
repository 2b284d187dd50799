"""Prevents: a resharding load that reads the wrong bytes of a stored shard, some twice, or too many at once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from pccheck.dcp._read import _part, _split, spans  # noqa: E402

Sizes = tuple[int, ...]


def fill(stored: torch.Tensor, offsets: Sizes, lengths: Sizes, limit: int, split: bool) -> torch.Tensor:
    flat = stored.reshape(-1)
    target = torch.full(lengths, -1, dtype=stored.dtype)
    times = torch.zeros(lengths, dtype=torch.int32)
    pieces = list(spans(stored.shape, offsets, lengths, limit))
    if split:
        pieces = [part for piece in pieces if piece.whole for part in _split(piece, limit)]
    for span in pieces:
        if not span.whole or split:
            assert span.count <= max(limit, 1)
        found = flat[span.first : span.first + span.count].reshape(span.shape)
        for dimension, (offset, length) in enumerate(zip(span.offsets, span.lengths, strict=True)):
            found = found.narrow(dimension, offset, length)
        _part(target, span).copy_(found)
        _part(times, span).add_(1)
    if pieces:
        assert times.min() == times.max() == 1
    return target


def boxes(seed: int, count: int) -> Iterator[tuple[Sizes, Sizes, Sizes, int]]:
    chance = random.Random(seed)
    for _ in range(count):
        shape = tuple(chance.randint(1, 6) for _ in range(chance.randint(0, 4)))
        offsets = tuple(chance.randint(0, size - 1) for size in shape)
        lengths = tuple(chance.randint(1, size - offset) for size, offset in zip(shape, offsets, strict=True))
        yield shape, offsets, lengths, chance.randint(1, 40)


@pytest.mark.parametrize("seed", range(4))
def test_every_box_of_every_shape_is_filled_once(seed: int) -> None:
    for shape, offsets, lengths, limit in boxes(seed, 200):
        stored = torch.arange(torch.Size(shape).numel()).reshape(shape)
        expected = stored[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
        assert torch.equal(fill(stored, offsets, lengths, limit, False), expected), (shape, offsets, lengths, limit)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_wanted_whole_but_not_in_place_is_split(seed: int) -> None:
    for shape, _, _, limit in boxes(seed, 200):
        stored = torch.arange(torch.Size(shape).numel()).reshape(shape)
        assert torch.equal(fill(stored, (0,) * len(shape), shape, limit, True), stored), (shape, limit)


def test_nothing_is_read_for_nothing() -> None:
    for shape in itertools.product((0, 2), repeat=2):
        if 0 in shape:
            assert list(spans(shape, (0, 0), shape, 10)) == []
