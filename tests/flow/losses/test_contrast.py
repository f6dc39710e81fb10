from typing import NamedTuple

import pytest
import torch

from flow.guidance import GuidanceOptions, GuidedVelocity
from flow.losses.contrast import Correction, correct, means_of_others, next_of_another_class

WEIGHT, CLASSES = 0.3, 3


class Condition(NamedTuple):
    labels: torch.Tensor


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 2, 0], [1, 2, 3, 1]),
        ([0, 0, 1, 1, 0], [2, 2, 4, 4, 2]),
        ([5, 5, 5], [1, 2, 0]),  # one class: the next sample
        ([1, 0], [1, 0]),
        ([0, 1, 0, 0], [1, 2, 1, 1]),  # over the end
    ],
)
def test_the_other_sample_is_the_next_of_another_class(labels, expected):
    assert next_of_another_class(torch.tensor(labels)).tolist() == expected


def test_the_other_class_is_random_in_random_batches():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(300):
        labels = torch.randint(4, (64,), generator=generator)
        others = labels[next_of_another_class(labels)]
        counts.index_put_((labels, others), torch.ones(64), accumulate=True)
    assert counts.diagonal().max() == 0
    shares = counts / counts.sum(1, keepdim=True)
    assert (shares + torch.eye(4) / 3 - 1 / 3).abs().max() < 0.03


def test_means_of_others():
    latents = torch.tensor([1.0, 2.0, 6.0, 10.0]).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    labels = torch.tensor([0, 0, 1, 2])
    parts = [(latents[:1], labels[:1]), (latents[1:], labels[1:])]
    assert means_of_others(parts, 3)[:, 0, 0, 0].tolist() == [8, 13 / 3, 3]
    assert means_of_others(parts, 3).shape == (3, 2, 3, 3)
    assert means_of_others([(latents, 0 * labels)], 1).flatten().unique().tolist() == [4.75]
    # A class without others, and a class without images.
    assert means_of_others([(latents, 0 * labels)], 2)[:, 0, 0, 0].tolist() == [4.75, 4.75]


def test_one_mean_stands_for_very_many_classes():
    latents = torch.randn(20, 4, 8, 8)
    assert means_of_others([(latents, torch.arange(20) % 10)], 2000).shape == (1, 4, 8, 8)


MEANS = torch.randn(CLASSES, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS, NULL = torch.tensor([0, 2, 1, 2]), torch.full((4,), CLASSES)


def plain(t, x, condition):
    return torch.sin(x + t.view(-1, 1, 1, 1)) * (1 + condition.labels.view(-1, 1, 1, 1))


def contrastive(t, x, condition):
    """The minimum of the contrastive loss where `plain` is the minimum of the squared error."""
    mean = MEANS[condition.labels.clamp(max=CLASSES - 1)]
    learned = (plain(t, x, condition) + WEIGHT * mean) / (1 - WEIGHT)
    return torch.where((condition.labels == CLASSES).view(-1, 1, 1, 1), plain(t, x, condition), learned)


CORRECTION = Correction(WEIGHT, MEANS, null=CLASSES)
INTERVAL = GuidanceOptions(4.0, (0.2, 0.7))


def guided(network, time, correction=None, guide=None, guidance=INTERVAL):
    velocity = GuidedVelocity(network, Condition(LABELS), Condition(NULL), guidance, guide, correction)
    return velocity(torch.tensor(time, dtype=torch.float64), X)


def test_guidance_of_a_corrected_contrastive_network_is_the_plain_networks():
    torch.testing.assert_close(guided(contrastive, 0.5, CORRECTION), guided(plain, 0.5))
    assert (guided(contrastive, 0.5) - guided(plain, 0.5)).abs().max() > 1  # without the correction


def test_outside_the_interval_the_learned_velocity_stays():
    times = torch.full((4,), 0.9, dtype=torch.float64)
    assert torch.equal(guided(contrastive, 0.9, CORRECTION), contrastive(times, X, Condition(LABELS)))


def test_the_learned_velocity_is_guided_away_from_the_mean_of_the_others():
    times = torch.full((4,), 0.9, dtype=torch.float64)
    v = plain(times, X, Condition(LABELS))
    expected = v + WEIGHT / (1 - WEIGHT) * (v + MEANS[LABELS])
    torch.testing.assert_close(contrastive(times, X, Condition(LABELS)), expected)


def test_a_corrected_guide_is_the_plain_guide():
    found = guided(plain, 0.5, guide=correct(contrastive, CORRECTION))
    torch.testing.assert_close(found, guided(plain, 0.5, guide=plain))


def test_without_guidance_and_for_the_null_class_nothing_is_corrected():
    unguided = guided(contrastive, 0.5, CORRECTION, guidance=GuidanceOptions())
    times = torch.full((4,), 0.5, dtype=torch.float64)
    assert torch.equal(unguided, contrastive(times, X, Condition(LABELS)))
    assert torch.equal(CORRECTION(X, Condition(NULL)), X)
    assert correct(plain, None) is plain
