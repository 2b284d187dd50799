"""PCcheck: persistent concurrent checkpointing for ML training.

A :class:`Store` is an open region: the file or device that holds the checkpoints of one training rank. State goes from
the caller's arrays through a bounded staging pool to the medium, with several saves in flight; the newest complete
checkpoint is published atomically, and what is restored is byte for byte what was saved.

For PyTorch training loops see :class:`pccheck.torch.Checkpointer`, which makes, sizes and grows the region by itself.

>>> import numpy, pccheck, tempfile, os
>>> path = os.path.join(tempfile.mkdtemp(), "region.pccheck")
>>> state = {"weights": numpy.ones((4, 4), "float32")}
>>> pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
>>> with pccheck.Store(path) as store:
...     save = store.save(step=1, tensors=state)
...     save.copied()                       # the arrays may change again
...     generation = save.durable().generation
...     with store.open() as checkpoint:
...         float(checkpoint["weights"].sum())
16.0
"""

from __future__ import annotations

from . import errors
from ._abi import abi, lib, string
from .checkpoint import Checkpoint, CheckpointInfo, TensorInfo
from .errors import PccheckError, StateMismatch, UnsupportedValue
from .region import format_region, grow_region, payload_bytes
from .save import Durable, Progress, RawSave, Save
from .store import Got, Stats, Store, Verified

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "Durable",
    "Got",
    "PccheckError",
    "Progress",
    "RawSave",
    "Save",
    "StateMismatch",
    "Stats",
    "Store",
    "TensorInfo",
    "UnsupportedValue",
    "Verified",
    "abi",
    "errors",
    "format_region",
    "grow_region",
    "payload_bytes",
]

__version__: str = string(lib.pcc_version())
