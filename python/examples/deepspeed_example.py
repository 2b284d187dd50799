"""DeepSpeed: train, save, and resume in a second engine. Usage: deepspeed [--num_gpus N] deepspeed_example.py FOLDER

On a machine without accelerators: DS_ACCELERATOR=cpu python deepspeed_example.py FOLDER
"""

import os
import sys

import deepspeed
import torch

from pccheck.deepspeed import RegionCheckpointEngine

ONE_PROCESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {**ONE_PROCESS, **os.environ}

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}


def engine_for(model):
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    engine.checkpoint_engine = RegionCheckpointEngine()
    return engine


folder = sys.argv[1]
engine = engine_for(torch.nn.Linear(8, 1))
for step in range(10):
    loss = engine(torch.randn(16, 8, device=engine.device)).pow(2).mean()
    engine.backward(loss)
    engine.step()
    if (step + 1) % 5 == 0:
        engine.save_checkpoint(folder, client_state={"step": step})
resumed = engine_for(torch.nn.Linear(8, 1))
path, client_state = resumed.load_checkpoint(folder)
print("resumed from", path, "at step", client_state["step"])
