"""Builds LMDBs from a folder of photographs: their content, and resuming a build that was killed at any moment."""

import io
import os
import signal
import sys

import lmdb
import numpy as np
import pytest
from PIL import Image

from datasets_prep import build_lmdb as module
from datasets_prep.build_lmdb import BuildLmdbOptions, build_lmdb, list_in_order, main, split_files
from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.folders import list_files
from datasets_prep.images import IMAGE_SUFFIXES, center_crop
from options import UsageError


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Commit every 3 images, and start with a small map size."""
    monkeypatch.setattr(module, "IMAGES_PER_COMMIT", 3)
    monkeypatch.setattr(module, "FIRST_MAP_BYTES", 1 << 16)


@pytest.fixture
def source(tmp_path, photographs):
    """20 photographs in two folders, PNG and JPEG."""
    folder = tmp_path / "images"
    for index, picture in enumerate(photographs[:20]):
        path = folder / f"{index // 10}" / f"{index:05d}.{'png' if index % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return folder


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["build_lmdb", *map(str, flags)])
    main()


def build(source, target, **settings):
    options = BuildLmdbOptions(source=str(source), image_size=32, **settings)
    return build_lmdb(target, list_files(source, IMAGE_SUFFIXES), source, options)


def content(path):
    environment = lmdb.open(str(path), readonly=True, lock=False)
    with environment.begin() as transaction:
        found = dict(transaction.cursor())
    environment.close()
    return found


@pytest.mark.parametrize("format", ["png", "raw"])
def test_the_lmdb_equals_the_folder(tmp_path, source, monkeypatch, format, capsys):
    flags = ["--source", source, "--datadir", tmp_path / "data", "--image_size", 48, "--format", format]
    run(monkeypatch, *flags)
    assert "train.lmdb: 18 images of 48 x 48" in capsys.readouterr().out
    paths = list_files(source, IMAGE_SUFFIXES)
    for split, chosen in (("train", paths[:18]), ("validation", paths[18:])):
        dataset = open_dataset(DatasetOptions("celeba_256", str(tmp_path / "data"), 48), split)
        assert len(dataset) == len(chosen)
        for index, path in enumerate(chosen):
            expected = center_crop(Image.open(path).convert("RGB"), 48)
            np.testing.assert_array_equal(dataset[index].permute(1, 2, 0).numpy(), expected)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["train.lmdb", "validation.lmdb"]
    del dataset
    run(monkeypatch, *flags)  # nothing is left to do


def test_formats(tmp_path, source):
    first = Image.open(source / "0" / "00000.jpg").convert("RGB")
    for name, kind in (("png", "PNG"), ("jpg", "JPEG"), ("raw", None)):
        build(source, tmp_path / name, format=name)
        values = content(tmp_path / name)
        assert set(values) == {str(index).encode() for index in range(20)}
        if kind is None:
            assert values[b"0"] == center_crop(first, 32).tobytes()
        else:
            assert Image.open(io.BytesIO(values[b"0"])).format == kind


@pytest.mark.parametrize("commit", [0, 1, 4, 6])
@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_killed_build_resumes(tmp_path, source, monkeypatch, commit, moment):
    build(source, tmp_path / "whole")
    child = os.fork()
    if not child:
        commits, original = [], module._commit

        def killed(environment, first, values, progress):
            commits.append(first)
            if len(commits) == commit + 1 and moment == "within":
                transaction = environment.begin(write=True)
                transaction.put(str(first).encode(), values[0])
                os.kill(os.getpid(), signal.SIGKILL)
            if len(commits) == commit + 1 and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            original(environment, first, values, progress)
            if len(commits) == commit + 1:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(module, "_commit", killed)
        build(source, tmp_path / "lmdb")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "lmdb").exists()
    read = []
    monkeypatch.setattr(
        module, "open_rgb", lambda path, name, original=module.open_rgb: read.append(1) or original(path, name)
    )
    assert build(source, tmp_path / "lmdb") == 20
    assert content(tmp_path / "lmdb") == content(tmp_path / "whole")
    assert len(read) == max(0, 20 - 3 * (commit + (moment == "after")))  # nothing is read twice
    assert not (tmp_path / "lmdb.unfinished").exists()


def test_another_source_or_option_is_refused(tmp_path, source, monkeypatch):
    target = tmp_path / "lmdb"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build(source, target)
    for stage in ("unfinished", "finished"):
        with pytest.raises(UsageError, match="with another format: expected raw, but found png"):
            build(source, target, format="raw")
        with pytest.raises(UsageError, match="with another image_size: expected 48, but found 32"):
            build_lmdb(target, list_files(source, IMAGE_SUFFIXES), source, BuildLmdbOptions(image_size=48))
        if stage == "unfinished":
            build(source, target)
    Image.new("RGB", (40, 40)).save(source / "0" / "00000.jpg")
    with pytest.raises(UsageError, match="with another files_sha256"):
        build(source, target)
    (tmp_path / "foreign").mkdir()
    with pytest.raises(UsageError, match="this command did not build it"):
        build(source, tmp_path / "foreign")


def test_bad_images(tmp_path, source, capsys):
    for name in ("0/00004.jpg", "1/00019.png"):
        (source / name).write_bytes((source / name).read_bytes()[:200])
    with pytest.raises(UsageError, match=r"00004\.jpg"):
        build(source, tmp_path / "lmdb")
    assert build(source, tmp_path / "lmdb", skip_bad_images=True) == 18  # continues after the first commit
    assert "left out 2 of 20 images" in capsys.readouterr().err
    values = content(tmp_path / "lmdb")
    assert set(values) == {str(index).encode() for index in range(18)}
    fifth = Image.open(source / "0" / "00005.png").convert("RGB")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(values[b"4"]))), center_crop(fifth, 32))


def test_nothing_but_bad_images(tmp_path):
    for index in range(7):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="none of the 7 images can be read"):
        build(tmp_path, tmp_path / "lmdb", skip_bad_images=True)


def test_official_splits(tmp_path):
    for count, held_out in ((30000, 3000), (70000, 7000)):
        paths = [tmp_path / f"{index:05d}.png" for index in range(count)]
        splits = split_files(paths, tmp_path, "")
        assert splits == {"train": paths[: count - held_out], "validation": paths[count - held_out :]}


def test_numbers_in_names_are_sorted_numerically(tmp_path):
    names = ["0.jpg", "2.jpg", "9.png", "10.jpg", "100.jpg", "b/1.jpg", "b/02.jpg", "b/x3.jpg"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_in_order(tmp_path)] == names


def test_chosen_validation_images(tmp_path, source):
    paths = list_files(source, IMAGE_SUFFIXES)
    assert split_files(paths, source, "5") == {"train": paths[:15], "validation": paths[15:]}
    names = tmp_path / "names.txt"
    names.write_text("00003.png\n1/00014.jpg\n")
    assert split_files(paths, source, str(names))["validation"] == [paths[3], paths[14]]
    assert len(split_files(paths, source, str(names))["train"]) == 18
    names.write_text("00003.jpg")
    with pytest.raises(UsageError, match=r"names '00003.jpg', which is not in"):
        split_files(paths, source, str(names))
    for validation in ("20", "0"):
        with pytest.raises(UsageError, match="split of the 20 images in .* is empty"):
            split_files(paths, source, validation)
    with pytest.raises(UsageError, match="expected a number or a file that lists names"):
        split_files(paths, source, str(tmp_path / "absent"))


def test_missing_flags_and_folders(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="--source is missing"):
        run(monkeypatch, "--datadir", tmp_path)
    with pytest.raises(UsageError, match="absent is not a directory"):
        run(monkeypatch, "--datadir", tmp_path, "--source", tmp_path / "absent")
