"""Conditions concatenated to x_t: fractions of classes, and masked images whose holes reveal nothing."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from datasets_prep.conditions import LabelMaps, MaskedImages, class_shares
from datasets_prep.image_dataset import DatasetFacts, ImageDataset
from datasets_prep.label_maps.segmented_dataset import NO_CLASS, MapClasses, SegmentedDataset
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from runtime.precision import Machine

MACHINE = Machine(torch.device("cpu"), "fp32")
SIDE = 16
CLASSES = MapClasses(("nothing", "left", "right", "sky", "sea"), mirrored=((1, 2),))


def random(shape, high, seed):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def halved(maps, classes, times):
    """LFM's method: one-hot, then repeated bilinear halving."""
    shares = functional.one_hot(maps.long().clamp(max=classes), classes + 1)[..., :classes].permute(0, 3, 1, 2).float()
    for _ in range(times):
        shares = functional.interpolate(shares, scale_factor=0.5, mode="bilinear", align_corners=False, antialias=False)
    return shares


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_class_fractions_equal_lfms_halvings_of_the_one_hot_map(times):
    maps = random((3, 16, 24), 7, seed=times)
    maps[0, :5, :7] = NO_CLASS
    shares = class_shares(maps, 7, 2**times)
    assert shares.dtype == torch.float32
    assert torch.equal(shares, halved(maps, 7, times))  # exact, because all values are multiples of powers of two


def test_unlabeled_pixels_count_for_no_class():
    maps = torch.full((1, 4, 4), 3, dtype=torch.uint8)
    maps[0, :2, :2] = NO_CLASS
    maps[0, 0, 2], maps[0, 3, 3] = 5, 1  # 5 is not a class either
    shares = class_shares(maps, 5, 2)
    assert shares.sum(1).tolist() == [[[0, 0.75], [1, 1]]]
    assert shares[0, 3].tolist() == [[0, 0.75], [1, 0.75]]
    assert shares[0, 1].tolist() == [[0, 0], [0, 0.25]]
    assert not shares[0, [0, 2, 4]].any()


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8, 8), 2, SIDE, {}), "tiny")  # factor 4


def dataset_of(images):
    facts = DatasetFacts("folder", SIDE, 3, None, True, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, "x")


def square(number):
    """A hole of 7 x 6 pixels, shifted by `number`. Its edges lie inside latent pixels."""
    hole = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    hole[2 + number : 9 + number, 3:9] = True
    return hole


UNMIRRORED = torch.zeros(2, dtype=torch.bool)
PLACES = torch.arange(2)


def test_hidden_pixels_have_no_influence(autoencoder):
    images, noise = random((2, 3, SIDE, SIDE), 256, seed=0), torch.randn(2, 2, 4, 4)
    changed = torch.where(torch.stack([square(0), square(1)])[:, None], 255 - images, images)
    for space in (autoencoder, PixelSpace(3)):
        conditions = [MaskedImages(dataset_of(data), space, square, MACHINE) for data in (images, changed)]
        one, other = (condition.read(PLACES, UNMIRRORED, [0, 1]) for condition in conditions)
        assert torch.equal(one, other)
        assert torch.equal(conditions[0].encode(one, noise), conditions[1].encode(other, noise))
        outside = images.clone()
        outside[:, :, 0, 0] ^= 255
        third = MaskedImages(dataset_of(outside), space, square, MACHINE)
        assert not torch.equal(
            third.encode(third.read(PLACES, UNMIRRORED, [0, 1]), noise), conditions[0].encode(one, noise)
        )


