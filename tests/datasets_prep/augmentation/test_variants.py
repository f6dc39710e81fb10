import json

import numpy as np
import pytest
import torch

from datasets_prep.augmentation.transforms import augment
from datasets_prep.augmentation.variants import AugmentedMoments, VariantRecipe, WithVariants, variants_of
from datasets_prep.datasets import DatasetFacts, DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_encoded
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace, images_to_pixels
from models.autoencoders.pretrained import PretrainedAutoencoder
from runtime.precision import Machine

MACHINE = Machine(torch.device("cpu"), "fp32")
COUNT, COPIES = 5, 3
IMAGES = torch.randint(0, 256, (COUNT, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
RECIPE = VariantRecipe(("flip", "crop", "color"), COPIES, mirrored=False)


def dataset(flips=False):
    facts = DatasetFacts("tiny", 8, 3, None, flips, ())
    return ImageDataset(facts, "train", np.arange(COUNT) % 2, IMAGES.__getitem__, "f")


@pytest.fixture(scope="module")
def autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), 2, 8, {}), "tiny")


def opened(folder, images, encoder, subfolder="", no_cache=False):
    data, cache = DatasetOptions(datadir=str(folder)), LatentCacheOptions(no_cache)
    return open_encoded(images, encoder, data, cache, MACHINE, subfolder=subfolder)


def augmented(folder, encoder, recipe=RECIPE, probability=0.5, images=None, no_cache=False):
    images = images or dataset()
    plain = opened(folder, images, encoder, no_cache=no_cache)
    variants = opened(folder, variants_of(images, recipe), encoder, recipe.name, no_cache)
    return AugmentedMoments(plain, variants, recipe, probability)


def test_variants_are_the_changed_images_with_their_labels():
    variants, table = variants_of(dataset(), RECIPE), RECIPE.parameters(COUNT)
    assert len(variants) == len(table) == COUNT * COPIES
    assert variants.labels.tolist() == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3 + [0] * 3
    for index in range(COUNT * COPIES):
        assert torch.equal(variants[index], augment(IMAGES[index // COPIES], RECIPE.kinds, table[index]))
        assert not torch.equal(variants[index], IMAGES[index // COPIES])


def test_mirror_images_of_the_distribution_have_variants_too():
    """Without --augment flip, half of the variants of a dataset with mirror images are mirrored, unknown to the network."""
    recipe = VariantRecipe(("color",), COPIES, mirrored=True)
    variants, table = variants_of(dataset(flips=True), recipe), recipe.parameters(COUNT)
    assert not variants.facts.flips
    mirrored = []
    for index in range(COUNT * COPIES):
        image = IMAGES[index // COPIES]
        either = [augment(each, ("color",), table[index]) for each in (image, image.flip(2))]
        mirrored.append([torch.equal(variants[index], each) for each in either].index(True))
    assert sum(mirrored) in (7, 8)


@pytest.mark.parametrize("no_cache", [False, True])
def test_images_and_variants_are_read_in_any_order(tmp_path, autoencoder, no_cache):
    source = augmented(tmp_path, autoencoder, no_cache=no_cache)
    assert len(source) == COUNT
    indices = torch.tensor([COUNT + 4, 2, COUNT + 14, 0, 2])
    mirrored = torch.tensor([True, True, False, False, False])  # variants are not mirrored
    pictures = [variants_of(dataset(), RECIPE)[4], IMAGES[2], variants_of(dataset(), RECIPE)[14], IMAGES[0], IMAGES[2]]
    if no_cache:
        pictures[1] = pictures[1].flip(2)
    expected = autoencoder.encode(torch.stack(pictures))
    torch.testing.assert_close(source.moments(indices, mirrored).float(), expected, rtol=2**-9, atol=1e-4)
    assert source.labels[indices].tolist() == [1, 0, 0, 0, 0]
    table = RECIPE.parameters(COUNT)
    assert torch.equal(source.parameters(indices)[[0, 2]], table[[4, 14]])
    assert source.parameters(indices)[[1, 3, 4]].count_nonzero() == 0


def test_variants_have_a_cache_of_their_own(tmp_path, autoencoder):
    opened(tmp_path, dataset(), autoencoder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    augmented(tmp_path, autoencoder)
    augmented(tmp_path, autoencoder, VariantRecipe(("flip",), 1, mirrored=False))
    assert {path: path.read_bytes() for path in before} == before
    manifests = sorted(tmp_path.glob("latent_cache/augmented_*/*/manifest.json"))
    counts = {json.loads(path.read_text())["count"] for path in manifests}
    assert counts == {COUNT * COPIES, COUNT}


@pytest.mark.parametrize(
    "other",
    [
        VariantRecipe(("flip", "crop"), COPIES, mirrored=False),
        VariantRecipe(RECIPE.kinds, COPIES + 1, mirrored=False),
        VariantRecipe(RECIPE.kinds, COPIES, mirrored=True),
    ],
)
def test_another_recipe_has_another_name_and_fingerprint(other):
    assert other.name != RECIPE.name
    assert variants_of(dataset(), other).fingerprint != variants_of(dataset(), RECIPE).fingerprint


def test_variants_replace_images_as_often_as_the_probability_says(tmp_path):
    source = augmented(tmp_path, PixelSpace(3), probability=0.25)
    chosen = torch.arange(COUNT).repeat(2000)
    found = source.choose_variants(chosen, 3, 7)
    assert torch.equal(found, source.choose_variants(chosen, 3, 7))
    assert not torch.equal(found, source.choose_variants(chosen, 3, 8))
    replaced = found >= COUNT
    assert replaced.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(found[~replaced], chosen[~replaced])
    assert torch.equal((found[replaced] - COUNT) // COPIES, chosen[replaced])
    shares = ((found[replaced] - COUNT) % COPIES).bincount() / replaced.sum()
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    for probability, kept in ((0.0, True), (1.0, False)):
        every = augmented(tmp_path, PixelSpace(3), probability=probability).choose_variants(chosen, 3, 7)
        assert torch.all((every < COUNT) == kept)


def test_features_of_variants_come_from_the_changed_images(tmp_path):
    encoder, variants = PixelSpace(3), variants_of(dataset(), RECIPE)
    features = WithVariants(opened(tmp_path, dataset(), encoder), opened(tmp_path, variants, encoder), COPIES)
    found = features.moments(torch.tensor([1, COUNT + 7]), torch.zeros(2, dtype=torch.bool))
    assert torch.equal(found, images_to_pixels(torch.stack([IMAGES[1], variants[7]])))
