"""Prevents Lightning runs that resume to something else, or whose checkpoints vanish or are not where they belong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

import pccheck  # noqa: E402
from pccheck import errors  # noqa: E402
from pccheck.lightning import RegionCheckpointIO  # noqa: E402
from pccheck.torch import references  # noqa: E402

OPTIONS: dict[str, Any] = {"staging_bytes": 16 << 20}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
EXAMPLE = Path(__file__).parent.parent / "examples" / "lightning_example.py"


class Net(LightningModule):
    def __init__(self, width: int = 16, activation: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, width),
            torch.nn.BatchNorm1d(width),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(width, 1),
        )
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        # Of the step alone, so that a resumed run draws what the uninterrupted one drew.
        torch.manual_seed(1000 * self.current_epoch + index)
        loss = (self.layers(batch) - batch.sum(dim=1, keepdim=True)).pow(2).mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)]


def net(**hyperparameters: Any) -> Net:
    torch.manual_seed(0)
    return Net(**hyperparameters)


def data() -> Any:
    return torch.utils.data.DataLoader(torch.randn(64, 8, generator=torch.manual_seed(1)), batch_size=16)


def trainer(folder: Path, epochs: int, *callbacks: Callback, plugin: Any = None, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=list(callbacks),
        plugins=[plugin or RegionCheckpointIO(**OPTIONS)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": bool(callbacks), **options},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


def pinned(folder: Path) -> int:
    with pccheck.Store(folder / ".pccheck" / "region-0.pccheck", read_only=True) as store:
        return sum(info.pinned for info in store.checkpoints())


def test_a_resumed_run_is_bit_identical_to_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = net()
    trainer(tmp_path / "whole", 4).fit(whole, data())

    folder = tmp_path / "parts"
    first = net()
    trainer(folder, 2, ModelCheckpoint(folder, filename="{step}", save_last=True)).fit(first, data())
    second = net()
    resumed = trainer(folder, 4, ModelCheckpoint(folder, filename="{step}", save_last=True))
    resumed.fit(second, data(), ckpt_path="last")

    assert first.losses + second.losses == whole.losses
    assert resumed.global_step == 16
    for (name, one), (_, other) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_the_checkpoint_is_what_lightning_itself_would_have_loaded(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, ModelCheckpoint(tmp_path, filename="kept"))
    run.fit(net(width=4), data())
    run.save_checkpoint(tmp_path / "region.ckpt")
    plugin = run.strategy.checkpoint_io
    found = plugin.load_checkpoint(tmp_path / "region.ckpt")
    expected = run._checkpoint_connector.dump_checkpoint(weights_only=False)
    assert list(found) == list(expected)
    assert found["hyper_parameters"] == {"width": 4, "activation": None}
    assert found["optimizer_states"][0]["param_groups"] == expected["optimizer_states"][0]["param_groups"]
    assert list(found["optimizer_states"][0]["state"]) == [0, 1, 2, 3, 4, 5]
    assert found["callbacks"] == expected["callbacks"]
    assert found["loops"] == expected["loops"]
    assert found["state_dict"]._metadata == expected["state_dict"]._metadata
    plugin.teardown()


@pytest.mark.parametrize("wait", ["copied", "durable"])
def test_only_the_best_and_the_last_are_kept_and_their_slots_with_them(tmp_path: Path, wait: Any) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="loss", save_top_k=2, save_last=True, every_n_train_steps=1
    )
    plugin = RegionCheckpointIO(wait=wait, slots=10, **OPTIONS)
    module = net()
    trainer(tmp_path, 5, checkpoints, plugin=plugin).fit(module, data())

    best = sorted(range(20), key=lambda step: module.losses[step])[:2]
    assert names(tmp_path) == sorted(["last.ckpt", *(f"step={step + 1}.ckpt" for step in best)])
    assert pinned(tmp_path) == 3
    for step in best:
        state = plugin.load_checkpoint(tmp_path / f"step={step + 1}.ckpt")
        assert state["global_step"] == step + 1
    assert plugin.load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 20
    fresh = net()
    fresh.load_state_dict(plugin.load_checkpoint(tmp_path / "last.ckpt")["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), module.parameters(), strict=True))


def test_a_linked_last_checkpoint_loads(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", save_last="link", every_n_train_steps=2)
    trainer(tmp_path, 2, checkpoints).fit(net(), data())
    assert (tmp_path / "last.ckpt").is_symlink() and names(tmp_path) == ["last.ckpt", "step=8.ckpt"]
    module = net()
    trainer(tmp_path, 3).fit(module, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert len(module.losses) == 4


def test_hyperparameters_that_cannot_be_represented_are_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1, ModelCheckpoint(tmp_path))
    with pytest.raises(errors.UnsupportedValue, match=r"hyper_parameters\.activation"):
        run.fit(net(activation=torch.nn.functional.relu), data())
    assert names(tmp_path) == []


def test_ordinary_checkpoints_are_read_and_removed_too(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary.ckpt"
    run = Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                  enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    run.fit(net(), data())
    run.save_checkpoint(ordinary)
    module = net()
    trainer(tmp_path, 2).fit(module, data(), ckpt_path=str(ordinary))
    assert len(module.losses) == 4
    plugin = RegionCheckpointIO(**OPTIONS)
    plugin.remove_checkpoint(ordinary)
    plugin.remove_checkpoint(ordinary)
    plugin.teardown()
    assert not ordinary.exists()
    with pytest.raises(errors.NotFound, match="no checkpoint"):
        plugin.load_checkpoint(ordinary)


def test_a_save_that_fails_later_fails_the_run_or_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(references, "write", full)
    run = trainer(tmp_path / "a", 2, ModelCheckpoint(tmp_path / "a", every_n_train_steps=4))
    with pytest.raises(OSError, match="No space left"):
        run.fit(net(), data())
    module = net()
    plugin = RegionCheckpointIO(on_error="warn", **OPTIONS)
    with pytest.warns(RuntimeWarning, match="No space left"):
        trainer(tmp_path / "b", 2, ModelCheckpoint(tmp_path / "b", every_n_train_steps=4), plugin=plugin).fit(
            module, data()
        )
    assert len(module.losses) == 8


def test_what_a_region_cannot_do_is_said(tmp_path: Path) -> None:
    plugin = RegionCheckpointIO(**OPTIONS)
    with pytest.raises(errors.Unsupported, match="not a local path"):
        plugin.save_checkpoint({}, "s3://bucket/a.ckpt")
    with pytest.raises(errors.InvalidArgument, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"a": 1})


def test_both_names_of_lightning_take_the_plugin() -> None:
    import lightning.fabric.plugins as one

    other = pytest.importorskip("lightning_fabric.plugins")
    assert issubclass(RegionCheckpointIO, one.CheckpointIO) and issubclass(RegionCheckpointIO, other.CheckpointIO)


def test_the_example_runs(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed and trained to step 16" in done.stdout
