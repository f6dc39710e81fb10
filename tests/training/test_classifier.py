from dataclasses import replace

import pytest
import torch

from evaluation.features.classifier import load_classifier, save_classifier
from options import DivergedError
from runtime.precision import Machine
from training.classifier import ClassifierTrainingOptions, accuracy, train_classifier

MACHINE = Machine(torch.device("cpu"), "fp32")
OPTIONS = ClassifierTrainingOptions(widths=(8, 8), batch_size=16, max_steps=40, lr=1e-2, max_shift=1)


def stripes(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical stripes, which remain distinguishable when shifted or mirrored."""
    labels = torch.arange(count) % 2
    horizontal = (torch.arange(28) // 2 % 2 * 255).to(torch.uint8)[:, None].expand(28, 28)
    return torch.where(labels[:, None, None, None] == 0, horizontal, horizontal.T), labels


def test_training_learns_and_repeats_bit_for_bit(tmp_path):
    images, labels = stripes()
    first, second = (train_classifier(images, labels, ("rows", "columns"), OPTIONS, MACHINE) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert accuracy(first, images, labels, MACHINE) == 1


def test_a_classifier_of_patches_learns():
    images, labels = stripes()
    options = replace(OPTIONS, architecture="patches", widths=(32, 32), lr=2e-2, ema_decay=0.9)
    assert (
        accuracy(train_classifier(images, labels, ("rows", "columns"), options, MACHINE), images, labels, MACHINE) == 1
    )


def test_the_stored_classifier_equals_the_network(tmp_path):
    images, labels = stripes()
    network = train_classifier(images, labels, ("rows", "columns"), OPTIONS, MACHINE)
    save_classifier(network, tmp_path / "c.safetensors", {})
    loaded = load_classifier(tmp_path / "c.safetensors")
    pixels = torch.randn(3, 1, 28, 28)
    assert torch.equal(loaded(pixels), network.to(memory_format=torch.contiguous_format)(pixels))


def test_a_classifier_that_diverged_is_refused():
    with pytest.raises(DivergedError, match="the loss at step 2 is not finite"):
        train_classifier(*stripes(), ("rows", "columns"), replace(OPTIONS, lr=float("inf"), max_steps=2), MACHINE)
