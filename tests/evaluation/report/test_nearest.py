import numpy as np
import pytest
import torch

import evaluation.report.nearest
from datasets_prep.datasets import DatasetFacts, ImageDataset
from evaluation.report.nearest import (
    NearestOptions,
    find_nearest,
    memorized,
    nearest_images,
    note_searched,
    pair_with_nearest,
)
from evaluation.report.page import ReportOptions, write_report
from options import UsageError
from runtime.files import read_json
from runtime.pictures import read_sheet
from tests.training.test_loop import stripes


def random_images(count, seed=0):
    return torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def dataset_of(images):
    facts = DatasetFacts("noise", 4, 1, None, True, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, "f")


@pytest.mark.parametrize("batch", [7, 500])
def test_the_nearest_images_are_those_of_a_full_comparison(batch, monkeypatch):
    monkeypatch.setattr(evaluation.report.nearest, "LARGEST_BATCH", batch)
    images, queries = random_images(40), random_images(5, seed=1)
    found = nearest_images(queries, dataset_of(images), flips=False)
    differences = (queries[:, None].double() - images[None].double()).flatten(2).square().mean(2).sqrt()
    expected = differences.topk(3, largest=False)
    torch.testing.assert_close(found.distances.double(), expected.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.images, images[expected.indices])


def test_a_copy_and_its_mirror_image_are_found():
    images = random_images(40)
    queries = torch.stack([images[7], images[11].flip(2)])
    found = nearest_images(queries, dataset_of(images), flips=True)
    assert found.distances[:, 0].tolist() == [0.0, 0.0]
    assert torch.equal(found.images[:, 0], queries)
    assert nearest_images(queries, dataset_of(images), flips=False).distances[1, 0] > 10


def test_the_samples_of_the_last_grid_are_compared(run_folder, monkeypatch, tmp_path, read_page):
    monkeypatch.setattr(evaluation.report.nearest, "open_dataset", lambda options, split: stripes())
    find_nearest(run_folder, NearestOptions(nearest=6))
    result = read_json(run_folder / "samples" / "nearest.json")
    samples = read_sheet(run_folder / "samples" / "step_0000014.png", 4, 1)[:6]
    expected = [
        min((sample - image.float()).square().mean().sqrt().item() for image in (stripes()[0], stripes()[1]))
        for sample in samples.float()
    ]
    assert [row[0] for row in result["distances"]] == pytest.approx(expected, rel=1e-5)
    assert result["memorized_held_out"][0] in (0.0, 1.0)
    assert (result["held_out"], result["step"], result["training_images"]) == (0.0, 14, 40)
    shown = read_sheet(run_folder / "samples" / "nearest.png", 4, 1)
    assert torch.equal(shown[:6], samples)
    write_report([run_folder], ReportOptions(output=str(tmp_path / "page.html")))
    page = read_page(tmp_path / "page.html")
    assert "Median distance to the nearest of 40 training images" in page.text
    assert any("nearest training images" in text for text in page.attributes("img", "alt"))


def test_a_run_without_grids_is_refused(run_folder):
    for path in (run_folder / "samples").glob("step_*.png"):
        path.unlink()
    with pytest.raises(UsageError, match="has no sample grid"):
        find_nearest(run_folder, NearestOptions(nearest=4))


def memorized_share(queries, images):
    return memorized(nearest_images(queries, dataset_of(images), flips=False).distances)[0]


def test_copies_are_memorized_and_independent_images_are_not():
    train, held_out = random_images(60), random_images(60, seed=1)
    noisy = (train[:20].int() + 1).clamp(max=255).byte()
    assert memorized_share(train[:20], train) == 1
    assert memorized_share(noisy, train) == 1
    assert memorized_share(held_out, train) == 0
    assert memorized_share(noisy, held_out) == 0  # the splits must not be swapped


def test_samples_are_compared_with_the_training_split(run_folder, monkeypatch):
    samples = read_sheet(run_folder / "samples" / "step_0000014.png", 4, 1)[:6]
    splits = {"train": torch.cat([samples, random_images(40)]), "validation": random_images(30, seed=1)}
    monkeypatch.setattr(evaluation.report.nearest, "open_dataset", lambda options, split: dataset_of(splits[split]))
    find_nearest(run_folder, NearestOptions(nearest=6))
    result = read_json(run_folder / "samples" / "nearest.json")
    assert result["training_images"] == 46
    assert result["samples"] == 0.0
    assert result["held_out"] > 10
    assert result["memorized_held_out"] == [0.0, 0.0]


def test_the_standard_error_is_the_binomials():
    distances = torch.tensor([[1.0, 9.0], [8.0, 9.0], [8.0, 9.0], [8.0, 9.0]])
    assert memorized(distances) == pytest.approx([0.25, (0.25 * 0.75 / 4) ** 0.5])
    assert memorized(distances[:, :1]) == []


def test_each_sample_is_drawn_to_the_left_of_its_nearest_image(monkeypatch):
    monkeypatch.setattr(evaluation.report.nearest, "SEARCHED", 20)
    images = random_images(40)
    sheet = pair_with_nearest(images[[6, 12, 7]], dataset_of(images), flips=False)
    assert sheet.columns % 2 == 0
    assert torch.equal(sheet.images[0::2], images[[6, 12, 7]])
    assert torch.equal(sheet.images[1:4:2], images[[6, 12]])
    assert not torch.equal(sheet.images[5], images[7])  # not among the twenty that are searched


def test_reduced_images_find_the_same_copies_at_their_own_size():
    images = torch.randint(0, 256, (40, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    queries = torch.stack([images[7], images[11].flip(2)])
    found = nearest_images(queries, dataset_of(images), flips=True, count=2, side=4)
    assert found.distances[:, 0].tolist() == [0.0, 0.0]
    assert torch.equal(found.images[:, 0], queries)
    blocks = images.float().unflatten(3, (4, 3)).unflatten(2, (4, 3)).mean(dim=(3, 5))
    both = torch.stack([blocks, blocks.flip(3)])
    expected = (both - blocks[7]).flatten(2).square().mean(2).sqrt().amin(0).sort().values[1]
    torch.testing.assert_close(found.distances[0, 1], expected)


def test_a_part_of_the_images_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(evaluation.report.nearest, "SEARCHED", 20)
    note_searched(dataset_of(random_images(20)))
    assert capsys.readouterr().err == ""
    note_searched(dataset_of(random_images(40)))
    assert "20 of the 40 training images" in " ".join(capsys.readouterr().err.split())
