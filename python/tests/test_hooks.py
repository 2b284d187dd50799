"""Failure prevented: an update that does not wait for the snapshot, or an alarm about one that does.

Whichever way an optimizer is called, its update must wait; what changes without waiting must be found and named; and
nothing that trainers ordinarily do may be taken for such a change. A change without a wait is told by version counters
at the next ``step()``, however fast the copying was, so that these tests do not rely on timing.
"""

# What needs torch is imported once it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import native_threads

pytest.importorskip("torch")
pytest.importorskip("numpy")

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pccheck
from pccheck.torch import Checkpointer, CheckpointWarning

POOL: Any = {"chunk_bytes": 128 << 10, "staging_bytes": 1 << 20, "max_in_flight": 3, "rng": False}
STEPS = 5


def net(width: int = 256) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 8))


def backward(model: nn.Module, i: int) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
    loss: torch.Tensor = model(x).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def iterate(ckpt: Checkpointer, one: Callable[[int], None], *, after: Callable[[int], None] = lambda i: None) -> None:
    """Iterations that must pass without any alarm, each saved and in the end restorable."""
    with warnings.catch_warnings(), ckpt:
        warnings.simplefilter("error", CheckpointWarning)
        for i in range(STEPS):
            one(i)
            assert ckpt.step(i) is not None
            after(i)
        ckpt.wait()
        assert ckpt.failures == 0, ckpt.last_error
        assert ckpt.checkpoints()[0].step == STEPS - 1


# ---- updates that wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        lambda p: torch.optim.Adam(p, foreach=False),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), fused=True),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    ],
    ids=["sgd-foreach", "sgd-fused", "adam-loop", "adamw-fused", "adamw-tensor-lr", "adagrad", "rmsprop"],
)
@pytest.mark.parametrize("to_none", [True, False])
def test_optimizers_wait_by_themselves(tmp_path: Path, make: Any, to_none: bool) -> None:
    """In every implementation, with BatchNorm in training, a schedule, and evaluations between the iterations."""
    model = net()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, scheduler=scheduler, **POOL)

    def one(i: int) -> None:
        optimizer.zero_grad(set_to_none=to_none)
        backward(model, i)
        optimizer.step()
        scheduler.step()

    def evaluate(i: int) -> None:
        model.eval()
        with torch.inference_mode():
            model(torch.ones(4, 8))
        model.train()

    iterate(ckpt, one, after=evaluate)


def test_what_is_asked_of_gpus_changes_nothing_on_the_host(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for_gpus: dict[str, Any] = {"snapshot": "auto", "direct_storage": "auto", "flag_waits": True}
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, **for_gpus, **POOL)

    def one(i: int) -> None:
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()

    iterate(ckpt, one)


def test_lbfgs_closures(tmp_path: Path) -> None:
    model = net()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), max_iter=4, history_size=3, line_search_fn="strong_wolfe")
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, **POOL)

    def one(i: int) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            return backward(model, i)

        optimizer.step(closure)

    iterate(ckpt, one)


def test_a_gan_in_the_usual_order(tmp_path: Path) -> None:
    """The generator's backward pass leaves gradients in the discriminator, which are no accumulation."""
    generator, critic = net(), net()
    of_generator = torch.optim.Adam(generator.parameters())
    of_critic = torch.optim.Adam(critic.parameters())
    ckpt = Checkpointer(
        tmp_path / "region", models=[generator, critic], optimizers={"g": of_generator, "c": of_critic}, **POOL
    )

    def one(i: int) -> None:
        noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
        of_critic.zero_grad()
        critic(generator(noise).detach()).mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        critic(generator(noise)).mean().backward()
        of_generator.step()

    iterate(ckpt, one)


@pytest.mark.parametrize("member", [True, False])
def test_an_optimizer_made_after_the_checkpointer(tmp_path: Path, member: bool) -> None:
    model = net()
    more: Any = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)} if member else {}
    ckpt = Checkpointer(tmp_path / "region", model=model, **more, **POOL)
    late = torch.optim.AdamW(model.parameters())

    def one(i: int) -> None:
        late.zero_grad()
        backward(model, i)
        late.step()

    iterate(ckpt, one)


def test_a_compiled_optimizer_step(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, **POOL)

    def one(i: int) -> None:
        optimizer.zero_grad()
        backward(model, i)
        step()

    iterate(ckpt, one)


