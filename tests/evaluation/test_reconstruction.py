import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.datasets import DatasetFacts, DatasetOptions, ImageDataset, open_dataset
from evaluation import reconstruction
from evaluation.reconstruction import draw_reconstructions, measure_reconstruction
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from tests.fake_features import FakeFeatures


class Rows(FakeFeatures):
    label, name, outputs = "FD (rows)", "rows", {"features": 28}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 3))


class Brighter(PixelSpace):
    """Adds two gray levels to every pixel."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return super().decode(latents) + 2 / 127.5


def padded_dataset() -> ImageDataset:
    images = torch.zeros(9, 1, 32, 32, dtype=torch.uint8)
    images[:, :, 2:-2, 2:-2] = torch.randint(200, (9, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    facts = DatasetFacts("toy", 32, 1, 28, False, ())
    return ImageDataset(facts, "validation", np.zeros(9), images.__getitem__, "f")


def test_pixel_space_reconstructs_exactly():
    ratio, statistics = measure_reconstruction(PixelSpace(1), padded_dataset(), Rows(), "cpu", batch_size=4)
    assert ratio == math.inf
    assert statistics.count == 9


def test_psnr_is_computed_on_pixels_in_minus_one_to_one():
    ratio, _ = measure_reconstruction(Brighter(1), padded_dataset(), Rows(), "cpu", batch_size=4)
    assert ratio == pytest.approx(20 * math.log10(255 / 2), abs=1e-4)


def test_a_color_autoencoder_is_evaluated_on_gray_images():
    network = new_autoencoder_kl(3, (8, 8), 2, 32, {})
    ratio, statistics = measure_reconstruction(
        PretrainedAutoencoder(network, "toy"), padded_dataset(), Rows(), "cpu", 4
    )
    assert math.isfinite(ratio)
    assert statistics.count == 9


@pytest.mark.parametrize(
    ("name", "least"), [("fashion_mnist_autoencoder", 29.5), ("fashion_mnist_autoencoder_v2", 31.0)]
)
def test_the_bundled_autoencoders_reconstruct_test_images(fashion_mnist_dir, name, least):
    autoencoder = load_autoencoder(AutoencoderOptions(f"pretrained/{name}"), 1)
    images = open_dataset(DatasetOptions(datadir=str(fashion_mnist_dir)), "validation").head(400)
    ratio, _ = measure_reconstruction(autoencoder, images, Rows(), "cpu", batch_size=100)
    assert ratio > least


def test_the_sheet_shows_images_from_the_whole_split_above_their_reconstructions(tmp_path):
    images = (6 * torch.arange(40, dtype=torch.uint8)).view(40, 1, 1, 1).expand(40, 1, 56, 56)
    facts = DatasetFacts("toy", 56, 1, None, False, ())
    dataset = ImageDataset(facts, "validation", np.zeros(40), images.__getitem__, "f")
    ratio = draw_reconstructions(Brighter(1), dataset, "cpu", tmp_path / "picture.png")
    assert ratio == pytest.approx(20 * math.log10(255 / 2), abs=1e-4)
    with Image.open(tmp_path / "picture.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (2 * 58 + 2, 16 * 58 + 2)
    above, below = (pixels[row, 30::58][:16].astype(int).tolist() for row in (30, 88))
    assert above == [6 * (number * 40 // 16) for number in range(16)]
    assert below == [gray + 2 for gray in above]


def test_the_command_end_to_end(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 4)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{index}.png")
    output, picture = tmp_path / "result.json", tmp_path / "picture.png"
    flags = f"--dataset folder --datadir {tmp_path / 'data'} --image_size 28 --pretrained_autoencoder_ckpt none"
    flags += f" --features fashion_mnist --device cpu --output_json {output} --picture {picture}"
    monkeypatch.setattr("sys.argv", ["reconstruction", *flags.split()])
    reconstruction.main()
    result = json.loads(output.read_text())
    assert (result["images"], result["reference_images"]) == (4, 6)
    assert result["reconstructions"]["value"] == pytest.approx(result["real"]["value"], rel=1e-6)
    assert result["features"]["label"] == "FD (fashion-mnist features)"
    # The sheet is enlarged twice and has lines of 2 pixels between images.
    assert Image.open(picture).size == (2 * (4 * 30 + 2), 2 * (2 * 30 + 2))
    assert "FD (fashion-mnist features)" in capsys.readouterr().out
    assert len(list((tmp_path / "data" / "statistics").iterdir())) == 2
