"""Prevents conversions that lose a bit, replace what they should not, or execute what they read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

import torch.distributed.checkpoint as dcp  # noqa: E402

import pccheck  # noqa: E402
from pccheck import errors  # noqa: E402
from pccheck.__main__ import main  # noqa: E402
from pccheck.convert import convert  # noqa: E402
from pccheck.convert.progress import Progress  # noqa: E402
from pccheck.torch.paths import PathStore  # noqa: E402

DESTINATIONS = ["to.pccheck", "to.pt", "to.safetensors", "to"]


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    shared = torch.randn(3, 5)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tied": {"a": shared, "b": shared},
        "dtypes": {str(dtype): torch.arange(4).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool,
                   torch.complex64, torch.complex128, torch.int16)},
        "shapes": [torch.tensor(2.5), torch.empty(0, 3), shared.t()],
        "tuple": (torch.ones(2), 1, None),
        "empty": {},
        "rng": torch.get_rng_state(),
        "global_step": 12,
    }  # fmt: skip


def same(a: Any, b: Any, at: str = "state") -> None:
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, at
        assert (
            a.contiguous().reshape(-1).view(torch.uint8).tolist()
            == b.contiguous().reshape(-1).view(torch.uint8).tolist()
        ), at
    elif isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            same(a[key], b[key], f"{at}[{key!r}]")
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None), at
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{at}[{index}]")
    else:
        assert a == b, at


def loaded(path: Path) -> Any:
    """The state in a region, as another program would read it."""
    target = path.with_name(path.name + ".loaded.pt")
    convert(path, target, force=True)
    return torch.load(target, weights_only=True)


def region(path: Path, **tensors: Any) -> Path:
    """A region with three checkpoints of flat tensors, as :class:`pccheck.Store` makes them."""
    pccheck.format_region(path, slots=5, payload_bytes=1 << 20)
    with pccheck.Store(path, keep=3) as store:
        for step in (10, 20, 30):
            values = {"weights": np.full(1000, step, "float32"), **tensors}
            store.save(step, values, {"note": f"at {step}"}).durable()
    return path


@pytest.mark.parametrize("first", DESTINATIONS)
@pytest.mark.parametrize("second", DESTINATIONS)
def test_every_way_there_and_back_keeps_every_bit(tmp_path: Path, first: str, second: str) -> None:
    source = tmp_path / "from.pt"
    torch.save(state(), source)
    one, two, back = tmp_path / "1" / first, tmp_path / "2" / second, tmp_path / "back.pt"
    assert convert(source, one).step == 12
    done = convert(one, two)
    assert done.step == 12 and convert(two, back).step == 12
    found = torch.load(back, weights_only=True)
    same(state(), found)
    found["tied"]["a"][0] = 7.0
    assert found["tied"]["b"][0].tolist() == [7.0] * 5


def test_a_checkpoint_is_chosen_by_step_or_generation(tmp_path: Path) -> None:
    source = region(tmp_path / "region.pccheck")
    with pccheck.Store(source, read_only=True) as store:
        generations = {info.step: info.generation for info in store.checkpoints()}
    for step, chosen in [(30, {}), (10, {"step": 10}), (20, {"generation": generations[20]}),
                         (20, {"step": 20, "generation": generations[20]})]:  # fmt: skip
        done = convert(source, tmp_path / "one.pt", force=True, **chosen)
        assert done.step == step
        assert torch.load(tmp_path / "one.pt", weights_only=True)["weights"].tolist() == [step] * 1000
    for chosen in ({"step": 11}, {"generation": 10**6}, {"step": 10, "generation": generations[20]}):
        with pytest.raises(errors.NotFound):
            convert(source, tmp_path / "none.pt", **chosen)
    assert not (tmp_path / "none.pt").exists()


def test_ordinary_safetensors_files_keep_their_metadata_and_any_reader_reads_ours(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3, 4), "model.b": torch.arange(3)}
    safetensors.save_file(tensors, tmp_path / "hub.safetensors", {"format": "pt"})
    convert(tmp_path / "hub.safetensors", tmp_path / "region.pccheck", step=7)
    with pccheck.Store(tmp_path / "region.pccheck") as store, store.open() as checkpoint:
        assert (checkpoint.step, checkpoint.metadata["format"]) == (7, "pt")
        assert sorted(checkpoint) == ["model.a", "model.b"]
    convert(tmp_path / "region.pccheck", tmp_path / "again.safetensors")
    found = safetensors.load_file(tmp_path / "again.safetensors")
    same({name: tensors[name] for name in sorted(tensors)}, {name: found[name] for name in sorted(found)})


def test_a_region_without_a_tree_is_a_dict_of_its_tensors(tmp_path: Path) -> None:
    source = region(tmp_path / "region.pccheck", bytes=np.arange(5, dtype="uint8"))
    convert(source, tmp_path / "copy")
    found = loaded(tmp_path / "copy")
    assert set(found) == {"weights", "bytes"} and found["bytes"].tolist() == [0, 1, 2, 3, 4]


def test_references_are_sources(tmp_path: Path) -> None:
    with PathStore(tmp_path, staging_bytes=16 << 20) as store:
        store.save(state(), tmp_path / "a.ckpt", step=5)
    assert convert(tmp_path / "a.ckpt", tmp_path / "plain.ckpt").step == 5
    same(state(), torch.load(tmp_path / "plain.ckpt", weights_only=True))


def test_dcp_folders_of_torch_are_read_and_ours_are_read_by_torch(tmp_path: Path) -> None:
    saved = {"model": {"w": torch.randn(3, 4)}, "groups": [{"lr": 0.5, "t": torch.ones(2)}, {"lr": 1.0}], "epoch": 3}
    dcp.save(saved, checkpoint_id=tmp_path / "theirs", no_dist=True)
    convert(tmp_path / "theirs", tmp_path / "region.pccheck")
    same(saved, loaded(tmp_path / "region.pccheck"))
    convert(tmp_path / "region.pccheck", tmp_path / "ours")
    target = {"model": {"w": torch.zeros(3, 4)}, "epoch": 0}
    dcp.load(target, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert torch.equal(target["model"]["w"], saved["model"]["w"]) and target["epoch"] == 3


def test_old_torch_files_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "old.pth", tmp_path / "new.pccheck")
    assert loaded(tmp_path / "new.pccheck")["a"].tolist() == [1.0] * 3


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PCCHECK_TEST_EVIL"],)


def test_nothing_that_a_source_holds_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCCHECK_TEST_EVIL", str(tmp_path / "executed"))
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(errors.Unsupported, match="more than tensors and plain values: .*mkdir"):
        convert(tmp_path / "evil.pt", tmp_path / "to.pccheck")
    dcp.save({"a": torch.ones(2), "evil": Evil()}, checkpoint_id=tmp_path / "bytes", no_dist=True)
    with pytest.raises(errors.Unsupported, match="entry 'evil'"):
        convert(tmp_path / "bytes", tmp_path / "to.pccheck")
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "metadata", no_dist=True)
    (tmp_path / "metadata" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(errors.Corrupt, match="mkdir"):
        convert(tmp_path / "metadata", tmp_path / "to.pccheck")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "to.pccheck").exists()


METADATA = "torch.distributed.checkpoint.metadata"


class Pickled:
    """Pickle opcodes, written by hand."""

    def __init__(self, content: bytes = b"\x80\x02") -> None:
        self.content = content

    def name(self, module: str, name: str) -> Pickled:
        return self + f"c{module}\n{name}\n".encode()

    def text(self, text: str) -> Pickled:
        return self + f"V{text}\n".encode()

    def __add__(self, more: bytes) -> Pickled:
        return Pickled(self.content + more)


def gadget(marker: Path) -> bytes:
    """Makes the name of a field into source text that ``dataclass`` executes."""
    field = f"x=__import__('os').mkdir('{marker}')):#"
    noted = Pickled().name(METADATA, "StorageMeta") + b"N}"
    noted = noted.text("__annotations__") + b"}"
    noted = noted.text(field).name("torch", "Size") + b"ss"
    noted = noted.text(field).name(METADATA, "field") + b")RN}"
    noted = noted.text("init") + b"I00\ns\x86bs\x86b0"
    return (noted.name(METADATA, "dataclass").name(METADATA, "StorageMeta") + b"\x85R.").content


@pytest.mark.parametrize("name", ["dataclass", "field", "os", "torch", "Enum", "cast", "Any", "STORAGE_TYPES"])
def test_names_that_the_module_of_dcps_metadata_imports_mean_nothing(tmp_path: Path, name: str) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "folder", no_dist=True)
    (tmp_path / "folder" / ".metadata").write_bytes((Pickled().name(METADATA, name) + b".").content)
    with pytest.raises(errors.Corrupt, match=f"{name} is not part of"):
        convert(tmp_path / "folder", tmp_path / "to.pccheck")


def test_metadata_that_would_execute_source_text_is_refused(tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "folder", no_dist=True)
    (tmp_path / "folder" / ".metadata").write_bytes(gadget(tmp_path / "executed"))
    with pytest.raises(errors.Corrupt):
        convert(tmp_path / "folder", tmp_path / "to.pccheck")
    assert not (tmp_path / "executed").exists()
    field = torch.distributed.checkpoint.metadata.StorageMeta.__annotations__
    assert set(field) == {"checkpoint_id", "save_id", "load_id", "modules"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (METADATA, "StorageMeta"),
        (METADATA, "TensorProperties"),
        (METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
    ],
)
def test_metadata_cannot_change_the_classes_that_it_names(tmp_path: Path, module: str, name: str) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "folder", no_dist=True)
    noted = (Pickled().name(module, name) + b"N}").text("planted") + b"I1\ns\x86b."
    (tmp_path / "folder" / ".metadata").write_bytes(noted.content)
    try:
        with pytest.raises(errors.Corrupt):
            convert(tmp_path / "folder", tmp_path / "to.pccheck")
    finally:
        own = getattr(sys.modules[module], name)
        changed = vars(own).get("planted")
        if changed is not None:
            delattr(own, "planted")
    assert changed is None


def test_what_cannot_be_represented_is_named(tmp_path: Path) -> None:
    torch.save({"config": OrderedDict(a=[1, {2, 3}]), "odd": torch.eye(3).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(errors.UnsupportedValue, match="odd"):
        convert(tmp_path / "a.pt", tmp_path / "a.pccheck")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(errors.UnsupportedValue, match="root"):
        convert(tmp_path / "list.pt", tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "list.pt"]


@pytest.mark.parametrize("name", DESTINATIONS)
def test_nothing_is_replaced_without_force_and_a_failure_leaves_what_was_there(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to = tmp_path / "from.pt", tmp_path / name
    torch.save({"a": torch.zeros(3)}, source)
    convert(source, to)
    torch.save({"a": torch.ones(3)}, source)
    with pytest.raises(errors.AlreadyExists, match="--force"):
        convert(source, to)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_full)
        with pytest.raises(OSError, match="No space left"):
            convert(source, to, force=True)
    assert loaded(to)["a"].tolist() == [0.0] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"from.pt", name, f"{name}.loaded.pt"}
    convert(source, to, force=True)
    assert loaded(to)["a"].tolist() == [1.0] * 3
    with pytest.raises(errors.InvalidArgument, match="source and destination"):
        convert(to, to, force=True)
    other = tmp_path / ("a folder" if name != "to" else "a file.pt")
    other.mkdir() if name != "to" else other.write_bytes(b"x")
    with pytest.raises(errors.AlreadyExists):
        convert(source, other.rename(tmp_path / f"other{to.suffix}"), force=True)


@pytest.mark.parametrize("name", DESTINATIONS)
@pytest.mark.parametrize("leads_to", ["one of its kind", "nowhere"])
def test_a_link_is_replaced_itself_and_only_with_force(
    tmp_path: Path, name: str, leads_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, to, theirs = tmp_path / "from.pt", tmp_path / name, tmp_path / f"theirs{Path(name).suffix}"
    torch.save({"a": torch.ones(3)}, source)
    if leads_to == "one of its kind":
        convert(source, theirs)
    before = {path: path.is_file() and path.read_bytes() for path in (theirs, *theirs.rglob("*"))}
    to.symlink_to(theirs)
    there = set(tmp_path.iterdir())
    torch.save({"a": torch.zeros(3)}, source)
    with pytest.raises(errors.AlreadyExists, match="--force"):
        convert(source, to)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _disk_full)
        with pytest.raises(OSError, match="No space left"):
            convert(source, to, force=True)
    assert to.readlink() == theirs and set(tmp_path.iterdir()) == there
    convert(source, to, force=True)
    assert not to.is_symlink() and set(tmp_path.iterdir()) == there
    assert {path: path.is_file() and path.read_bytes() for path in (theirs, *theirs.rglob("*"))} == before
    assert loaded(to)["a"].tolist() == [0.0] * 3


@pytest.mark.parametrize("name", DESTINATIONS)
def test_what_appears_while_it_converts_is_not_replaced_without_force(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pccheck.convert import writers

    source, to = tmp_path / "from.pt", tmp_path / name
    torch.save({"a": torch.ones(3)}, source)
    make_folders = writers.files.make_folders
    monkeypatch.setattr(writers.files, "make_folders", lambda at: (make_folders(at), to.write_text("theirs")))
    with pytest.raises(errors.AlreadyExists, match="--force") as why:
        convert(source, to)
    assert why.value.path == str(to) and to.read_text() == "theirs" and set(tmp_path.iterdir()) == {source, to}


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    source = tmp_path / "run" / "from.pt"
    torch.save({"a": torch.ones(3)}, source)
    with pytest.raises(errors.InvalidArgument, match="holds the source") as why:
        convert(source, tmp_path / "run", force=True)
    assert why.value.path == str(tmp_path / "run") and list((tmp_path / "run").iterdir()) == [source]


def test_modes_are_what_the_umask_leaves_and_a_regions_0600(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "from.pt")
    before = os.umask(0o027)
    try:
        for name in DESTINATIONS:
            convert(tmp_path / "from.pt", tmp_path / name)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("to*")}
    assert found == {"to.pccheck": 0o600, "to.pt": 0o640, "to.safetensors": 0o640, "to": 0o750}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "to").iterdir()} == {0o640}


def _disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_damaged_and_foreign_sources_are_named_as_such(tmp_path: Path) -> None:
    source = region(tmp_path / "region.pccheck")
    content = bytearray(source.read_bytes())
    for step in (10, 20, 30):
        at = content.index(np.full(64, step, "float32").tobytes())
        content[at + 100] ^= 1
    source.write_bytes(content)
    torch.save(state(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello, this is no checkpoint at all")
    (tmp_path / "folder").mkdir()
    safetensors.save_file({"a": torch.ones(100)}, tmp_path / "cut.safetensors")
    os.truncate(tmp_path / "cut.safetensors", 300)
    dcp.save({"a": torch.ones(2000)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    os.truncate(next((tmp_path / "dcp").glob("*.distcp")), 100)
    for name, expected in [
        ("region.pccheck", errors.Corrupt),
        ("cut.pt", errors.Corrupt),
        ("text.pt", errors.NotARegion),
        ("folder", errors.NotFound),
        ("missing", errors.NotFound),
        ("cut.safetensors", errors.Corrupt),
        ("dcp", errors.Corrupt),
    ]:
        with pytest.raises(expected):
            convert(tmp_path / name, tmp_path / "to.pt")
        with pytest.raises(expected):
            convert(tmp_path / name, tmp_path / "to.safetensors")
    assert not list(tmp_path.glob("*to.*"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pccheck", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_line_says_what_it_does_and_fails_in_one_line(tmp_path: Path) -> None:
    done = run()
    assert done.returncode == 0 and "usage: python -m pccheck" in done.stdout and "examples:" in done.stdout
    source = region(tmp_path / "region.pccheck")
    done = run("convert", source, tmp_path / "a.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["destination_kind"] == "safetensors"
    for arguments in (
        ("convert", source, tmp_path / "a.safetensors"),
        ("convert", tmp_path / "missing.pt", tmp_path / "b.pt"),
        ("convert", source, tmp_path / "b.unknown"),
        ("list", tmp_path / "missing"),
        ("verify", tmp_path / "a.safetensors"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("pccheck: error: ") and done.stderr.count("\n") == 1
    assert run("convert").returncode == 2


def test_list_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = region(tmp_path / "region.pccheck")
    assert main(["list", str(source)]) == 0
    assert "3 checkpoints, 5 slots" in capsys.readouterr().out
    assert main(["list", str(source), "--json"]) == 0
    assert [info["step"] for info in json.loads(capsys.readouterr().out)["checkpoints"]] == [30, 20, 10]
    assert main(["verify", str(source)]) == 0
    assert "3 intact, 0 damaged" in capsys.readouterr().out
    content = source.read_bytes()
    at = content.index(np.full(64, 20, "float32").tobytes())
    with source.open("r+b") as file:
        file.seek(at + 5)
        file.write(b"\xff")
    assert main(["verify", str(source)]) == 1
    assert "2 intact, 1 damaged" in capsys.readouterr().out
    assert main(["verify", str(source), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"] == 1


def test_memory_is_bounded_where_it_is_said_to_be(tmp_path: Path) -> None:
    """A state of 400 MB through a region and back to safetensors, in less anonymous memory than half of it."""
    state_bytes = 400 << 20
    torch.save({f"w{i}": torch.full((10 << 20,), float(i)) for i in range(10)}, tmp_path / "a.pt")
    script = (
        "import re, sys, torch\nfrom pathlib import Path\nfrom pccheck.convert import convert\n"
        "import pccheck.torch.paths, threading, time\n"
        "def anonymous():\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) << 10\n"
        "before, most, done = anonymous(), [0], []\n"
        "def watch():\n"
        "    while not done:\n"
        "        most[0] = max(most[0], anonymous()); time.sleep(0.01)\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "folder = sys.argv[1]\n"
        "convert(folder + '/a.pt', folder + '/b.pccheck', slots=2)\n"
        "convert(folder + '/b.pccheck', folder + '/c.safetensors')\n"
        "done.append(1); thread.join(); print(most[0] - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    pool_bytes = 256 << 20
    assert int(done.stdout) < pool_bytes + (64 << 20) < state_bytes
    shutil.rmtree(tmp_path)


def test_progress_is_shown_for_long_work_only(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for quiet, total, shown in [(False, 1000, True), (True, 1000, False), (False, 10, False)]:
        progress = Progress(quiet=quiet, long_bytes=100)
        progress.begin("copying", total)
        progress.advance(total)
        progress.end()
        assert ("copying: " in capsys.readouterr().err) is shown
    monkeypatch.undo()
    progress = Progress(long_bytes=100)
    progress.begin("saving", 1000)
    progress.advance(1000)
    progress.end()
    assert "saving: 100%" in capsys.readouterr().err
