"""A small model that was trained, and warnings that must be expected: for the tests of restoring."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from states_samples import train
from torch import nn

import pccheck.torch


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))


def inputs(step: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trained(seed: int = 0, make: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> tuple[Any, Any]:
    model = net(seed)
    optimizer = make(model)
    for step in range(2):
        train(model, optimizer, inputs(step))
    return model, optimizer


@pytest.fixture(autouse=True)
def no_other_warnings() -> Iterator[None]:
    """What is not expected is not to be overlooked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=pccheck.torch.CheckpointWarning)
        yield
