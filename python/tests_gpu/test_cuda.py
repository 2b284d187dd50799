"""States on a real GPU: what is saved is the state as of the stream's work before, whatever training does next; the
host waits for nothing that it need not; what is restored is bit for bit what was saved.

Run by scripts/gpu where there is a GPU.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import pccheck
import pccheck.torch
from pccheck import arrays, errors

#: seconds after which a save that hangs fails
PROMPT = 30
MODES = {
    "staging": {"snapshot": "staging"},
    "auto": {"snapshot": "auto"},
    "spare": {"snapshot": "spare"},
    "flags": {"snapshot": "staging", "flag_waits": True, "gpu_timeout": PROMPT},
}
in_each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
#: so many cycles of a kernel that does nothing: some tens of milliseconds
BUSY = 100_000_000


@pytest.fixture
def store(tmp_path: Path):
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=600 << 20)
    with pccheck.Store(path, durability="process", staging_bytes=64 << 20) as store:
        yield store


@pytest.fixture(autouse=True, scope="session")
def warm() -> None:
    """All kernels are there: loading one waits for the GPU."""
    for tensor in tensors(0).values():
        tensor.copy_(tensor.clone()).zero_()
        tensor.reshape(-1).view(torch.uint8).bitwise_xor_(1)
    torch.cuda._sleep(1)
    torch.cuda.synchronize()


def tensors(seed: int, *, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Of all kinds: large, small, empty, scalar, several dtypes."""
    dice = torch.Generator(device).manual_seed(seed)

    def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.randint(0, 256, (*shape, dtype.itemsize), generator=dice, device=device, dtype=torch.uint8)
        if dtype is torch.bool:
            return values.reshape(shape) < 128
        return values.view(dtype).reshape(shape)

    found = {
        "large": filled(5000, 1001),
        "half": filled(3333, 777, dtype=torch.bfloat16),
        "bytes": filled(1_000_003, dtype=torch.uint8),
        "flags": filled(777, dtype=torch.bool),
        "scalar": filled(dtype=torch.float64),
        "complex": filled(100, 3, dtype=torch.complex64),
        "tiny8": filled(9, dtype=torch.float8_e4m3fn),
        "empty": torch.empty(0, 4, device=device),
    }
    return found | {f"small{i:03}": filled(1 + i % 37) for i in range(300)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.detach().cpu().contiguous(), other.detach().cpu().contiguous()
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    )


def assert_saved(store: pccheck.Store, step: int, expected: dict[str, torch.Tensor]) -> None:
    with store.open(step=step) as checkpoint:
        assert set(checkpoint) == set(expected)
        restored = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
        checkpoint.read_into(restored)
    wrong = [name for name, tensor in expected.items() if not same(restored[name], tensor)]
    assert not wrong, wrong


@in_each_mode
def test_what_is_saved_is_the_state_before_whatever_comes_behind(store, mode):
    state = tensors(0)
    for step in range(6):
        new = tensors(step + 1)
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        for name, tensor in state.items():
            tensor.copy_(new[name])
        save = store.save(step, state, **mode)
        save.stream_wait_copied()
        for tensor in state.values():
            tensor.zero_()
        save.durable()
        assert_saved(store, step, new)


@in_each_mode
def test_the_stream_that_is_named_is_the_one_that_counts(store, mode):
    side, state = torch.cuda.Stream(), tensors(1)
    expected = tensors(2)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY)
        for name, tensor in state.items():
            tensor.copy_(expected[name])
    save = store.save(1, state, **mode, stream=side)
    save.stream_wait_copied(side)
    with torch.cuda.stream(side):
        for tensor in state.values():
            tensor.zero_()
    save.durable()
    assert_saved(store, 1, expected)


@pytest.mark.parametrize("snapshot", ["spare", "staging"])
def test_the_host_does_not_wait_for_a_busy_stream(tmp_path, snapshot):
    state = {"w": torch.ones(8 << 20, device="cuda")}
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
    with pccheck.Store(path, durability="process", staging_bytes=64 << 20) as store:
        store.save(0, state, snapshot=snapshot).durable()
        torch.cuda._sleep(20 * BUSY)
        began = time.perf_counter()
        save = store.save(1, state, snapshot=snapshot)
        save.stream_wait_copied()
        host = time.perf_counter() - began
        with pytest.raises(errors.TimedOut):
            save.copied(0)
        torch.cuda.synchronize()
        stream = time.perf_counter() - began
        save.durable()
    assert host < stream / 4, (host, stream)


