"""Trains a small GPT-2 with the Trainer, saving every step; run it again, or kill it first, and it resumes."""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from pccheck.huggingface import RegionCallback


class Bytes(torch.utils.data.Dataset):
    """Pieces of this file."""

    text = torch.tensor(list(Path(__file__).read_bytes()))

    def __len__(self):
        return len(self.text) // 64

    def __getitem__(self, i):
        piece = self.text[64 * i : 64 * i + 64]
        return {"input_ids": piece, "labels": piece}


region = sys.argv[1] if len(sys.argv) > 1 else "huggingface.pccheck"
torch.manual_seed(0)
config = GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
args = TrainingArguments(output_dir=f"{region}.out", max_steps=40, save_strategy="no", logging_steps=5, report_to=[])

callback = RegionCallback(region, every=1, max_in_flight=2)
trainer = Trainer(model=GPT2LMHeadModel(config), args=args, train_dataset=Bytes(), callbacks=[callback])
trainer.train(resume_from_checkpoint=callback.resume_folder())
