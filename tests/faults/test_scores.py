"""Comparisons that cannot work are one-line errors before the work; those that can work give their value."""

import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.image_dataset import DatasetFacts
from evaluation import checks
from evaluation.checks import check_reference, check_scoring
from evaluation.comparison import ComparisonOptions, compare
from evaluation.features.registry import FEATURES, FeatureOptions, load_features
from evaluation.metrics import compute_metrics
from evaluation.pair_comparison import PairOptions, check_pairs, compare_pairs
from evaluation.score import LabelledImages, ScoreOptions, score_images
from evaluation.sources import open_source
from evaluation.statistics import load_statistics
from evaluation.summary import Gatherer, Summary
from options import UsageError
from tests.fake_features import FakeFeatures, MeanColors, Pixels

FACTS = DatasetFacts("toy", 28, 3, None, False, ())
CPU = torch.device("cpu")


def pixels(count: int, side: int = 28, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_set(folder: Path, count: int, side: int = 28, seed: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    for index, values in enumerate(pixels(count, side, seed)):
        Image.fromarray(values).save(folder / f"{side:02d}_{index:03d}.png")
    return str(folder)


def score(generated: str, real: str, *metrics: str, size: int | None = None, **features) -> dict:
    scoring = ScoreOptions(metrics or ("fid",), error_bar=False)
    chosen = FeatureOptions(**{"features": "fashion_mnist", **features})
    return compare(generated, real, ComparisonOptions(image_size=size), scoring, chosen, CPU)


@pytest.fixture
def no_features(monkeypatch):
    """Loading the feature network is an error: nothing may be computed."""
    monkeypatch.setattr("evaluation.comparison.load_features", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr("evaluation.pair_comparison.load_features", lambda *_: pytest.fail("the work has begun"))


# Metrics, and the numbers of samples and of reference images from which on they are defined.
FEWEST = {"fid": (2, 2), "kid": (2, 2), **dict.fromkeys(("precision", "recall", "density", "coverage"), (4, 6))}


@pytest.mark.parametrize("metric", FEWEST)
def test_too_few_images_are_refused_before_the_work(tmp_path, monkeypatch, metric):
    samples, real = FEWEST[metric]
    sets = [write_set(tmp_path / name, count, seed=count) for name, count in (("fake", samples), ("real", real))]
    few = [write_set(tmp_path / f"few_{name}", count - 1) for name, count in (("fake", samples), ("real", real))]
    assert np.isfinite(score(*sets, "fid", metric)["scores"][metric]["value"])
    monkeypatch.setattr("evaluation.comparison.load_features", lambda *_: pytest.fail("the work has begun"))
    for pair, what in (((few[0], sets[1]), f"{samples} samples"), ((sets[0], few[1]), f"{real} reference images")):
        with pytest.raises(UsageError, match=f"^--metrics {metric} needs at least {what}, but there are "):
            score(*pair, metric)
    tables = [torch.zeros(count, 3) for count in (samples, real - 1)]
    with pytest.raises(UsageError, match=f"--metrics {metric} needs at least"):  # whoever calls it
        compute_metrics([metric], *(Summary(len(rows), {}, rows=rows) for rows in tables))


def test_samples_alone_decide_on_a_score_without_reference():
    for metric, real in (("is", 1), ("fid", 2)):
        check_scoring(Pixels(), (metric,), 2, real, FACTS)
    with pytest.raises(UsageError, match="needs at least 2 reference images, but there are 1"):
        check_scoring(Pixels(), ("is", "fid"), 2, 1, FACTS)


def test_an_inception_score_of_few_samples_is_warned_of():
    class Classes(Pixels):
        outputs = {"features": 3, "logits": 10}  # noqa: RUF012

        def logits(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0, :10].float()

    for count, warned in ((99, True), (100, False)):
        images = torch.from_numpy(pixels(count)).permute(0, 3, 1, 2)
        result = score_images(
            [LabelledImages(images, range(count))],
            Classes(),
            Summary(None, {}),
            (),
            ScoreOptions(("is",), error_bar=False),
        )
        assert any("too few for an Inception Score" in text for text in result["warnings"]) == warned


@pytest.mark.parametrize("sides", [((28,), (16,)), ((28,), (28, 16)), ((28, 16), (28,))])
def test_other_sizes_are_refused_before_the_work(tmp_path, no_features, sides):
    for name, chosen in zip(("fake", "real"), sides, strict=True):
        for side in chosen:
            write_set(tmp_path / name, 3, side)
    with pytest.raises(
        UsageError, match=r"the samples are (28 x 28|mixed), the reference is (16 x 16|28 x 28|mixed).*--image"
    ):
        score(str(tmp_path / "fake"), str(tmp_path / "real"))


def test_sets_of_mixed_sizes_are_compared_as_before(tmp_path, monkeypatch):
    """Even if one of them looks uniform at first sight."""
    monkeypatch.setattr(checks, "MEASURED", 3)
    monkeypatch.setitem(FEATURES, "inception", MeanColors)
    for name in ("fake", "real"):
        write_set(tmp_path / name, 5, 16)
        if name == "fake":
            Image.fromarray(pixels(1, 20)[0]).save(tmp_path / name / "16_000b.png")  # not among the three
        else:
            write_set(tmp_path / name, 5, 20)
    fake, real = (str(tmp_path / name) for name in ("fake", "real"))
    assert checks.resolution(open_source(fake)) == [16, 16]
    assert checks.resolution(open_source(real)) == "mixed"
    assert score(fake, real, features=None)["resolution"] == "mixed"
    result = score(fake, real, features=None, size=16)
    assert result["resolution"] == [16, 16]


def test_an_npz_is_resized_like_a_folder(tmp_path):
    fake, real = write_set(tmp_path / "fake", 8, 40), write_set(tmp_path / "real", 8, 28, seed=1)
    np.savez(tmp_path / "fake.npz", images=pixels(8, 40))
    values = [score(path, real, "fid", "kid", size=28)["scores"] for path in (fake, str(tmp_path / "fake.npz"))]
    assert values[0] == values[1]
    with pytest.raises(UsageError, match="samples are 40 x 40, the reference is 28 x 28"):
        score(str(tmp_path / "fake.npz"), real)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"arr_0": pixels(8).transpose(0, 3, 1, 2)}, r"uint8 \[8, 3, 28, 28\]"),
        ({"arr_0": np.zeros((8, 28, 28, 4), np.uint8)}, r"uint8 \[8, 28, 28, 4\]"),
        ({"images": np.zeros((8, 28, 28), np.uint8)}, r"uint8 \[8, 28, 28\]"),
        ({"images": np.zeros((0, 28, 28, 3), np.uint8)}, r"uint8 \[0, 28, 28, 3\]"),
        ({"images": np.zeros((8, 28, 28, 3))}, r"float64 \[8, 28, 28, 3\]"),
        ({"samples": pixels(8), "labels": np.zeros(8)}, "samples, labels"),
        ({}, "nothing"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, no_features, content, found):
    np.savez(tmp_path / "x.npz", **content)
    for order in (1, -1):
        sets = [str(tmp_path / "x.npz"), write_set(tmp_path / "real", 8)][::order]
        with pytest.raises(UsageError, match=rf"x\.npz: expected images uint8 \[N, H, W, 3\] .*, but found {found}$"):
            score(*sets)


def test_a_reference_batch_serves_all_metrics(tmp_path):
    """ADM's files hold images and the statistics of a larger set: the Fréchet distance is that from the statistics."""
    images, other = pixels(9), pixels(9, seed=1)
    write_set(tmp_path / "real", 9)
    np.savez(tmp_path / "fake.npz", arr_0=other)
    batch = {"arr_0": images, "mu": np.full(128, 0.5), "sigma": np.eye(128), "mu_s": np.zeros(8), "sigma_s": np.eye(8)}
    np.savez(tmp_path / "reference.npz", **batch)
    np.savez(tmp_path / "statistics.npz", mu=batch["mu"], sigma=batch["sigma"])
    fake, both, real, statistics = (
        str(tmp_path / name) for name in ("fake.npz", "reference.npz", "real", "statistics.npz")
    )
    found = score(fake, both, "precision", "kid", "fid")
    expected = score(fake, real, "precision", "kid")["scores"]
    assert {name: found["scores"][name]["value"] for name in expected} == {k: v["value"] for k, v in expected.items()}
    distance = score(fake, statistics, "fid")
    assert found["scores"]["fid"]["value"] == pytest.approx(distance["value"], rel=1e-12)
    assert found["reference"]["rows"] == 9
    assert found["reference_samples"] is None  # the statistics may come from more images
    assert score(both, real, "fid", "recall")["scores"]["recall"]["value"] == 1
    with pytest.raises(UsageError, match=r"statistics\.npz holds only .*pass the images instead"):
        score(fake, statistics, "fid", "precision")


def test_statistics_of_other_features_are_refused_before_the_work(tmp_path, monkeypatch):
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    fake = write_set(tmp_path / "fake", 3)
    monkeypatch.setattr("evaluation.comparison.score_images", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr("evaluation.comparison.summarise_set", lambda *_: pytest.fail("the work has begun"))
    for pair in ((fake, str(tmp_path / "s.npz")), (str(tmp_path / "s.npz"), fake)):
        with pytest.raises(UsageError, match="cannot compare statistics of 128 features with statistics of 5 features"):
            score(*pair)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Summary(9, {"resolution": [32, 32]}), "samples are 28 x 28, the reference is 32 x 32"),
        (Summary(9, {"features": {"name": "x", "label": "X", "sha256": "1" * 64}}), "different feature networks"),
        (Summary(1, {}), "needs at least 2 reference images"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_sampling(reference, message):
    with pytest.raises(UsageError, match=message):
        check_reference(reference, Pixels(), ("fid",), 9, FACTS)


def test_a_network_for_other_sizes_is_refused_before_sampling():
    features = load_features("fashion_mnist", FeatureOptions(), "cpu")
    check_scoring(features, ("fid",), 9, None, FACTS)
    with pytest.raises(UsageError, match="fashion_mnist needs 28 x 28 images"):
        check_scoring(features, ("fid",), 9, None, DatasetFacts("toy", 32, 3, None, False, ()))


def test_samples_of_another_size_are_refused_at_the_first_batch():
    def batches():
        yield LabelledImages(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), range(2))
        pytest.fail("a second batch was drawn")

    with pytest.raises(UsageError, match="samples are 8 x 8, the reference is 4 x 4"):
        score_images(batches(), Pixels(), Summary(9, {"resolution": [4, 4]}))


def test_features_that_are_not_finite_are_refused():
    """A covariance with a NaN gave the distance 0, and singular ones a traceback."""

    class Broken(FakeFeatures):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            values = images.float().mean((2, 3))
            return torch.where(values > 128, torch.nan, values)

    images = torch.zeros(5, 3, 2, 2, dtype=torch.uint8)
    gatherer = Gatherer(Broken(), ["moments"])
    gatherer.update(images)
    images[3:] = 255
    with pytest.raises(
        UsageError,
        match=r"2 of 5 images have features that are not finite \(NaN or infinity\): index 13, 14; .*network fake",
    ):
        gatherer.update(images, range(10, 15))


@pytest.mark.parametrize(
    "metadata",
    [
        {"count": "many"}, {"count": 1.5}, {"resolution": 256}, {"resolution": [1, 2, 3]}, {"resolution": ["a", "b"]},
        {"features": "inception"}, {"features": {"name": "inception"}}, {"features": {"name": 1, "label": "", "sha256": ""}},
    ],
)  # fmt: skip
def test_metadata_of_another_type_are_refused(tmp_path, metadata):
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2), metadata=np.array(json.dumps(metadata)))
    with pytest.raises(UsageError, match=r"s\.npz: expected a"):
        load_statistics(tmp_path / "s.npz")


