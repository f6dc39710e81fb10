"""Conditional samples: which image and condition a sample belongs to, and which conditions guidance replaces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets_prep.conditions import MaskedImages
from datasets_prep.image_dataset import DatasetFacts, ImageDataset
from flow.guidance import GuidanceOptions
from flow.solvers import SolverOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from runtime.precision import Machine
from sampling.sampler import Sampler, generate
from tasks.conditioned_images import ConditionedImages
from tasks.pair_scores import Recognition, recognition
from tests.fake_features import FakeFeatures, Pixels

MACHINE = Machine(torch.device("cpu"), "fp32")
NAMES = ("cat", "dog", "owl")
FACTS = DatasetFacts("folder", 8, 3, None, True, NAMES)
IMAGES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
DATASET = ImageDataset(FACTS, "validation", np.array([2, 0, 1, 2]), IMAGES.__getitem__, "x")


def mask(number):
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[: 1 + number] = True
    return hole


def sampler_of(network, space=None, **changes):
    machine, solver = Machine(torch.device("cpu"), "fp32"), SolverOptions("euler", 2)
    sampler = Sampler(network, space or PixelSpace(3), FACTS, (3, 8, 8), 3, solver, machine, seed=5)
    return replace(sampler, **changes)


def still(t, x, condition):
    return torch.zeros_like(x)


def test_more_samples_than_images_start_again_at_the_first_image():
    conditioned = ConditionedImages(DATASET, MaskedImages(DATASET, PixelSpace(3), mask, MACHINE))
    image_indices = conditioned.image_indices([0, 3, 4, 9])
    assert image_indices.tolist() == [0, 3, 0, 1]
    assert torch.equal(conditioned.originals(image_indices), IMAGES[image_indices])
    assert conditioned.labels()([0, 3, 4, 9], 3).tolist() == [2, 2, 2, 0]
    raw = conditioned.raw(image_indices)
    for row, index in zip(raw, image_indices.tolist(), strict=True):
        assert torch.equal(row[3] > 0, mask(index))  # the mask belongs to the image
        assert torch.equal(row[:3], IMAGES[index] * ~mask(index))
    assert (conditioned.shown(image_indices)[1, :, :4] == 128).all()


def test_conditions_do_not_depend_on_the_batch():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8), 3, 8, {}), "tiny")
    conditioned = ConditionedImages(DATASET, MaskedImages(DATASET, space, mask, MACHINE))
    seen = []

    def network(t, x, condition):
        seen.append(condition)
        return torch.zeros_like(x)

    sampler = sampler_of(network, space, latent_shape=(3, 4, 4))
    settings = {"labels": conditioned.labels(), "dense": conditioned.dense(sampler)}
    list(generate(sampler, range(4), batch_size=3, **settings))
    first, last = seen[0], seen[2]  # each batch takes two steps
    assert (first.labels.tolist(), last.labels.tolist()) == ([2, 0, 1], [2])
    whole = conditioned.dense(sampler)(range(4))
    assert whole.shape == (4, 4, 4, 4)
    torch.testing.assert_close(torch.cat([first.dense, last.dense]), whole, atol=1e-5, rtol=1e-5)
    other = conditioned.dense(replace(sampler, seed=6))(range(4))
    assert not torch.equal(other[:, :3], whole[:, :3])  # the posterior sample differs
    assert torch.equal(other[:, 3], whole[:, 3])  # the mask does not


@pytest.mark.parametrize(("labels", "dense"), [(True, True), (True, False), (False, True)])
def test_guidance_uses_only_conditions_dropped_in_training(labels, dense):
    sampler = sampler_of(still, guidance=GuidanceOptions(2.0), drops_labels=labels, drops_dense=dense)
    ids, maps = torch.tensor([2, 0]), torch.rand(2, 4, 8, 8)
    velocity = sampler.velocity(ids, maps)
    assert torch.equal(velocity.condition.labels, ids)
    assert torch.equal(velocity.condition.dense, maps)
    assert velocity.null_condition.labels.tolist() == ([3, 3] if labels else [2, 0])
    assert torch.equal(velocity.null_condition.dense, torch.zeros_like(maps) if dense else maps)


class ByRed(FakeFeatures):
    """A classifier that reads the class from the first pixel's red channel."""

    outputs, classes = {"probabilities": 3}, NAMES

    def probabilities(self, images):
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long() % 3, 3).float()


def painted(reds):
    images = torch.zeros(len(reds), 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(reds, dtype=torch.uint8)
    return images


def test_recognition_equals_values_computed_by_hand():
    labels = torch.tensor([2, 0, 1, 2])
    parts, whole = [Recognition(ByRed(), labels) for _ in range(2)], Recognition(ByRed(), labels)
    samples, originals = painted([2, 0, 0, 1]), painted([2, 0, 1, 1])
    for score, places in zip(parts, ([0, 3], [1, 2]), strict=True):
        score.update(samples[places], originals[places], torch.tensor(places))
    whole.update(samples, originals, torch.arange(4))
    assert whole.result(whole.totals()) == {"recognised": 0.5, "recognised_originals": 0.75}
    assert torch.equal(sum(part.totals() for part in parts), whole.totals())


def test_recognition_needs_a_classifier_of_the_datasets_classes():
    class OfOthers(ByRed):
        classes = ("trouser", "bag", "coat")

    assert len(recognition(ByRed(), DATASET)) == 1
    assert recognition(OfOthers(), DATASET) == []
    assert recognition(None, DATASET) == []
    assert recognition(Pixels(), DATASET) == []  # these features have no classes
    unlabeled = ImageDataset(replace(FACTS, class_names=()), "validation", np.zeros(4), IMAGES.__getitem__, "x")
    assert recognition(Pixels(), unlabeled) == []
    assert recognition(ByRed(), unlabeled) == []
