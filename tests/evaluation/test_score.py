import numpy as np
import pytest
import torch

from command_line import parse_options
from evaluation.metrics import METRICS, Metric
from evaluation.score import LabelledImages, MetricOptions, ScoreOptions, result_line, score_images
from evaluation.statistics import Statistics
from evaluation.summary import Gatherer, Summary
from options import UsageError
from sampling.sampler import GeneratedBatch
from tests.fake_features import Pixels


class RoundedPixels(Pixels):
    precision = "bf16"

    def exact(self) -> Pixels:
        return Pixels()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return super().features(images).bfloat16().float()


def random_images(count: int, seed: int, side: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def reference(images: torch.Tensor) -> Summary:
    gatherer = Gatherer(Pixels(), ["moments", "rows"])
    gatherer.update(images)
    return gatherer.summary({"dataset": "toy"})


def labeled(images: torch.Tensor, batch: int = 7) -> list[LabelledImages]:
    indices = torch.arange(len(images))
    return [LabelledImages(images[i], i.tolist(), i % 2) for i in indices.split(batch)]


def test_the_result_says_how_it_was_made():
    real = reference(random_images(300, 1))
    result = score_images(
        labeled(random_images(200, 0)), Pixels(), real, ("cat", "dog"), ScoreOptions(("kid", "fid", "precision"))
    )
    assert result["metric"] == "KID (pixels)"
    assert list(result["scores"]) == ["kid", "fid", "precision"]
    assert result["scores"]["fid"]["metric"] == "FD (pixels)"
    assert all(score["error"] > 0 for score in result["scores"].values())
    assert (result["value"], result["error"]) == tuple(result["scores"]["kid"][key] for key in ("value", "error"))
    assert (result["samples"], result["resolution"], result["image_format"]) == (200, [4, 4], "png")
    assert result["labels"] == {"cat": 100, "dog": 100}
    assert (result["features"], result["features_sha256"]) == ("pixels", "0" * 64)
    described = result["reference"]
    assert (described["images"], described["rows"], described["dataset"]) == (300, 300, "toy")
    assert described["sha256"] == real.sha256() != reference(random_images(300, 2)).sha256()
    assert result["code_version"]
    assert "200 samples are fewer than 10000" in result["warnings"][0]
    line = result_line(result)
    assert f"FD (pixels) {result['scores']['fid']['value']:.3g} ± " in line
    assert "200 samples" in line
    assert "\n" not in line


def test_the_value_does_not_depend_on_batches_or_error_bars():
    images, real = random_images(150, 0), reference(random_images(100, 1))
    values = {
        score_images(labeled(images, batch), Pixels(), real, (), ScoreOptions(error_bar=bar))["value"]
        for batch, bar in ((7, True), (150, False))
    }
    assert max(values) == pytest.approx(min(values), rel=1e-9)


def test_few_samples_have_no_error_bar():
    result = score_images(labeled(random_images(99, 0)), Pixels(), reference(random_images(50, 1)), (), ScoreOptions())
    assert result["error"] is None
    assert "±" not in result_line(result)


def test_enough_samples_give_no_warning():
    images = random_images(10_000, 0, side=1)
    result = score_images([LabelledImages(images, range(10_000))], Pixels(), reference(images))
    assert result["warnings"] == []
    assert "labels" not in result
    assert result["value"] == pytest.approx(0, abs=1e-9)


def test_jpeg_compression_is_recorded():
    images, real = random_images(50, 0), reference(random_images(50, 1))
    plain, jpeg = (
        score_images(labeled(images), Pixels(), real, (), ScoreOptions(image_format=name)) for name in ("png", "jpg")
    )
    assert jpeg["image_format"] == "jpg"
    assert "through JPEG" in result_line(jpeg)
    assert jpeg["value"] != plain["value"]


def test_another_resolution_and_unknown_metrics_are_refused():
    real = reference(random_images(50, 1))
    with pytest.raises(UsageError, match="samples are 8 x 8, the reference is 4 x 4"):
        score_images(labeled(random_images(50, 0, side=8)), Pixels(), real)
    with pytest.raises(UsageError, match="--metrics fdi: expected one or more of fid, sfid"):
        score_images([], Pixels(), real, (), ScoreOptions(("fdi",)))


@pytest.mark.parametrize("metric", ["sfid", "is"])
def test_metrics_for_inception_are_refused_with_other_features(metric):
    with pytest.raises(UsageError, match="the feature network pixels has no output .*--features inception"):
        score_images(
            labeled(random_images(9, 0)), Pixels(), reference(random_images(9, 1)), (), ScoreOptions((metric,))
        )


def test_a_metric_is_registered_with_one_entry(monkeypatch, capsys):
    first = Metric("mean difference", "rows", lambda a, b: {"shift": float((a.rows.mean() - b.rows.mean()).abs())})
    monkeypatch.setitem(METRICS, "shift", first)
    scoring = parse_options("", [ScoreOptions], ["--metrics", "shift", "fid"])[ScoreOptions]
    images = random_images(50, 0)
    result = score_images(labeled(images), Pixels(), reference(images // 2), (), scoring)
    assert list(result["scores"]) == ["shift", "fid"]
    assert result["metric"] == "mean difference (pixels)"
    assert result["value"] == pytest.approx(float((images.float() - (images // 2).float()).mean() / 255), rel=1e-4)
    with pytest.raises(SystemExit):
        parse_options("", [MetricOptions], ["--help"])
    assert "shift" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--metrics.*'fdi'.*'fid'.*'shift'"):
        parse_options("", [MetricOptions], ["--metrics", "fid", "fdi"])


class Classifier(Pixels):
    """Assigns every image to the second class."""

    outputs, classes = {"features": 3, "probabilities": 2}, ("cat", "dog")

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.2, 0.8]).repeat(len(images), 1)


def test_recognition_needs_a_classifier_of_the_labels():
    images = random_images(21, 0)
    results = [
        score_images(labeled(images), features, reference(images), names)
        for features, names in (
            (Classifier(), ("cat", "dog")),
            (Classifier(), ("dog", "cat")),
            (Classifier(), ()),
            (Pixels(), ("cat", "dog")),
        )
    ]
    assert [result.get("recognised") for result in results] == [10 / 21, None, None, None]


def test_an_unknown_reference_resolution_gives_a_warning():
    real = Summary(None, {}, statistics=Statistics(np.zeros(3), np.eye(3), None))
    result = score_images(labeled(random_images(9, 0)), Pixels(), real)
    assert "does not record its image size" in result["warnings"][-1]
    assert result["reference_samples"] is None


def test_the_effect_of_lower_precision_is_reported(capsys, monkeypatch):
    monkeypatch.setattr("evaluation.precision_effect.COMPARED", 20)
    real = reference(random_images(50, 1))
    images = random_images(30, 0)
    result = score_images(labeled(images), RoundedPixels(), real)
    effect = result["feature_precision_effect"]
    exact = score_images(labeled(images[:20]), Pixels(), real)["value"]
    assert effect["images"] == 20
    assert effect["fp32"] == pytest.approx(exact, rel=1e-9)
    assert effect["bf16"] != effect["fp32"]
    assert "first 20 images" in capsys.readouterr().out


def test_generated_batches_are_scored_with_their_labels():
    images = random_images(20, 0)
    batches = [GeneratedBatch(range(20), images, torch.arange(20) % 4, *torch.full((2, 20), 3))]
    assert score_images(batches, Pixels(), reference(images))["labels"] == {"0": 5, "1": 5, "2": 5, "3": 5}


def test_label_counts_of_many_classes_are_summarized():
    images = random_images(300, 0)
    batch = LabelledImages(images, range(300), torch.arange(300) % 150)
    assert score_images([batch], Pixels(), reference(images))["labels"] == {"classes": 150, "fewest": 2, "most": 2}


@pytest.mark.parametrize("name", ["indices", "labels"])
def test_batches_with_more_indices_or_labels_than_images_are_refused(name):
    images = random_images(4, 0)
    batch = LabelledImages(images, range(4), torch.arange(4) % 2)._replace(**{name: torch.arange(5) % 2})
    with pytest.raises(UsageError, match=f"as many {name} as images in a batch, but got 5 for 4 images"):
        score_images([batch], Pixels(), reference(images))
