"""Names of tensors: the readable path to each, made unique and fit for the engine."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from ._format import shown_value

NAME_LIMIT_BYTES = 4096
"""The engine's limit on a tensor's name, in bytes of UTF-8."""

_BYTES_FOR_SUFFIX = 64
_LONG_INT = 1 << 64  # Python converts very long integers to hexadecimal digits only
_RESERVED_PREFIX = "pccheck."
_RESERVED_NAME = "__metadata__"


def _part(key: Any) -> str:
    """How a key reads in a name. Equal trees give equal names, so sets, which have no order, are sorted."""
    if type(key) is str:
        return key
    if type(key) is int:
        return str(key) if -_LONG_INT < key < _LONG_INT else hex(key)
    if type(key) is tuple:
        return f"({','.join(map(_part, key))})"
    if type(key) is frozenset:
        return f"{{{','.join(sorted(map(_part, key)))}}}"
    return shown_value(key)


class Names:
    """Gives out the names of one tree's tensors, each once."""

    def __init__(self, prefix: str) -> None:
        self._root = f"{prefix}." if prefix else ""
        self._given: set[str] = set()
        self._last_number: dict[str, int] = {}
        #: how many names were not to be had and got another number
        self.numbered = 0
        #: the last container, as its path and as its part of a name: what is named stands side by side
        self._container: list[Any] = []
        self._head = self._root

    def head(self, path: list[Any]) -> str:
        """What the names of all that is in the container at `path` begin with."""
        if not path:
            return self._root
        container = path[:-1]
        if container != self._container:
            self._container = container
            self._head = self._root + "".join([f"{_part(key)}." for key in container])
        return f"{self._head}{_part(path[-1])}."

    def name(self, path: list[Any]) -> str:
        """A name for the tensor at `path`: fit for the engine, and not given before."""
        # At the root there is the prefix alone.
        base = self.head(path)[:-1].replace("\0", "_") or "tensor"
        if base.startswith(_RESERVED_PREFIX) or base == _RESERVED_NAME:
            base = f"_{base}"
        if len(base) * 4 > NAME_LIMIT_BYTES:
            base = _shortened(base)
        name = base
        while name in self._given:
            number = self._last_number.get(base, 1) + 1
            self._last_number[base] = number
            self.numbered += 1
            name = f"{base}#{number}"
        self._given.add(name)
        return name

    def take(self, names: list[str]) -> bool:
        """Gives these names, which an equal tree got without numbers; False, and gives none, where one was given
        already."""
        if not self._given.isdisjoint(names):
            return False
        self._given.update(names)
        return True


def _shortened(name: str) -> str:
    """`name` itself if it leaves room for a number, else its start and a hash of all of it."""
    text = name.encode()
    head_bytes = NAME_LIMIT_BYTES - _BYTES_FOR_SUFFIX
    if len(text) <= head_bytes:
        return name
    head = text[:head_bytes].decode(errors="ignore")
    return f"{head}#{blake2b(text, digest_size=16).hexdigest()}"
