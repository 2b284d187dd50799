"""A Trainer that resumes with other weights, another optimizer state, other random numbers, or at another batch; and
weights that others can read, or a folder of theirs that is gone, for the sake of resuming.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pccheck import errors  # noqa: E402
from pccheck.huggingface import RegionCallback  # noqa: E402
from pccheck.torch import Checkpointer  # noqa: E402

SMALL: dict[str, Any] = {"staging_bytes": 16 << 20, "chunk_bytes": 1 << 20}


class Tokens(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randint(0, 90, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Losses(transformers.TrainerCallback):  # type: ignore[misc]
    """Records every loss, and stops after a step."""

    def __init__(self, stop_at: int | None) -> None:
        self.found: list[tuple[int, str]] = []
        self._stop_at = stop_at

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.found.append((state.global_step, float(logs["loss"]).hex()))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self._stop_at


def model() -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": 90, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))


def train(folder: Path, region: Path, stop_at: int | None = None, accumulate: int = 1, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    losses, callback = Losses(stop_at), RegionCallback(region, **SMALL, **options)
    trainer = transformers.Trainer(model=model(), args=args, train_dataset=Tokens(), callbacks=[callback, losses])
    trainer.train(resume_from_checkpoint=callback.resume_folder())
    return losses.found


# 6 updates in an epoch: within one, at the end of one, within the second.
@pytest.mark.parametrize(("stop_at", "accumulate"), [(4, 1), (6, 1), (9, 1), (4, 2)])
def test_a_resumed_trainer_goes_on_exactly(tmp_path: Path, stop_at: int, accumulate: int) -> None:
    whole = train(tmp_path, tmp_path / "whole.pccheck", accumulate=accumulate)
    assert len(whole) == 18 // accumulate
    region = tmp_path / "stopped-{rank}.pccheck"
    first = train(tmp_path, region, stop_at=stop_at, accumulate=accumulate)
    rest = train(tmp_path, region, accumulate=accumulate)
    assert (len(first), len(rest)) == (stop_at, len(whole) - stop_at)
    assert first + rest == whole
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["stopped-0.pccheck", "whole.pccheck"], "the folder that it resumed from is removed"


def test_without_resuming_an_old_region_is_not_overwritten(tmp_path: Path) -> None:
    region = tmp_path / "run.pccheck"
    train(tmp_path, region, stop_at=2)
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    for start_anew in (False, True):
        callback = RegionCallback(region, start_anew=start_anew, **SMALL)
        trainer = transformers.Trainer(model=model(), args=args, train_dataset=Tokens(), callbacks=[callback])
        if start_anew:
            trainer.train()
        else:
            with pytest.raises(errors.InvalidState, match="restore"):
                trainer.train()
            assert callback.checkpointer is not None
            callback.checkpointer.close()


def test_no_region_is_nothing_to_resume_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    assert RegionCallback(tmp_path / "none.pccheck").resume_folder() is None
    path = tmp_path / "other.pccheck"
    with Checkpointer(path, weights=[torch.zeros(3)], **SMALL) as other:
        other.step(0)
    with pytest.raises(errors.StateMismatch, match="RegionCallback"):
        RegionCallback(path).resume_folder()
    assert list(tmp_path.iterdir()) == [path], "no folder is left behind"


def test_nobody_else_may_read_the_folder_that_it_resumes_from(tmp_path: Path) -> None:
    region = tmp_path / "run.pccheck"
    train(tmp_path, region, stop_at=2)
    before = os.umask(0)
    try:
        folder = RegionCallback(region).resume_folder()
    finally:
        os.umask(before)
    assert folder is not None and Path(folder) == tmp_path / "run.pccheck.resume" / "checkpoint-2"
    assert {path.name for path in Path(folder).iterdir()} == {"model.safetensors", "trainer_state.json"}
    for path in (tmp_path / "run.pccheck.resume").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "run.pccheck.resume").stat().st_mode & 0o777 == 0o700
    # What a process has left that was killed before it trained, at whatever moment, keeps no other one from training.
    for left in ("all", "the marker", "nothing"):
        assert RegionCallback(region).resume_folder() == folder, left
        if left != "all":
            shutil.rmtree(folder)
        if left == "nothing":
            next(Path(folder).parent.iterdir()).unlink()
    assert len(train(tmp_path, region)) == 16
    assert list(tmp_path.iterdir()) == [region]


def test_nothing_is_removed_that_only_has_the_folders_name(tmp_path: Path) -> None:
    region, place, theirs = (tmp_path / name for name in ("run.pccheck", "run.pccheck.resume", "theirs"))
    train(tmp_path, region, stop_at=1)
    ours = RegionCallback(region).resume_folder()
    assert ours is not None
    place.rename(theirs)

    def refused(found: str) -> None:
        with pytest.raises(errors.AlreadyExists, match=f"{found}.*move it away") as why:
            RegionCallback(region).resume_folder()
        assert (why.value.path, why.value.operation) == (str(place), "resume")

    # Even to a folder that was made here, a link is followed neither to write nor to remove.
    for target in (theirs, tmp_path / "nowhere"):
        place.symlink_to(target)
        refused("a symbolic link")
        assert place.is_symlink() and (theirs / "checkpoint-1" / "model.safetensors").exists()
        place.unlink()
    place.write_text("notes")
    refused("no folder")
    assert place.read_text() == "notes"
    place.unlink()
    (place / "checkpoint-1").mkdir(parents=True)
    refused("a folder without")
    (place / ".pccheck-resume").symlink_to(region)
    refused("a folder without")
    assert len(list(place.iterdir())) == 2


def test_a_folder_that_took_the_place_of_the_one_resumed_from_stays(tmp_path: Path) -> None:
    region, place = tmp_path / "run.pccheck", tmp_path / "run.pccheck.resume"
    train(tmp_path, region, stop_at=17)

    class Replaces(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            shutil.rmtree(place)
            place.mkdir()
            (place / "notes").write_text("theirs")

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=18, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = RegionCallback(region, **SMALL)
    trainer = transformers.Trainer(model=model(), args=args, train_dataset=Tokens(), callbacks=[Replaces(), callback])
    with pytest.warns(RuntimeWarning, match="could not be removed"):
        trainer.train(resume_from_checkpoint=callback.resume_folder())
    assert trainer.state.global_step == 18 and (place / "notes").read_text() == "theirs"


def test_what_accelerate_prepares_is_saved_and_restored_as_it_is(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(stop: int | None) -> list[str]:
        torch.manual_seed(3)
        accelerator = accelerate.Accelerator(cpu=True)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        net, optimizer, scheduler = accelerator.prepare(net, optimizer, scheduler)
        losses = []
        name = "whole" if stop is None else "stopped"
        with Checkpointer(
            tmp_path / f"{name}.pccheck", model=net, optimizer=optimizer, scheduler=scheduler, **SMALL
        ) as saver:
            last = saver.restore()
            for i in range(0 if last is None else last + 1, 12 if last is not None or stop is None else stop):
                loss = net(torch.randn(6, 4)).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                saver.step(i)
                losses.append(loss.item().hex())
        return losses

    whole = run(None)
    assert run(5) + run(5) == whole