def test_the_host_does_not_wait_for_a_small_pool(tmp_path):
    new, state = (torch.rand(64 << 20, device="cuda") for _ in range(2))
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes({"w": state}))
    flags = {"flag_waits": True, "gpu_timeout": PROMPT}
    with pccheck.Store(path, durability="process", staging_bytes=16 << 20) as store:
        store.save(0, {"w": state}, **flags).durable()
        for step in range(1, 5):
            state.copy_(new)
            torch.cuda._sleep(10 * BUSY)
            began = time.perf_counter()
            save = store.save(step, {"w": state}, **flags)
            save.stream_wait_copied()
            state.zero_()
            host = time.perf_counter() - began
            with pytest.raises(errors.TimedOut):
                save.copied(0)
            torch.cuda.current_stream().synchronize()
            stream = time.perf_counter() - began
            save.durable()
            assert_saved(store, step, {"w": new})
            assert host < stream / 4, (host, stream)


@in_each_mode
def test_thousands_of_tensors_hold_up_no_launch(tmp_path, mode):
    """More than the driver's queues take copies of, behind a stream that is busy: the program goes on launching."""
    state = {f"t{at}": torch.full((500 + at,), float(at), device="cuda") for at in range(6_000)}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    small, other, path = torch.zeros(1000, device="cuda"), torch.cuda.Stream(), tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
    with pccheck.Store(path, durability="process") as store:
        store.save(0, state, **mode).durable()
        torch.cuda.synchronize()
        torch.cuda._sleep(20 * BUSY)
        began = time.perf_counter()
        save = store.save(1, state, **mode)
        with torch.cuda.stream(other):
            for _ in range(300):
                # So that the engine has come to where a queue could be full.
                time.sleep(0.0005)
                small.add_(1)
        launched = time.perf_counter() - began
        with pytest.raises(errors.TimedOut):
            save.copied(0)
        save.stream_wait_copied()
        torch._foreach_zero_(list(state.values()))
        torch.cuda.synchronize()
        stream = time.perf_counter() - began
        save.durable()
        assert_saved(store, 1, kept)
    print(f"launched after {launched:.3f} s, of {stream:.3f}")
    assert launched < stream / 2, (launched, stream)


def many_kernels(tensor: torch.Tensor) -> None:
    """More than the driver queues."""
    for _ in range(20_000):
        tensor.add_(1)


def one_value(tensor: torch.Tensor) -> None:
    """Copied to pageable memory, behind all that is on the stream."""
    tensor[0].item()


def many_streams(tensor: torch.Tensor) -> None:
    """More than the GPU has queues for."""
    for stream in [torch.cuda.Stream() for _ in range(40)]:
        with torch.cuda.stream(stream):
            torch.zeros_like(tensor).add_(1)


def new_memory(tensor: torch.Tensor) -> None:
    """Allocated and freed by the driver, which may wait for all that runs."""
    for mib in (300, 500):
        torch.empty(mib << 20, dtype=torch.uint8, device="cuda").fill_(int(tensor[0]))
        torch.cuda.empty_cache()


@pytest.mark.parametrize("work", [many_kernels, one_value, many_streams, new_memory])
def test_whatever_comes_behind_the_wait_the_save_becomes_durable(tmp_path, work):
    """What the stand-in of the tests without a GPU does not have: queues with ends, and streams that share them."""
    new, state = (torch.rand(64 << 20, device="cuda") for _ in range(2))
    small = torch.zeros(1000, device="cuda")
    work(small)
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes({"w": state}))
    with pccheck.Store(path, durability="process", staging_bytes=16 << 20) as store:
        flags = {"flag_waits": True, "gpu_timeout": PROMPT}
        store.save(0, {"w": state}, **flags).durable()
        state.copy_(new)
        torch.cuda.synchronize()
        began = time.perf_counter()
        save = store.save(1, {"w": state}, **flags)
        save.stream_wait_copied()
        state.zero_()
        work(small)
        torch.cuda.synchronize()
        took = time.perf_counter() - began
        save.durable()
        assert_saved(store, 1, {"w": new})
        print(f"{work.__name__}: {took:.2f} s")
        assert took < PROMPT
        # The next one is like any other.
        state.copy_(new)
        store.save(2, {"w": state}).durable()
        assert_saved(store, 2, {"w": new})


