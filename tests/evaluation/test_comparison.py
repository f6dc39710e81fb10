"""End-to-end tests of fid_score.py, cal_inpainting.py and compute_dataset_stat.py."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from evaluation import comparison
from evaluation.features.registry import FeatureOptions
from evaluation.score import ScoreOptions
from options import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., str]:
    """`run(script, *arguments)` runs a script's main function in this process and returns its output."""

    def call(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / "pytorch_fid" / f"{script}.py"))["main"]()
        return capsys.readouterr().out

    return call


def test_fid_of_folders_equals_pip_pytorch_fids(run, inception_weights, image_folders, tmp_path):
    from pytorch_fid import fid_score, inception

    with mock.patch.object(inception, "load_state_dict_from_url", return_value=torch.load(inception_weights)):
        network = inception.InceptionV3([0]).eval()
    moments = []
    for folder in image_folders:
        files = sorted(folder.iterdir())
        moments += fid_score.calculate_activation_statistics(files, network, 16, 64, "cpu", num_workers=0)
    expected = fid_score.calculate_frechet_distance(*moments)
    assert expected > 0.1

    np.save(tmp_path / "real.npy", {"mu": moments[2], "sigma": moments[3]})
    output = tmp_path / "result.json"
    flags = ["--dims", 64, "--feature_weights", inception_weights, "--device", "cpu", "--no-error_bar"]
    for real in (image_folders[1], tmp_path / "real.npy"):
        printed = run("fid_score", image_folders[0], real, *flags, "--output_json", output)
        result = json.loads(output.read_text())
        assert result["value"] == pytest.approx(expected, rel=1e-4)
        assert printed == f"FID (64 features) {result['value']:.3f} (70 samples)\n"
        assert result["warnings"][0].startswith("70 samples are fewer")
    assert result["samples"] == 70


@pytest.mark.parametrize(("size", "refused"), [(32, True), (28, False)])
def test_a_size_that_a_dataset_reaches_by_padding_is_refused(
    size, refused, fashion_mnist_dir, image_folders, monkeypatch
):
    def stop(*arguments):
        raise RuntimeError("sizes are accepted")

    monkeypatch.setattr(comparison, "_choose_features", stop)
    given = comparison.ComparisonOptions(image_size=size, datadir=str(fashion_mnist_dir))
    folder, others = str(image_folders[0]), (ScoreOptions(), FeatureOptions(), torch.device("cpu"))
    kind, match = (UsageError, "28 x 28 images, .* use --image_size 28$") if refused else (RuntimeError, "accepted")
    with pytest.raises(kind, match=match):
        comparison.compare(folder, "fashion_mnist", given, *others)


def test_fid_score_of_two_files_needs_no_network(tmp_path):
    for name, offset in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(4, offset), sigma=np.eye(4))
    command = [sys.executable, "pytorch_fid/fid_score.py", "--batch_size", "3", tmp_path / "a.npz", tmp_path / "b.npz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Frechet distance 16.000 (unknown number of samples)")


def test_two_paths_are_required_and_may_be_equal(run, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert run("fid_score", tmp_path / "a.npz", tmp_path / "a.npz").startswith("Frechet distance 0")
    with pytest.raises(UsageError, match="expected two paths"):
        run("fid_score", tmp_path / "a.npz")


def test_pair_scores_need_images_rather_than_statistics(run, tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UsageError, match=r"a\.npz.*logits.*pass the images"):
        run("fid_score", tmp_path / "a.npz", tmp_path / "a.npz", "--metrics", "is")


@pytest.fixture(scope="module")
def gray_sets(tmp_path_factory) -> Path:
    """A folder dataset of 28 x 28 images, and a copy of its training images with one image made brighter."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("grey"), np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        (root / "data" / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 200, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / split / f"{index}.png")
    shutil.copytree(root / "data" / "train", root / "fake")
    Image.fromarray(np.asarray(Image.open(root / "fake" / "3.png")) + 50).save(root / "fake" / "3.png")
    return root


def test_a_datasets_statistics_work_as_reference(run, gray_sets, tmp_path):
    flags = ["--features", "fashion_mnist", "--device", "cpu"]
    run(
        "compute_dataset_stat", "--dataset", "folder", "--datadir", gray_sets / "data", "--image_size", 28,
        "--output", tmp_path / "s.npz", *flags,
    )  # fmt: skip
    outputs = [tmp_path / f"{name}.json" for name in ("file", "folder", "dataset")]
    references = [tmp_path / "s.npz", gray_sets / "data" / "train", "folder"]
    for real, output in zip(references, outputs, strict=True):
        more = ["--datadir", gray_sets / "data", "--image_size", 28] if real == "folder" else []
        run("fid_score", gray_sets / "fake", real, "--device", "cpu", "--output_json", output, *more, *flags[:2])
    values = [json.loads(output.read_text())["value"] for output in outputs]
    assert values[0] > 0
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_inpainting_is_scored_by_pairs(run, gray_sets, tmp_path):
    flags = ["--features", "fashion_mnist", "--device", "cpu", "--output_json", tmp_path / "r.json"]
    printed = run("cal_inpainting", gray_sets / "fake", gray_sets / "data" / "train", *flags)
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert set(scores) == {"fid", "p_ids", "u_ids", "psnr", "ssim"}
    assert 1 - 1 / 8 < scores["ssim"]["value"] < 1
    assert 0 <= scores["p_ids"]["value"] <= 1 / 8
    assert "P-IDS" in printed
    with pytest.raises(UsageError, match="validation has no image named 4, 5, 6, 7"):
        run("cal_inpainting", gray_sets / "fake", gray_sets / "data" / "validation", *flags)


def test_pairs_are_matched_by_name(run, tmp_path):
    """The paired files differ in order, suffix and modification time, and some are in subfolders."""
    from PIL import Image

    generator = np.random.default_rng(1)
    names = ["b", "a10", "a9", "deep/c", "Z", "deep/a"]
    offsets = dict(zip(names, (3, 5, 8, 13, 21, 34), strict=True))
    originals = {name: generator.integers(0, 200, (28, 28, 3), dtype=np.uint8) for name in names}
    for folder, order, suffix in (("real", names, "png"), ("fake", sorted(names, key=lambda n: offsets[n] % 5), "bmp")):
        for age, name in enumerate(order):
            path = tmp_path / folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = originals[name] + np.uint8(offsets[name] if folder == "fake" else 0)
            Image.fromarray(image).save(path)
            os.utime(path, (10**9 - age, 10**9 - age))
    flags = ["--features", "fashion_mnist", "--device", "cpu", "--output_json", tmp_path / "r.json"]
    run("cal_inpainting", tmp_path / "fake", tmp_path / "real", *flags)
    score = json.loads((tmp_path / "r.json").read_text())["scores"]["psnr"]
    expected = [20 * np.log10(255 / offset) for offset in offsets.values()]
    assert score["value"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert score["error"] == pytest.approx(np.std(expected, ddof=1) / 6**0.5, rel=1e-6)