def test_the_condition_is_the_masked_images_latent_and_the_mask(autoencoder):
    """The masked image is (1 - m) image in [0, 1], scaled to [-1, 1], encoded and sampled from the posterior.

    The mask is 2 m - 1, resized by nearest neighbor.
    """
    images, noise = random((2, 3, SIDE, SIDE), 256, seed=1), torch.randn(2, 2, 4, 4)
    condition = MaskedImages(dataset_of(images), autoencoder, square, MACHINE)
    raw = condition.read(PLACES, UNMIRRORED, [5, 0])
    assert (raw.dtype, raw.shape) == (torch.uint8, (2, 4, SIDE, SIDE))
    holes = torch.stack([square(5), square(0)])[:, None].float()
    pixels = (1 - holes) * images / 255 * 2 - 1
    posterior = autoencoder.network.encode(pixels).latent_dist
    expected = (posterior.mean + posterior.std * noise - autoencoder.mean) / autoencoder.std
    map_ = condition.encode(raw, noise)
    assert condition.dense.channels == map_.shape[1] == 3
    torch.testing.assert_close(map_[:, :2], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(map_[:, 2:], 2 * holes[:, :, ::4, ::4] - 1)  # nearest neighbor takes the first of four pixels
    assert map_[:, 2].unique().tolist() == [-1, 1]
    assert not torch.equal(condition.encode(raw, -noise)[:, :2], map_[:, :2])


def test_images_are_encoded_in_the_machines_precision(autoencoder):
    images, noise = random((2, 3, SIDE, SIDE), 256, seed=1), torch.randn(2, 2, 4, 4)
    exact, rounded = (
        MaskedImages(dataset_of(images), autoencoder, square, Machine(torch.device("cpu"), precision))
        for precision in ("fp32", "bf16")
    )
    raw = exact.read(PLACES, UNMIRRORED, [5, 0])
    assert not torch.equal(rounded.encode(raw, noise), exact.encode(raw, noise))
    torch.testing.assert_close(rounded.encode(raw, noise), exact.encode(raw, noise), rtol=0, atol=0.5)


def test_mirroring_applies_to_the_image_but_not_to_the_mask():
    images = random((2, 3, SIDE, SIDE), 255, seed=2) + 1
    condition = MaskedImages(dataset_of(images), PixelSpace(3), square, MACHINE)
    raw = condition.read(PLACES, torch.tensor([False, True]), [0, 0])
    hole = square(0)
    assert torch.equal(raw[:, 3] > 0, hole.expand(2, -1, -1))
    assert torch.equal(raw[0, :3, ~hole], images[0, :, ~hole])
    assert torch.equal(raw[1, :3, ~hole], images[1].flip(-1)[:, ~hole])
    assert not raw[:, :3, hole].any()


def test_masks_depend_on_draws_and_images_on_indices():
    images = random((4, 3, SIDE, SIDE), 255, seed=3) + 1
    condition = MaskedImages(dataset_of(images), PixelSpace(3), square, MACHINE)
    raw = condition.read(torch.tensor([3, 3]), UNMIRRORED, [2, 4])
    for row, number in zip(raw, (2, 4), strict=True):
        assert torch.equal(row[3] > 0, square(number))
        assert torch.equal(row[:3, ~square(number)], images[3][:, ~square(number)])
    shown = condition.show(raw)
    assert (shown[:, :, square(2) & square(4)] == 128).all()
    assert torch.equal(shown[0][:, ~square(2)], images[3][:, ~square(2)])


def test_the_padding_is_never_hidden():
    facts = DatasetFacts("fashion_mnist", SIDE, 3, SIDE - 4, False, ())
    images = random((1, 3, SIDE, SIDE), 255, seed=3) + 1
    dataset = ImageDataset(facts, "train", np.zeros(1), images.__getitem__, "x")
    condition = MaskedImages(
        dataset, PixelSpace(3), lambda draw: torch.ones(SIDE - 4, SIDE - 4, dtype=torch.bool), MACHINE
    )
    raw = condition.read(torch.tensor([0]), torch.tensor([False]), [0])[0]
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[2:-2, 2:-2] = True
    assert torch.equal(raw[3] > 0, inside)
    assert torch.equal(raw[:3], images[0] * ~inside)


def maps_of(maps):
    facts = DatasetFacts("celeba", SIDE, 3, None, True, ())
    images = torch.zeros(len(maps), 3, SIDE, SIDE, dtype=torch.uint8)
    return SegmentedDataset(facts, "train", np.zeros(len(maps)), images.__getitem__, "x", CLASSES, maps.__getitem__)


def test_mirroring_a_map_swaps_left_and_right_classes(autoencoder):
    maps = random((2, SIDE, SIDE), 5, seed=4)
    condition = LabelMaps(maps_of(maps), autoencoder)
    assert (condition.dense.channels, condition.dense.classes) == (2, 5)
    raw = condition.read(PLACES, torch.tensor([False, True]), [7, 8])
    assert torch.equal(raw[0, 0], maps[0])
    flipped = maps[1].flip(-1)
    assert torch.equal(raw[1, 0] == 1, flipped == 2)
    assert torch.equal(raw[1, 0] == 2, flipped == 1)
    for same in (0, 3, 4):
        assert torch.equal(raw[1, 0] == same, flipped == same)
    shares = condition.encode(raw, torch.randn(2, 2, 4, 4))
    assert torch.equal(shares, halved(raw[:, 0], 5, 2))
    assert condition.show(raw).shape == (2, 3, SIDE, SIDE)
    assert torch.equal(condition.show(raw)[0, :, 0, 0], torch.from_numpy(CLASSES.palette)[maps[0, 0, 0].long()])
