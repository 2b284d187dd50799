"""torch's checkpoint metadata as JSON, exactly, and what the metadata region says of each published checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .. import errors, trees

__all__ = ["Part", "Published", "Stored", "decode", "encode", "published_texts"]

FORMAT = "pccheck.dcp"
VERSION = 1
#: name of the tensor that holds the JSON in the metadata region
DOCUMENT = "metadata.json"

# Keys of a metadata checkpoint's texts: what set-up and completeness need, without reading the document.
_FORMAT_KEY = "dcp.format"
_SEQUENCE_KEY = "dcp.sequence"
_STEP_KEY = "dcp.step"
_SAVE_KEY = "dcp.save_id"
_PARTS_KEY = "dcp.parts"

_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
    "preserve_format": torch.preserve_format,
}


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share of a published checkpoint: where it is, and how to know that it is that one."""

    #: file name of the region in the folder
    region: str
    generation: int
    #: random text, stored in the rank's checkpoint too: a region made anew uses its generations again
    token: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Where the bytes of one item of a plan are; the values of ``Metadata.storage_data``."""

    part: Part
    #: name of the tensor in the rank's checkpoint, and the item's first byte in it
    tensor: str
    offset: int
    nbytes: int
    #: torch's name of the dtype, such as "bfloat16"; None: bytes, not a tensor
    dtype: str | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """One checkpoint of the metadata region."""

    #: generation in the metadata region
    generation: int
    #: counts the saves of the folder; the step of the ranks' checkpoints
    sequence: int
    #: the trainer's step, where it was given
    step: int | None
    save_id: str
    #: region's file name -> part
    parts: Mapping[str, Part]

    @classmethod
    def of(cls, generation: int, texts: Mapping[str, str], path: str) -> Published:
        """From the texts of a metadata checkpoint."""
        found = texts.get(_FORMAT_KEY)
        if found != f"{FORMAT} {VERSION}":
            raise errors.Unsupported(
                f"expected metadata of {FORMAT!r} version {VERSION}, found {found!r}",
                path=path,
                advice="it is not a checkpoint folder of this version of pccheck.dcp",
            )
        try:
            parts = [Part(*part) for part in json.loads(texts[_PARTS_KEY])]
            step = texts.get(_STEP_KEY)
            return cls(
                generation=generation,
                sequence=int(texts[_SEQUENCE_KEY]),
                step=None if step is None else int(step),
                save_id=texts[_SAVE_KEY],
                parts={part.region: part for part in parts},
            )
        except (KeyError, ValueError, TypeError) as why:
            raise _damaged(path, why) from None


def published_texts(sequence: int, step: int | None, save_id: str, parts: Mapping[str, Part]) -> dict[str, str]:
    """The texts from which :meth:`Published.of` reads."""
    texts = {
        _FORMAT_KEY: f"{FORMAT} {VERSION}",
        _SEQUENCE_KEY: str(sequence),
        _SAVE_KEY: save_id,
        _PARTS_KEY: json.dumps([[part.region, part.generation, part.token] for part in parts.values()]),
    }
    if step is not None:
        texts[_STEP_KEY] = str(step)
    return texts


def encode(metadata: Metadata) -> bytes:
    """The metadata as JSON; ``storage_data`` must be of :class:`Stored`.

    Raises:
        UnsupportedValue: a custom planner's ``planner_data`` holds what JSON cannot represent exactly.
    """
    storage: Mapping[MetadataIndex, Stored] = metadata.storage_data
    parts = {stored.part: number for number, stored in enumerate({s.part: s for s in storage.values()}.values())}
    document = {
        "format": FORMAT,
        "version": VERSION,
        "dcp_version": metadata.version,
        "state": {name: _entry(name, entry) for name, entry in metadata.state_dict_metadata.items()},
        "planner_data": _planner_data(metadata.planner_data),
        "parts": [[part.region, part.generation, part.token] for part in parts],
        "stored": [
            [*_index(index), parts[s.part], s.tensor, s.offset, s.nbytes, s.dtype, list(s.shape)]
            for index, s in storage.items()
        ],
        "storage_meta": _storage_meta(metadata.storage_meta),
    }
    return json.dumps(document, separators=(",", ":")).encode()


def decode(text: bytes, path: str) -> Metadata:
    """What :func:`encode` made JSON of.

    Raises:
        Corrupt: it is no such JSON.
    """
    try:
        document = json.loads(text)
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        parts = [Part(*part) for part in document["parts"]]
        metadata = Metadata(
            state_dict_metadata={name: _entry_from(entry) for name, entry in document["state"].items()},
            planner_data=trees.unflatten(document["planner_data"], _no_tensor),
            storage_data={
                MetadataIndex(fqn, offset, index): Stored(parts[part], tensor, first, nbytes, dtype, tuple(shape))
                for fqn, offset, index, part, tensor, first, nbytes, dtype, shape in document["stored"]
            },
            storage_meta=StorageMeta(**document["storage_meta"]) if document["storage_meta"] else None,
        )
        metadata.version = document["dcp_version"]
        return metadata
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as why:
        raise _damaged(path, why) from None


def _damaged(path: str, why: Exception) -> errors.Corrupt:
    return errors.Corrupt(
        f"its metadata is not what pccheck.dcp writes: {type(why).__name__}: {why}", operation="load", path=path
    )


def _planner_data(value: Any) -> str:
    flat = trees.flatten(value, prefix="planner_data")
    for name in flat.tensors:
        raise errors.UnsupportedValue("a planner's data may not hold tensors", at=name)
    return flat.json


def _no_tensor(name: str, kind: str) -> Any:
    raise ValueError(f"planner_data holds a tensor {name!r}")


def _entry(name: str, entry: TensorStorageMetadata | BytesStorageMetadata) -> Any:
    if isinstance(entry, BytesStorageMetadata):
        return None
    p = entry.properties
    memory_format = next((text for text, value in _MEMORY_FORMATS.items() if value == p.memory_format), None)
    if memory_format is None:
        raise errors.UnsupportedValue(f"memory format {p.memory_format} cannot be stored", at=name)
    # Older versions of torch have no strides.
    strides = getattr(p, "strides", None)
    return {
        "dtype": _name(p.dtype),
        "layout": _name(p.layout),
        "requires_grad": p.requires_grad,
        "memory_format": memory_format,
        "pin_memory": p.pin_memory,
        "strides": None if strides is None else [int(stride) for stride in strides],
        "size": list(entry.size),
        "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks],
    }


def _entry_from(entry: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if entry is None:
        return BytesStorageMetadata()
    properties = TensorProperties(
        dtype=_named(entry["dtype"], torch.dtype),
        layout=_named(entry["layout"], torch.layout),
        requires_grad=entry["requires_grad"],
        memory_format=_MEMORY_FORMATS[entry["memory_format"]],
        pin_memory=entry["pin_memory"],
    )
    if entry["strides"] is not None:
        properties.strides = tuple(entry["strides"])
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in entry["chunks"]]
    return TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)


def _index(index: MetadataIndex) -> list[Any]:
    return [index.fqn, None if index.offset is None else list(index.offset), index.index]


def _storage_meta(meta: StorageMeta | None) -> dict[str, Any] | None:
    if meta is None:
        return None
    checkpoint_id = None if meta.checkpoint_id is None else str(meta.checkpoint_id)
    return {"checkpoint_id": checkpoint_id, "save_id": meta.save_id, "modules": list(meta.modules)}


def _name(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")


def _named(name: str, kind: type) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, kind):
        raise ValueError(f"{name!r} is no torch.{kind.__name__} of the installed torch")
    return value


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of :attr:`Stored.dtype`."""
    dtype: torch.dtype = _named(name, torch.dtype)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """How :attr:`Stored.dtype` spells a torch dtype."""
    return _name(dtype)
