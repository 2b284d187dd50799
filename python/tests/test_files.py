"""Prevents folders that are gone after their replacement failed, and writers that trip over what a crash has left."""

from __future__ import annotations

from pathlib import Path

import pytest

from pccheck import files


def test_a_folder_is_back_where_the_new_one_could_not_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a").write_text("old")
    rename = Path.rename

    def second_fails(self: Path, to: Path) -> Path:
        if (self / "a").read_text() == "new":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output"), files.replaced_folder(path) as new:
        (new / "a").write_text("new")
    assert (path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_old_folder_goes_only_when_the_new_ones_name_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    events: list[str] = []
    sync, remove = files.sync_folder, files.shutil.rmtree
    monkeypatch.setattr(files, "sync_folder", lambda at: (events.append(f"sync {at.name}"), sync(at))[1])
    monkeypatch.setattr(files.shutil, "rmtree", lambda at, **_: (events.append("remove"), remove(at))[1])
    with files.replaced_folder(path):
        pass
    assert f"sync {tmp_path.name}" in events[: events.index("remove")]


def test_a_link_is_replaced_itself_and_leaves_nothing_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, path = tmp_path / "theirs", tmp_path / "folder"
    theirs.mkdir()
    (theirs / "a").write_text("old")
    rename = Path.rename
    for target in (theirs, tmp_path / "nowhere"):
        path.symlink_to(target)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", lambda self, to: _no_disk() if self.is_dir() and not self.is_symlink()
                          else rename(self, to))  # fmt: skip
            with pytest.raises(OSError, match="Input/output"), files.replaced_folder(path):
                pass
        assert path.is_symlink() and path.readlink() == target, "it is back"
        with files.replaced_folder(path) as new:
            (new / "a").write_text("new")
        assert not path.is_symlink() and (path / "a").read_text() == "new" and (theirs / "a").read_text() == "old"
        assert set(tmp_path.iterdir()) == {theirs, path}
        (path / "a").unlink()
        path.rmdir()


def _no_disk() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("links", [True, False])
def test_what_appeared_meanwhile_is_not_replaced_unasked(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(files.os, "link", lambda *_: _refuse_links())
    path = tmp_path / "file"
    with pytest.raises(FileExistsError), files.replaced_file(path, replace=False) as new:
        new.write_text("new")
        path.write_text("theirs")
    with pytest.raises(FileExistsError), files.replaced_folder(path, replace=False):
        pass
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
    path.unlink()
    with files.replaced_file(path, replace=False) as new:
        new.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def _refuse_links() -> None:
    raise PermissionError(1, "Operation not permitted")


def test_names_of_unfinished_files_are_told_and_do_not_come_again_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with files.replaced_file(path) as one, files.replaced_file(path) as other:
        assert one != other
        for unfinished in (one, other):
            assert files.is_unfinished(unfinished.name)
            # With the same process id the same names would come again.
            assert len(unfinished.name.split(".")[-2]) == 16
            unfinished.write_text("x")
    for name in ("a.ckpt", ".a.tmp", ".a.ckpt.notes.tmp"):
        assert not files.is_unfinished(name)
