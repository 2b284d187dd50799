"""GPUDirect Storage: saves until they are durable on a disk, by cuFile and by way of host memory, in turns."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import pccheck
from pccheck import errors

#: the kernel module without which cuFile itself copies through host memory, where it has no other way
_NVIDIA_FS = Path("/proc/driver/nvidia-fs/version")

WAYS: dict[str, dict[str, str]] = {
    "cufile": {"snapshot": "spare", "direct_storage": "required"},
    "spare": {"snapshot": "spare"},
    "pinned": {},
}


def direct(folder: Path, state_bytes: int, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Seconds of each way until the bytes are durable; ``error`` where cuFile does not work here."""
    state = {"state": torch.randint(0, 256, (state_bytes,), dtype=torch.uint8, device=device)}
    found: dict[str, Any] = {"bytes": state_bytes, "nvidia_fs": _NVIDIA_FS.exists(), "rounds": []}
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=folder) as own:
        region = Path(own) / "region.pcc"
        pccheck.format_region(region, slots=2, payload_bytes=pccheck.payload_bytes(state), prewrite=True)
        # All bytes are written each time.
        options: Any = {"durability": "process", "medium": "direct", "max_in_flight": 1, "rewrite_every": 1}
        with pccheck.Store(region, **options) as store:
            # In the first round memory is allocated, and cuFile and its code are loaded.
            for index in range(rounds + 1):
                took = {}
                for name, how in WAYS.items():
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    try:
                        store.save(index, state, timeout=None, **how).durable()  # type: ignore[arg-type]
                    except errors.Unsupported as why:
                        found["error"] = str(why)
                        continue
                    took[name] = time.perf_counter() - began
                found["rounds"].append(took)
            found["direct_bytes"] = store.stats().direct_bytes
    return found | {"rounds": found["rounds"][1:]}
