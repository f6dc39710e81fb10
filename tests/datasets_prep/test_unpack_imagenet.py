"""Small versions of the official archives: a tar of tars, a tar, and the development kit."""

import io
import sys
import tarfile

import numpy as np
import pytest
import scipy.io

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.unpack_imagenet import DEVKIT, TRAIN, VALIDATION, main
from options import UsageError

WNIDS = ("n01440764", "n01443537", "n02119789")
VALIDATION_CLASSES = (3, 1, 3, 2)


def pack(members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def jpegs(photographs):
    """The bytes of 13 JPEG files."""
    files = []
    for picture in photographs[:13]:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


@pytest.fixture
def archives(tmp_path, jpegs):
    folder = tmp_path / "data"
    folder.mkdir()
    images = {wnid: {f"{wnid}_{i}.JPEG": jpegs[3 * n + i] for i in range(3)} for n, wnid in enumerate(WNIDS)}
    images[WNIDS[0]] |= {f"../../{WNIDS[0]}_9.txt": b"x", "../escaped.JPEG": jpegs[0]}
    (folder / TRAIN).write_bytes(pack({f"{wnid}.tar": pack(files) for wnid, files in images.items()}))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    (folder / VALIDATION).write_bytes(pack(dict(zip(names, jpegs[9:], strict=True))))
    rows = [(3, "n02119789", 0), (1, "n01440764", 0), (2, "n01443537", 0), (1001, "n00000001", 3)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "\n".join(map(str, VALIDATION_CLASSES)).encode()
    kit = {"meta.mat": meta.getvalue(), "ILSVRC2012_validation_ground_truth.txt": truth}
    (folder / DEVKIT).write_bytes(pack({f"ILSVRC2012_devkit_t12/data/{k}": v for k, v in kit.items()}, "w:gz"))
    return folder


def run(monkeypatch, datadir):
    monkeypatch.setattr(sys, "argv", ["unpack_imagenet", "--datadir", str(datadir)])
    main()


def test_the_layout_equals_torchvisions(archives, tmp_path, jpegs, monkeypatch, capsys):
    run(monkeypatch, archives)
    for number, wnid in enumerate(WNIDS):
        for index in range(3):
            assert (archives / "train" / wnid / f"{wnid}_{index}.JPEG").read_bytes() == jpegs[3 * number + index]
    for number, label in enumerate(VALIDATION_CLASSES, start=1):
        path = archives / "val" / WNIDS[label - 1] / f"ILSVRC2012_val_{number:08d}.JPEG"
        assert path.read_bytes() == jpegs[8 + number]
    validation = open_dataset(DatasetOptions("imagenet_256", str(archives), 32), "validation")
    assert validation.labels.tolist() == sorted(label - 1 for label in VALIDATION_CLASSES)
    assert "train: 3 classes" in capsys.readouterr().out
    everything = {path.name for path in tmp_path.rglob("*") if path.suffix in (".JPEG", ".txt")}
    assert not any(path.name == "escaped.JPEG" for path in tmp_path.glob("*"))  # it is in its class folder
    assert (archives / "train" / WNIDS[0] / "escaped.JPEG").exists()
    assert f"{WNIDS[0]}_9.txt" not in everything
    run(monkeypatch, archives)  # nothing is left to do


def test_an_interrupted_unpacking_resumes(archives, monkeypatch):
    whole = (archives / TRAIN).read_bytes()
    (archives / TRAIN).write_bytes(whole[: int(0.6 * len(whole))])
    with pytest.raises(UsageError, match=rf"cannot unpack .*{TRAIN}"):
        run(monkeypatch, archives)
    assert not (archives / "train").exists()
    (archives / "train.unfinished" / "n01443537.tmp-1").mkdir()
    (archives / TRAIN).write_bytes(whole)
    run(monkeypatch, archives)
    assert sorted(path.name for path in (archives / "train").iterdir()) == list(WNIDS)
    assert [len(list((archives / "train" / wnid).iterdir())) for wnid in WNIDS] == [4, 3, 3]
    assert not (archives / "train.unfinished").exists()


def test_missing_and_foreign_archives(archives, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=f"{TRAIN} does not exist: download it from image-net.org"):
        run(monkeypatch, tmp_path)
    (archives / TRAIN).write_bytes((archives / VALIDATION).read_bytes())
    with pytest.raises(UsageError, match="the archive has no images for .*train"):
        run(monkeypatch, archives)
