"""DCP saves to regions in the background, and resumes: torchrun --nproc-per-node 2 dcp_example.py FOLDER, or python."""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from pccheck.dcp import RegionReader, RegionWriter

folder, first, saving, group = sys.argv[1], 0, None, None
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")  # saves in the background must not mix with the model's collectives
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(model.parameters())
if RegionReader.validate_checkpoint_id(folder):
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, storage_reader=RegionReader(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    first = state["step"] + 1
writer = RegionWriter(folder, cache_staged_state_dict=True)
for step in range(first, first + 10):
    loss = model(torch.randn(32, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    saving is None or saving.result()  # the one before is durable
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": step}
    saving = dcp.async_save(state, storage_writer=writer, process_group=group)
saving.result()
if dist.is_initialized():
    dist.destroy_process_group()
print(f"steps {first} to {step} done, loss {loss.item():.4f}")
