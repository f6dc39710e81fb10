from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets_prep.augmentation.variants import AugmentedMoments, WithVariants
from datasets_prep.datasets import DatasetFacts, FlipOptions, ImageDataset
from datasets_prep.latents import LatentDataset
from datasets_prep.moments import EncodedImages
from models.autoencoders.pixels import PixelSpace
from models.dit import DiTOptions
from models.registry import build_network
from options import UsageError
from runtime.precision import Machine
from training.preparation.augmentation import (
    check_augmentation,
    check_network_takes_augmentation,
    open_variants,
    settle_flips,
)
from training.run import TrainingOptions

FACTS = DatasetFacts("tiny", 8, 1, None, True, ())
IMAGES = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
DATASET = ImageDataset(FACTS, "train", np.zeros(4, int), IMAGES.__getitem__, "f")
LATENTS = LatentDataset(FACTS, "train", np.zeros(4, int), lambda indices, mirrored: torch.zeros(len(indices), 1), "f")
EVERY = DiTOptions(1, 1, augment=("flip", "crop", "color"))
FLIP = DiTOptions(1, 1, augment=("flip",))


def test_conditioned_mirror_images_are_not_part_of_the_distribution():
    assert settle_flips(DiTOptions(), FlipOptions("auto")) == FlipOptions("auto")
    assert settle_flips(DiTOptions(augment=("crop",)), FlipOptions("on")) == FlipOptions("on")
    for flips in ("auto", "off"):
        assert settle_flips(EVERY, FlipOptions(flips)) == FlipOptions("off")
    with pytest.raises(UsageError, match="--augment flip and --flip on contradict each other"):
        settle_flips(EVERY, FlipOptions("on"))


@pytest.mark.parametrize(
    ("network", "given", "dataset", "facts", "message"),
    [
        (DiTOptions(), {"augment_copies": 4}, DATASET, {}, "--augment_copies has no effect without --augment"),
        (DiTOptions(), {"augment_probability": 0.1}, DATASET, {}, "--augment_probability has no effect without"),
        (FLIP, {"augment_copies": 8}, DATASET, {}, "--augment_copies has no effect on --augment flip, because"),
        (EVERY, {}, DATASET, {"dense": True}, "--augment flip crop color works for generation only, because masks"),
        (EVERY, {}, DATASET, {"pairs": True}, "--augment flip crop color: pairs of noise and samples have no images"),
        (EVERY, {}, LATENTS, {}, "changes images before they are encoded, but tiny holds latents: give the folder"),
    ],
)
def test_what_cannot_be_augmented_is_refused(network, given, dataset, facts, message):
    with pytest.raises(UsageError, match=message):
        check_augmentation(network, given, dataset, **{"dense": False, "pairs": False} | facts)


def test_what_can_be_augmented_is_accepted():
    check_augmentation(DiTOptions(), {}, LATENTS, dense=True, pairs=True)
    check_augmentation(EVERY, {"augment_copies": 4, "augment_probability": 0.1}, DATASET, dense=False, pairs=False)


def test_a_network_without_the_input_is_refused():
    check_network_takes_augmentation("DiT-Mi/2", EVERY, build_network("DiT-Mi/2", 8, EVERY))
    check_network_takes_augmentation("own", DiTOptions(), nn.Linear(1, 1))
    with pytest.raises(
        UsageError, match="own takes no parameters of augmentation, so its samples would look augmented"
    ):
        check_network_takes_augmentation("own", EVERY, nn.Linear(1, 1))


def encoded(dataset, encoder, subfolder=""):
    return EncodedImages(dataset, encoder.encode, Machine(torch.device("cpu"), "fp32"), 1)


def test_without_augment_nothing_is_opened():
    source, features = SimpleNamespace(), SimpleNamespace()
    opened = open_variants(DiTOptions(), TrainingOptions(), DATASET, source, PixelSpace(1), features, None, None)
    assert opened == (source, features)


def test_variants_of_images_and_of_an_encoders_features_are_opened(capsys):
    plain, training = encoded(DATASET, PixelSpace(1)), TrainingOptions(augment_copies=3, augment_probability=0.25)
    source, features = open_variants(EVERY, training, DATASET, plain, PixelSpace(1), plain, PixelSpace(1), encoded)
    assert isinstance(source, AugmentedMoments)
    assert isinstance(features, WithVariants)
    indices, straight = torch.tensor([1, 4 + 3 * 2 + 1]), torch.zeros(2, dtype=torch.bool)
    assert torch.equal(source.moments(indices, straight), features.moments(indices, straight))
    assert "flip crop color; variants of each image: 3, drawn with probability 0.25" in capsys.readouterr().out


def test_the_mirror_image_alone_is_one_variant(capsys):
    plain = encoded(DATASET, PixelSpace(1))
    source, _ = open_variants(FLIP, TrainingOptions(), DATASET, plain, PixelSpace(1), None, None, encoded)
    images, mirrored = source.moments(torch.tensor([2, 4 + 2]), torch.zeros(2, dtype=torch.bool))
    assert torch.equal(mirrored, images.flip(2))
    assert source.parameters(torch.arange(8)).flatten().tolist() == [0.0] * 4 + [1.0] * 4
    assert "variants of each image: 1" in capsys.readouterr().out