@pytest.mark.parametrize("overflows", ["everywhere", "in the first layer"])
def test_a_grad_scaler_that_skips_updates(tmp_path: Path, overflows: str) -> None:
    """No hook runs then, and the gradients stay unused: neither is an alarm."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, scaler=scaler, **POOL)
    before = [p.detach().clone() for p in model.parameters()]

    def one(i: int) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 8) * (i + 1)).square().mean()).backward()
        for parameter in list(model.parameters())[: None if overflows == "everywhere" else 1]:
            assert parameter.grad is not None
            parameter.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    iterate(ckpt, one)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "no update was skipped"
    assert scaler.get_scale() == 4.0 / 2**STEPS


@pytest.mark.parametrize("late", [False, True])
def test_averaged_parameters(tmp_path: Path, late: bool) -> None:
    """After optimizer.step() its wait covers them; after ckpt.step() they need before_update()."""
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt = Checkpointer(tmp_path / "region", model=model, average=average, optimizer=optimizer, **POOL)

    def one(i: int) -> None:
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()
        if not late:
            average.update_parameters(model)

    def after(i: int) -> None:
        if late:
            ckpt.before_update()
            average.update_parameters(model)

    iterate(ckpt, one, after=after)


def test_averaged_parameters_without_before_update_are_told_of(tmp_path: Path) -> None:
    model = net()
    average = AveragedModel(model, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)
    average.update_parameters(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, average=average, **POOL) as ckpt:
        ckpt.step(0)
        # Copied: only the counters can tell.
        ckpt.wait()
        average.update_parameters(model)
        with pytest.warns(CheckpointWarning, match=r"before_update\(\) was not called"):
            ckpt.step(1)


class Peculiar(nn.Module):
    """Frozen, tied, transposed and inference-mode tensors, and weights that are not contiguous."""

    def __init__(self, inference: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.embedding = nn.Embedding(32, 16)
        self.out = nn.Linear(16, 32, bias=False)
        self.out.weight = self.embedding.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.turned = nn.Parameter(torch.randn(16, 8).t())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.constant: torch.Tensor
        with torch.inference_mode(inference):
            self.register_buffer("constant", torch.randn(2000, 1000))

    def forward(self, i: int) -> torch.Tensor:
        x = torch.full((2, 4, 4, 4), 1.0 + i).to(memory_format=torch.channels_last)
        hidden = self.frozen(self.embedding(torch.arange(4)) + self.conv(x).mean() + self.turned.sum())
        return self.out(hidden).square().mean()  # type: ignore[no-any-return]


def test_peculiar_tensors(tmp_path: Path) -> None:
    model = Peculiar(inference=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), fused=True)
    ckpt = Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, **POOL)

    def one(i: int) -> None:
        optimizer.zero_grad()
        model(i).backward()
        optimizer.step()

    iterate(ckpt, one)
    again = Peculiar(inference=False)
    with torch.no_grad():
        again.constant.zero_()
    assert pccheck.torch.restore(tmp_path / "region", model=again) == STEPS - 1
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride(), name
    assert again.out.weight is again.embedding.weight


# ---- updates that do not --------------------------------------------------------------------------------------------


def by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_an_update_by_hand_is_told_of_once(tmp_path: Path) -> None:
    model = net()
    with Checkpointer(tmp_path / "region", model=model, **POOL) as ckpt, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(STEPS):
            ckpt.step(i)
            # Copied and durable: the save is sound, and luck.
            ckpt.wait()
            by_hand(model)
        assert ckpt.failures == 0
    told = [w for w in caught if "before_update() was not called" in str(w.message)]
    assert len(told) == 1
    assert told[0].category is CheckpointWarning and told[0].filename == __file__


def test_an_update_by_hand_after_before_update_is_none_to_tell_of(tmp_path: Path) -> None:
    model = net()
    ckpt = Checkpointer(tmp_path / "region", model=model, **POOL)

    def one(i: int) -> None:
        ckpt.before_update()
        by_hand(model)

    iterate(ckpt, one)


# ---- without a further update ---------------------------------------------------------------------------------------


def test_a_save_becomes_durable_though_no_update_follows(tmp_path: Path) -> None:
    """An evaluation that takes an hour must not leave the last checkpoint in the air."""
    model = net()
    with Checkpointer(tmp_path / "region", model=model, **POOL) as ckpt:
        save = ckpt.step(7)
        assert save is not None
        # Waits for the engine alone: nobody else confirms.
        assert save.durable(60).step == 7


def test_waiting_in_vain_does_not_give_a_save_up(tmp_path: Path) -> None:
    model = nn.Linear(2000, 2000)
    with Checkpointer(tmp_path / "region", model=model, **POOL) as ckpt:
        early = 0
        for i in range(STEPS):
            ckpt.step(i)
            try:
                ckpt.wait(0)
            except pccheck.errors.TimedOut:
                early += 1
        assert early, "every save was durable at once: this proves nothing"
        ckpt.wait()
        assert ckpt.failures == 0 and ckpt.checkpoints()[0].step == STEPS - 1


# ---- what it costs --------------------------------------------------------------------------------------------------


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def test_no_thread_or_process_is_started_for_a_save(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, children_before = threading.active_count(), children()
    with Checkpointer(tmp_path / "region", model=model, optimizer=optimizer, **POOL) as ckpt:
        backward(model, 0)
        optimizer.step()
        ckpt.save(0)
        ckpt.wait()
        started = native_threads()
        for i in range(50):
            optimizer.step()
            ckpt.save(i)
            # The same threads, by identity: none ended and none began.
            assert native_threads() == started
        ckpt.wait()
        assert ckpt.store.stats().saves_durable + ckpt.store.stats().saves_superseded >= 51
        assert children() == children_before
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_snapshots_hold_no_memory_once_they_are_copied(tmp_path: Path) -> None:
    memory = np.zeros(1_500_000, np.float32)
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.from_numpy(memory))
    alive = weakref.ref(memory)
    with Checkpointer(tmp_path / "region", model=model, **POOL) as ckpt:
        ckpt.step(0)
        model.weight = nn.Parameter(torch.zeros(3))
        del memory
        ckpt.before_update()
        # Whether or not it is durable by now.
        assert alive() is None
        ckpt.step(1)


def hooks() -> int:
    return len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)


def test_closing_removes_the_hooks(tmp_path: Path) -> None:
    before = hooks()
    ckpt = Checkpointer(tmp_path / "region", model=net(), **POOL)
    assert hooks() == before + 2
    ckpt.close()
    assert hooks() == before


def test_hooks_and_exit_handlers_do_not_keep_it_alive(tmp_path: Path) -> None:
    before, running = hooks(), threading.active_count()
    model = net()
    ckpt = Checkpointer(tmp_path / "region", model=model, **POOL)
    ckpt.step(0)
    alive = weakref.ref(ckpt)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del ckpt
        gc.collect()
    assert alive() is None
    assert hooks() == before
    assert threading.active_count() == running
    # What was in flight was finished, and the region is free.
    with Checkpointer(tmp_path / "region", model=model, **POOL) as again:
        assert again.restore() == 0


# ---- a device that hangs --------------------------------------------------------------------------------------------


@pytest.fixture
def freezable(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, which a test may freeze: every write to it hangs then, as on a dead device."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "mount", "fsfreeze"))):
        pytest.skip("needs root, loop devices and fsfreeze, to make a device hang")
    image, at = tmp_path / "image", tmp_path / "mounted"
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, at], capture_output=True).returncode != 0:
        pytest.skip("needs loop devices, to make a device hang")
    try:
        yield at
    finally:
        subprocess.run(["fsfreeze", "-u", at], capture_output=True)
        subprocess.run(["umount", "-l", at], check=True)


def test_a_device_that_hangs_does_not_stop_training(freezable: Path) -> None:
    model = nn.Linear(1200, 1200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ckpt = Checkpointer(
        freezable / "region", model=model, optimizer=optimizer, update_timeout=0.3, slot_timeout=0.3, **POOL
    )
    ckpt.step(0)
    ckpt.wait()
    subprocess.run(["fsfreeze", "-f", freezable], check=True)
    try:
        with pytest.warns(CheckpointWarning, match="failed, training goes on"):
            for i in range(1, 6):
                optimizer.zero_grad()
                model(torch.ones(2, 1200)).sum().backward()
                began = time.monotonic()
                optimizer.step()
                ckpt.step(i)
                # Both timeouts, and ample time for a busy machine; the device hangs for ever.
                assert time.monotonic() - began < 20
            assert not ckpt.finish(0.1) or ckpt.failures
    finally:
        subprocess.run(["fsfreeze", "-u", freezable], check=True)
    ckpt.finish()
    assert ckpt.failures >= 1
    # Nothing torn, and all is well again.
    optimizer.step()
    ckpt.step(6)
    ckpt.wait()
    assert ckpt.checkpoints()[0].step == 6
    assert ckpt.store.verify().damaged == 0
    ckpt.close()
