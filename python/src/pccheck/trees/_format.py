"""What writer and reader of trees agree on: version, limit, names in the text, and how places are shown."""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

VERSION = 1
"""Version of the encoding: the value of `pccheck.tree` in the text."""

DEPTH_LIMIT = 100
"""Containers that may be inside each other. State dicts have about ten; JSON readers, which need stack for
each level, must manage twice this number with what the caller's own calls left of it."""

VERSION_MEMBER = "pccheck.tree"
ROOT_MEMBER = "root"
TAG = "$"

KINDS = frozenset({"torch", "parameter", "numpy", "array"})
"""Kinds of tensors."""

FACTORIES: dict[str, type] = {"list": list, "dict": dict, "int": int, "float": float, "str": str, "set": set}
"""The factories with which a defaultdict can be stored, besides None."""

PATHS: dict[str, type[pathlib.PurePath]] = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "PosixPath": pathlib.PosixPath,
    "WindowsPath": pathlib.WindowsPath,
}

NUMPY_SCALAR = re.compile(
    r"\|[biu]1|<[iuf][248]|<c(8|16)|<[mM]8(\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
"""The dtypes of numpy scalars that are stored by their bytes: those that mean the same on every machine."""

_SHOWN_CHARACTERS = 400


def loaded(package: str) -> Any:
    """The package if something imported it already, else None: without it no value can be of its types."""
    return sys.modules.get(package)


def shown_value(value: Any) -> str:
    """A value as messages show it, whatever its own type does: long integers, too, have no decimal text."""
    try:
        return repr(value)
    except Exception:  # the message is about another fault, which must not be hidden
        return f"<{type(value).__name__}>"


def show_path(prefix: str, path: Sequence[Any]) -> str:
    """The place that `path` leads to, as a reader would write it: `optimizer.param_groups[0]['lr']`."""
    shown = prefix
    dotted = True
    for key in path:
        dotted = dotted and type(key) is str and key.isidentifier()
        if dotted:
            shown += f".{key}" if shown else key
        else:
            shown += f"[{shown_value(key)}]"
    if len(shown) > _SHOWN_CHARACTERS:
        half = _SHOWN_CHARACTERS // 2
        shown = f"{shown[:half]} ... {shown[-half:]}"
    return shown or "the root of the state"
