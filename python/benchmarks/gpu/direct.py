"""GPUDirect Storage: cuFile writes bytes of GPU memory to a file, beside a save of the same bytes, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.cuda.gds import GdsFile, gds_deregister_buffer, gds_register_buffer

import pccheck

_BLOCK_BYTES = 4096
#: the kernel module without which cuFile itself copies through host memory
_NVIDIA_FS = Path("/proc/driver/nvidia-fs/version")
_PROBE = """
import os, sys, torch
from torch.cuda.gds import GdsFile, gds_register_buffer
block = torch.ones(4096, dtype=torch.uint8, device="cuda").untyped_storage()
gds_register_buffer(block)
GdsFile(sys.argv[1], os.O_RDWR | os.O_CREAT).save_storage(block)
"""
_PROBE_SECONDS = 60


def _trouble(folder: str) -> str | None:
    """Why cuFile does not work for files there. Asked in a process of its own: without a driver it spins for ever."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE, f"{folder}/probe"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"nothing came of it within {_PROBE_SECONDS} s"
    said = probe.stderr.strip() or f"exit status {probe.returncode}"
    return said.splitlines()[-1] if probe.returncode else None


def direct(folder: Path, state_bytes: int, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Seconds of each way until the bytes are durable; ``error`` where cuFile does not work here."""
    nbytes = -(-state_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
    flat = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    found: dict[str, Any] = {"bytes": nbytes, "nvidia_fs": _NVIDIA_FS.exists(), "rounds": []}
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=folder) as own:
        if trouble := _trouble(own):
            return found | {"error": trouble}
        gds_register_buffer(flat.untyped_storage())
        file = GdsFile(f"{own}/direct", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(file.fd, 0, nbytes)
        region = Path(own) / "region.pcc"
        pccheck.format_region(region, slots=3, payload_bytes=pccheck.payload_bytes({"state": flat}))
        # All bytes are written each time: so does cuFile.
        with pccheck.Store(region, durability="process", rewrite_every=1) as store:
            for index in range(rounds + 1):
                began = time.perf_counter()
                file.save_storage(flat.untyped_storage())
                os.fsync(file.fd)
                written = time.perf_counter()
                store.save(index, {"state": flat}).durable()
                found["rounds"].append({"cufile": written - began, "save": time.perf_counter() - written})
        gds_deregister_buffer(flat.untyped_storage())
        del file
    return found | {"rounds": found["rounds"][1:]}