def test_only_statistics_are_read_from_a_file_with_more(tmp_path):
    names = np.array([{"a": 1}], dtype=object)
    np.savez(tmp_path / "s.npz", mu=np.ones(2), sigma=np.eye(2), files=names)
    assert load_statistics(tmp_path / "s.npz").mean.tolist() == [1, 1]


def test_folders_may_be_named_like_files(tmp_path):
    real = write_set(tmp_path / "real", 4)
    for name in ("set.npz", "set.npy"):
        assert score(write_set(tmp_path / name, 4), real)["value"] == pytest.approx(0, abs=1e-9)


def pairs(fake: str, real: str, lpips: bool = False) -> dict:
    options = ComparisonOptions(batch_size=3), ScoreOptions(error_bar=False), PairOptions(lpips)
    return compare_pairs(fake, real, *options, FeatureOptions("fashion_mnist"), CPU)


@pytest.mark.parametrize(("lpips", "side"), [(False, 6), (True, 30)])
def test_pairs_too_small_for_a_metric_are_refused_before_the_work(tmp_path, no_features, lpips, side):
    sets = [write_set(tmp_path / name, 4, side) for name in ("fake", "real")]
    smallest = side + 1
    with pytest.raises(
        UsageError,
        match=rf"SSIM or --lpips needs .* {smallest} x {smallest} pixels, but .*00 of fake is {side} x {side}",
    ):
        pairs(*sets, lpips)
    check_pairs(PairOptions(lpips), ScoreOptions(), 4, smallest)
    with pytest.raises(UsageError, match=f"needs images of at least {smallest} pixels per side, but these have {side}"):
        check_pairs(PairOptions(lpips), ScoreOptions(), 4, side)