def test_chunks_go_past_host_memory_where_cufile_takes_them(tmp_path):
    """Where it does not, it is said why, and the engine does without."""
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=100 << 20)
    with pccheck.Store(path, medium="direct", durability="process", staging_bytes=64 << 20) as store:
        for step in range(4):
            state = tensors(step)
            kept = {name: tensor.clone() for name, tensor in state.items()}
            how, before = "required", store.stats().direct_bytes
            try:
                save = store.save(step, state, snapshot="spare", direct_storage=how)
                save.stream_wait_copied()
                for tensor in state.values():
                    tensor.zero_()
                save.durable()
            except errors.Unsupported as why:
                print(f"not directly: {why}")
                how = "auto"
                save = store.save(step, kept, snapshot="spare", direct_storage=how)
                save.durable()
            written = store.stats().direct_bytes - before
            assert (written > 15 << 20) == (how == "required")
            assert_saved(store, step, kept)


@in_each_mode
def test_memory_that_the_program_lets_go_is_kept_until_it_is_copied(store, mode):
    expected = tensors(3)
    kept = {name: tensor.cpu() for name, tensor in expected.items()}
    torch.cuda._sleep(BUSY)
    save = store.save(1, {name: tensor.clone() for name, tensor in expected.items()}, **mode)
    gc.collect()
    torch.cuda.empty_cache()
    junk = [torch.zeros_like(tensor) for tensor in expected.values()]
    save.durable()
    del junk
    assert_saved(store, 1, kept)


def test_host_and_gpu_tensors_are_one_checkpoint(store):
    both = {f"gpu.{name}": tensor for name, tensor in tensors(4).items()}
    both |= {f"host.{name}": tensor for name, tensor in tensors(5, device="cpu").items()}
    save = store.save(1, both)
    save.stream_wait_copied()
    save.durable()
    assert_saved(store, 1, both)


def test_tied_tensors_are_stored_once(store):
    weights = torch.rand(1 << 20, device="cuda")
    save = store.save(1, {"a": weights, "b": weights})
    save.durable()
    with store.open() as checkpoint:
        assert checkpoint.info.payload_bytes < 1.5 * weights.nbytes
    assert_saved(store, 1, {"a": weights, "b": weights})


def test_a_save_is_refused_while_its_stream_captures_and_leaves_other_captures_alone(store):
    state = {"w": torch.rand(4 << 20, device="cuda"), "v": torch.rand(4 << 20, device="cuda")}
    store.save(0, state).durable()
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(errors.InvalidState):
            store.save(1, state)
    # While a save is in flight, its threads' calls do not end a capture, though it is in the global mode.
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    save = store.save(2, state)
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other, capture_error_mode="global"):
        x += 1
        time.sleep(0.1)
    save.durable()
    assert_saved(store, 2, state)
    other.replay()


def test_damaged_arguments_are_errors(store):
    state = {"w": torch.rand(1000, device="cuda")}
    with pytest.raises(errors.InvalidArgument):
        store.save(1, state, stream="0")
    with pytest.raises(errors.InvalidArgument):
        store.save(1, state, snapshot="nowhere")
    with pytest.raises(errors.InvalidArgument):
        store.save(1, {"w": torch.rand(100, 10, device="cuda").t()})
    store.save(2, state).durable()


def test_memory_that_is_no_gpus_is_refused_and_nothing_is_read(store):
    """The driver is asked: none of the engine's own book-keeping knows it."""
    host = torch.zeros(1000, dtype=torch.uint8)
    memory = arrays.Memory(host.data_ptr(), host.nbytes, "U8", (1000,), host, gpu=0)
    with (
        mock.patch.object(store, "_packer", mock.Mock(pack=lambda named: arrays.pack_tensors({"w": memory}))),
        pytest.raises(errors.InvalidArgument, match="no memory of a GPU"),
    ):
        store.save(1, {})
    store.save(2, {"w": host.cuda()}).durable()


def test_memory_of_expandable_segments_is_like_any_other():
    """Addresses that are reserved first and get their memory later, as large trainings use them."""
    chosen = "what_is_saved or host_and_gpu or several_threads or fills_parameters"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr


def test_spare_memory_that_there_is_not_fails_the_save_alone(tmp_path):
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    state = {"w": torch.rand((600 << 20) // 4, device="cuda")}
    path = tmp_path / "region"
    pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
    with pccheck.Store(path, durability="process", staging_bytes=64 << 20) as store:
        with pytest.raises(errors.OutOfMemory):
            store.save(1, state, snapshot="spare").durable()
        store.save(2, state, snapshot="auto").durable()
        del hog
        torch.cuda.empty_cache()
        assert_saved(store, 2, state)


def trained(
    folder: Path, steps: int, *, snapshot: str, stop_at: int | None = None, compiled: bool = False
) -> list[float]:
    """A small training run with AMP that saves every step, and may stop early; returns the losses of its steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.BatchNorm1d(256),
        torch.nn.GELU(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(256, 8),
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    run = torch.compile(model) if compiled else model
    losses = []
    with pccheck.torch.Checkpointer(
        folder / "run.pcc",
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        snapshot=snapshot,
        durability="process",
        on_error="raise",
        staging_bytes=16 << 20,
    ) as checkpointer:
        last = checkpointer.restore()
        for step in range(0 if last is None else last + 1, steps):
            inputs = torch.randn(32, 64, device="cuda")
            with torch.autocast("cuda", dtype=torch.float16):
                loss = run(inputs).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            checkpointer.step(step)
            losses.append(float(loss))
            if step == stop_at:
                break
        checkpointer.wait()
    return losses


@pytest.mark.parametrize(
    ("snapshot", "compiled"), [("staging", False), ("auto", False), ("spare", False), ("staging", True)]
)
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path, snapshot, compiled):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trained(tmp_path / "whole", 12, snapshot=snapshot, compiled=compiled)
    first = trained(tmp_path / "parts", 12, snapshot=snapshot, stop_at=4, compiled=compiled)
    second = trained(tmp_path / "parts", 12, snapshot=snapshot, compiled=compiled)
    assert first + second == whole


def test_updates_by_a_replayed_graph_wait_for_the_copies(tmp_path):
    weights = torch.zeros(16 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    weights.add_(0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        weights.add_(1)
    weights.zero_()
    with pccheck.torch.Checkpointer(
        tmp_path / "run.pcc",
        state={"w": weights},
        durability="process",
        on_error="raise",
        staging_bytes=128 << 20,
        rng=False,
    ) as checkpointer:
        checkpointer.restore()
        for step in range(8):
            checkpointer.before_update()
            graph.replay()
            save = checkpointer.step(step)
            assert save is not None
        checkpointer.wait()
    with pccheck.Store(tmp_path / "run.pcc", read_only=True, durability="process") as store, store.open() as checkpoint:
        name = next(iter(checkpoint.tensors))
        found = checkpoint.read(name)
        assert (found == checkpoint.step + 1).all()


def test_a_restore_fills_parameters_on_the_gpu_in_place(tmp_path):
    model = torch.nn.Linear(1000, 1000).cuda()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pccheck.torch.Checkpointer(tmp_path / "run.pcc", model=model, durability="process") as checkpointer:
        checkpointer.restore()
        checkpointer.save(3)
        checkpointer.wait()
    address = model.weight.data_ptr()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    with pccheck.torch.Checkpointer(tmp_path / "run.pcc", model=model, durability="process") as checkpointer:
        assert checkpointer.restore() == 3
    assert model.weight.data_ptr() == address
    assert all(same(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_several_threads_save_and_restore_at_once(tmp_path):
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            torch.cuda.set_device(0)
            path = tmp_path / f"region-{number}"
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                state = tensors(number)
                pccheck.format_region(path, slots=3, payload_bytes=pccheck.payload_bytes(state))
                with pccheck.Store(path, durability="process", staging_bytes=16 << 20) as store:
                    for step in range(5):
                        expected = {name: tensor.clone() for name, tensor in state.items()}
                        save = store.save(step, state, **list(MODES.values())[step % 3])
                        save.stream_wait_copied()
                        for tensor in state.values():
                            tensor.reshape(-1).view(torch.uint8).bitwise_xor_(1)
                        save.durable()
                        stream.synchronize()
                        assert_saved(store, step, expected)
        except BaseException as why:
            failures.append(why)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
