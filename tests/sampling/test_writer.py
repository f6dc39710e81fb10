"""Writing samples to disk, with interruptions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from options import UsageError
from runtime.distributed import Processes
from sampling import writer as module
from sampling.sampler import GeneratedBatch
from sampling.writer import SampleWriter, read_or_draw

SETTINGS = {"seed": 1, "solver": {"method": "heun", "num_steps": 4}}
IMAGES = torch.randint(0, 256, (10, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def batch(*indices):
    chosen = torch.tensor(indices)
    return GeneratedBatch(indices, IMAGES[chosen], chosen % 3, chosen + 10, 2 * chosen + 10)


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_an_interrupted_run_finds_missing_and_existing_samples(kind, tmp_path):
    SampleWriter(tmp_path, kind, SETTINGS).add(batch(0, 1, 2))
    SampleWriter(tmp_path, kind, SETTINGS).add(batch(7, 8))  # another process, or a later start
    writer = SampleWriter(tmp_path, kind, SETTINGS)
    assert writer.held(range(10)) == {0, 1, 2, 7, 8}
    assert writer.held(range(2)) == {0, 1}
    read = list(writer.read({1, 2, 8}, 2))
    assert [index for part in read for index in part.indices] == [1, 2, 8]
    for part in read:
        expected = batch(*part.indices)
        assert all(torch.equal(a, b) for a, b in zip(part[1:5], expected[1:5], strict=True))


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_the_finished_folder(kind, tmp_path):
    writer = SampleWriter(tmp_path, kind, SETTINGS)
    for part in (batch(3, 4), batch(0, 1, 2)):
        writer.add(part)
    writer.close()
    assert not list(tmp_path.glob("*part*"))
    with np.load(tmp_path / "samples.npz") as table:
        assert table["indices"].tolist() == [0, 1, 2, 3, 4]
        assert table["labels"].tolist() == [0, 1, 2, 0, 1]
        assert table["evaluations"].tolist() == [10, 11, 12, 13, 14]
        if kind == "npz":
            np.testing.assert_array_equal(table["images"], IMAGES[:5].permute(0, 2, 3, 1).numpy())
    if kind == "png":
        with Image.open(tmp_path / "000003.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), IMAGES[3, 0].numpy())
    more = SampleWriter(tmp_path, kind, SETTINGS)  # a longer run with the same settings
    assert more.held(range(10)) == {0, 1, 2, 3, 4}
    more.add(batch(5))
    more.close()
    assert SampleWriter(tmp_path, kind, SETTINGS).held(range(10)) == {0, 1, 2, 3, 4, 5}
    sizes = [len(part.indices) for part in SampleWriter(tmp_path, kind, SETTINGS).read(set(range(6)), 4)]
    assert sizes == [4, 2]  # never all samples at once


def test_a_lost_or_empty_image_is_missing(tmp_path):
    writer = SampleWriter(tmp_path, "png", SETTINGS)
    writer.add(batch(0, 1, 2))
    (tmp_path / "000001.png").unlink()
    (tmp_path / "000002.png").write_bytes(b"")
    assert writer.held(range(3)) == {0}
    writer.add(batch(1, 2))
    writer.close()
    assert writer.held(range(3)) == {0, 1, 2}
    assert np.load(tmp_path / "samples.npz")["indices"].tolist() == [0, 1, 2]


def test_a_damaged_image_is_named(tmp_path):
    SampleWriter(tmp_path, "png", SETTINGS).add(batch(0, 1, 2))
    (tmp_path / "000001.png").write_bytes((tmp_path / "000001.png").read_bytes()[:50])
    with pytest.raises(UsageError, match=r"cannot read the sample .*000001\.png: .*; delete it"):
        list(SampleWriter(tmp_path, "png", SETTINGS).read({0, 1}, 2))


def test_a_truncated_part_counts_as_missing(tmp_path):
    writer = SampleWriter(tmp_path, "npz", SETTINGS)
    writer.add(batch(0, 1))
    writer.add(batch(2, 3))
    part = tmp_path / "samples.part_000002.npz"
    part.write_bytes(part.read_bytes()[:-40])
    assert writer.held(range(4)) == {0, 1}


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    SampleWriter(tmp_path, "png", SETTINGS).add(batch(0))
    other = {"seed": 1, "solver": {"method": "heun", "num_steps": 5}}
    with pytest.raises(UsageError, match=r"other settings \(solver\.num_steps was 4, now 5\): empty it"):
        SampleWriter(tmp_path, "png", other)
    with pytest.raises(UsageError, match="format was png, now npz"):
        SampleWriter(tmp_path, "npz", SETTINGS)
    assert json.loads((tmp_path / "samples.json").read_text()) == {"format": "png", **SETTINGS}


def test_images_of_unknown_settings_are_not_mixed_in(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "000000.png")
    with pytest.raises(UsageError, match="already holds png files"):
        SampleWriter(tmp_path, "png", SETTINGS)
    assert not (tmp_path / "samples.json").exists()


@pytest.mark.parametrize(("count", "steps"), [(1, [3, 6, 9, 10]), (2, [6, 10]), (3, [9, 10])])
def test_the_progress_bar_counts_the_samples_of_all_processes(count, steps, monkeypatch):
    """The main process draws every `count`-th batch of 3 samples, and assumes that the others keep up."""

    class Bar:
        def __init__(self, total, **settings):
            self.n, self.total, self.shown = 0, total, []

        def update(self, number):
            self.n += number
            self.shown.append(self.n)

        def __enter__(self):
            bars.append(self)
            return self

        def __exit__(self, *error):
            pass

    class Several(Processes):
        def from_main(self, value):
            return value

    bars = []
    monkeypatch.setattr(module, "progress_bar", Bar)
    processes = Several(0, count)
    starts = processes.share(range(0, 10, 3))
    draw = lambda missing: (batch(*missing[start : start + 3]) for start in starts)  # noqa: E731
    drawn = list(read_or_draw(range(10), draw, None, 3, processes))
    assert len(drawn) == len(starts)
    assert bars[0].total == 10
    assert sorted(set(bars[0].shown)) == steps
