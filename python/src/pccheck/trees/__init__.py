"""Nested Python values, such as state dicts, as one JSON text and an ordered list of named tensors.

`flatten` takes a tree of containers, scalars and tensors apart; `unflatten` puts it together again, every
value of the type and with the bits that it had. No pickle: reading a tree runs nothing that the tree names,
so a tree from an untrusted file can at worst be refused. What cannot be represented exactly is refused when
it is written, naming its place. The encoding is specified in `docs/trees.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._decode import Decoder
from ._encode import Encoder, Known
from ._format import DEPTH_LIMIT, VERSION

__all__ = ["DEPTH_LIMIT", "VERSION", "Flat", "Known", "flatten", "unflatten"]


@dataclass(frozen=True)
class Flat:
    """A tree taken apart.

    `json` is valid UTF-8 without a NUL, so it can be a value of a checkpoint's metadata. `tensors` holds the
    tree's tensors by name, in the order in which they were met; each is the very object that the tree holds,
    neither copied nor converted.
    """

    json: str
    tensors: dict[str, Any]


def flatten(
    tree: Any, *, is_tensor: Callable[[Any], bool] | None = None, prefix: str = "", known: Known | None = None
) -> Flat:
    """Takes `tree` apart into a JSON text and named tensors.

    Tensors are `torch.Tensor`, `torch.nn.Parameter` and numpy arrays of numbers; `is_tensor` is asked about
    every value of a type that the encoding does not know, and makes it a tensor by answering True. Tensor
    names are the readable path of keys, such as `layers.0.weight`; `prefix`, where given, comes first, with a
    dot, here and in the places that errors name. Names are unique within one call only: trees that go into
    one checkpoint need prefixes of which none is another's start. An object that occurs twice is written
    twice: containers come back as copies of each other, a tensor gets a name for each occurrence.

    `known` makes it faster to flatten a tree again and again, or trees that hardly differ: what they have in common
    is kept in it, but no tensor. It changes nothing else, whatever the trees are; one thread at a time may use it.

    Raises `UnsupportedValue` for a value that would not come back as it was, for a container that contains
    itself, and for more than `DEPTH_LIMIT` containers inside each other. The tree is not changed.
    """
    encoder = Encoder(is_tensor, prefix, known)
    return Flat(encoder.text(tree), encoder.tensors)


def unflatten(json: str, tensors: Callable[[str, str], Any]) -> Any:
    """Puts together the tree that `flatten` described in `json`.

    `tensors` is called once per tensor, in the order of the text, with its name and its kind: `"torch"`,
    `"parameter"`, `"numpy"`, or `"array"` for what only `is_tensor` knew. What it returns is put in the
    tensor's place, and what it raises is passed on. Where a text turns out to be damaged half-way, it has
    been called for the tensors before.

    The text may come from anyone: anything but a tree raises `Corrupt`, naming the place. A tree that holds
    numpy scalars or torch's own values raises `UnsupportedValue` where that package has not been imported.
    """
    return Decoder(tensors).tree(json)
