import numpy as np
import pytest
import torch

import evaluation.report.nearest
from datasets_prep.datasets import DatasetFacts, ImageDataset
from evaluation.report.nearest import NearestOptions, find_nearest, nearest_images
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
