"""The file ``.metadata`` of a DCP folder, which is a pickle: read without running anything that it holds.

Only names of an explicit table mean anything. Those that stand for classes written in Python give private stand-ins
that cannot be changed: a pickle may set attributes of all that it can name.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

__all__ = ["read"]

_MODULE = "torch.distributed.checkpoint.metadata"


class _Sealed(type):
    """A class whose attributes stay as they were defined."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{cls.__name__}.{name} is not to be set")

    def __delattr__(cls, name: str) -> None:
        raise pickle.UnpicklingError(f"{cls.__name__}.{name} is not to be removed")


class _ChunkStorageMetadata(metadata.ChunkStorageMetadata, metaclass=_Sealed):
    pass


class _TensorStorageMetadata(metadata.TensorStorageMetadata, metaclass=_Sealed):
    pass


class _BytesStorageMetadata(metadata.BytesStorageMetadata, metaclass=_Sealed):
    pass


class _Metadata(metadata.Metadata, metaclass=_Sealed):
    pass


class _MetadataIndex(metadata.MetadataIndex, metaclass=_Sealed):
    pass


class _StorageMeta(metadata.StorageMeta, metaclass=_Sealed):
    pass


class _StorageInfo(filesystem._StorageInfo, metaclass=_Sealed):
    pass


class _TensorProperties(metadata.TensorProperties, metaclass=_Sealed):
    def __setstate__(self, state: Any) -> None:
        encoded = metadata._MEM_FORMAT_ENCODING
        decoded = tuple(encoded(part.value) if type(part) is _MemoryFormat else part for part in state)
        super().__setstate__(decoded)  # type: ignore[no-untyped-call, unused-ignore]


class _MemoryFormat(metaclass=_Sealed):
    """torch's own members could be changed by whoever can name them."""

    def __init__(self, value: int) -> None:
        self.value = value


class _Layout(metaclass=_Sealed):
    """Gives the layout of a name, as ``torch.serialization._get_layout``, which is a function and can be changed."""

    def __new__(cls, name: str) -> Any:
        layout = vars(torch).get(name.removeprefix("torch."))
        if not isinstance(layout, torch.layout):
            raise pickle.UnpicklingError(f"{name!r:.80} is not a layout of torch")
        return layout


class _Path(metaclass=_Sealed):
    """Gives a path as text."""

    def __new__(cls, *parts: str) -> Any:
        return "/".join(parts)


_KNOWN: dict[tuple[str, str], Any] = {
    (_MODULE, "ChunkStorageMetadata"): _ChunkStorageMetadata,
    (_MODULE, "TensorStorageMetadata"): _TensorStorageMetadata,
    (_MODULE, "BytesStorageMetadata"): _BytesStorageMetadata,
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "MetadataIndex"): _MetadataIndex,
    (_MODULE, "TensorProperties"): _TensorProperties,
    (_MODULE, "StorageMeta"): _StorageMeta,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch.serialization", "_get_layout"): _Layout,
    # Types written in C cannot be changed.
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    **{
        (module, name): _Path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath")
    },
}


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what torch writes to ``.metadata``."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a DCP folder's metadata")


def read(path: Path) -> metadata.Metadata:
    """What the file holds; raises whatever an unpickler does of one that is damaged, or holds something else."""
    with path.open("rb") as file:
        found = _Unpickler(file).load()
    if not isinstance(found, metadata.Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, expected Metadata")
    if isinstance(found.storage_data, dict):
        # torch looks entries up by keys that equal those of its own class only.
        found.storage_data = {
            metadata.MetadataIndex(key.fqn, key.offset, key.index): info for key, info in found.storage_data.items()
        }
    return found