def test_partners_of_another_size_are_named(tmp_path, monkeypatch, no_features):
    for name in ("fake", "real"):
        write_set(tmp_path / name, 9)
    Image.fromarray(pixels(1, 40)[0]).save(tmp_path / "real" / "28_004.png")
    message = "28_004 is 28 x 28 in fake, but 40 x 40 in real; use --image_size"
    with pytest.raises(UsageError, match=message):
        pairs(str(tmp_path / "fake"), str(tmp_path / "real"))
    # If it is not among the images that are measured first, the batch that holds it is refused.
    monkeypatch.setattr(checks, "MEASURED", 2)
    monkeypatch.setattr("evaluation.pair_comparison.load_features", load_features)
    with pytest.raises(UsageError, match=message):
        pairs(str(tmp_path / "fake"), str(tmp_path / "real"))


def test_pairs_need_names(tmp_path, no_features):
    """An LMDB is a folder too, but its images have no names."""
    with lmdb.open(str(tmp_path / "set.lmdb"), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        transaction.put(b"0", pixels(1)[0].tobytes())
    for order in (1, -1):
        with pytest.raises(UsageError, match=r"set\.lmdb: expected a folder of images, to be paired by name"):
            pairs(*[str(tmp_path / "set.lmdb"), write_set(tmp_path / "real", 1)][::order])


def test_one_pair_is_too_few_for_a_distance(tmp_path, no_features):
    sets = [write_set(tmp_path / name, 1) for name in ("fake", "real")]
    with pytest.raises(UsageError, match="--metrics fid needs at least 2 samples, but there are 1"):
        pairs(*sets)
