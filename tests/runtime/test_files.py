import errno
import os
import shutil
from dataclasses import dataclass

import pytest

from options import UsageError
from runtime.files import append_line, atomic_path, move_aside, read_json, replace_folder, write_json


@dataclass(frozen=True)
class Example:
    sizes: tuple[int, ...] = (1, 2)
    name: str = "ä"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("one")
    with atomic_path(path) as temporary:
        temporary.write_text("tw")
        assert path.read_text() == "one"
        assert temporary.parent == path.parent  # renaming across file systems would copy
    assert path.read_text() == "tw"
    assert names(path.parent) == ["file"]


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_json(tmp_path / "file", 1)
    assert events[:2] == ["fsync", "rename"]


def test_json_round_trip_of_dataclasses_and_tuples(tmp_path):
    write_json(tmp_path / "a.json", {"example": Example(), "path": tmp_path, 3: (None, 0.1)})
    assert read_json(tmp_path / "a.json") == {
        "example": {"sizes": [1, 2], "name": "ä"},
        "path": str(tmp_path),
        "3": [None, 0.1],
    }


@pytest.mark.parametrize("content", [None, b'{"half": ', b"\xff\xfe"])
def test_unreadable_json_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read .*a\.json"):
        read_json(path)


def test_replaced_folder_holds_only_the_new_files(tmp_path):
    folder = tmp_path / "deep" / "folder"
    for name in ["first", "second"]:
        with replace_folder(folder) as temporary:
            (temporary / name).write_text(name)
    assert names(folder) == ["second"]
    assert names(folder.parent) == ["folder"]


def test_failed_replacement_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(RuntimeError), replace_folder(folder) as temporary:
        (temporary / "new").write_text("new")
        raise RuntimeError
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_crash_between_the_renames_keeps_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("precious")

    def crash(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt), replace_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert [path.read_text() for path in tmp_path.rglob("old")] == ["precious"]


def test_a_killed_processs_temporary_folder_is_ignored(tmp_path):
    folder = tmp_path / "folder"
    stale = tmp_path / f"folder.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "half").write_text("half")
    with replace_folder(folder) as temporary:
        (temporary / "new").write_text("new")
    assert names(folder) == ["new"]


def test_move_aside_takes_the_first_free_number(tmp_path):
    moved = []
    for content in "abc":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / content).touch()
        moved.append(move_aside(tmp_path / "run"))
    assert [path.name for path in moved] == ["run.old-1", "run.old-2", "run.old-3"]
    assert [names(path) for path in moved] == [["a"], ["b"], ["c"]]
    assert names(tmp_path) == ["run.old-1", "run.old-2", "run.old-3"]


def test_any_error_on_a_full_disk_becomes_enospc(tmp_path, monkeypatch):
    path = tmp_path / "file"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    with pytest.raises(OSError, match="No space left on device") as raised, atomic_path(path):
        raise RuntimeError("PytorchStreamWriter failed")
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)


def test_lines_are_appended(tmp_path):
    for line in ("FID 5.26", "FID 5.27"):
        append_line(tmp_path / "logs" / "x.log", line)
    assert (tmp_path / "logs" / "x.log").read_text() == "FID 5.26\nFID 5.27\n"
