"""Lightning: train, stop, and go on from the last checkpoint. Usage: lightning_example.py FOLDER"""

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pccheck.lightning import RegionCheckpointIO


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(8, 1)

    def training_step(self, batch, _):
        loss = (self.model(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def trainer(folder, epochs):
    checkpoints = ModelCheckpoint(folder, filename="{step}", monitor="loss", save_top_k=2, save_last=True)
    return Trainer(max_epochs=epochs, callbacks=[checkpoints], plugins=[RegionCheckpointIO()], accelerator="cpu",
                   logger=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip


folder = sys.argv[1]
batches = torch.utils.data.DataLoader(torch.randn(64, 8, generator=torch.manual_seed(1)), batch_size=16)
trainer(folder, 2).fit(Regression(), batches)
resumed = trainer(folder, 4)
resumed.fit(Regression(), batches, ckpt_path="last")
print("resumed and trained to step", resumed.global_step)
