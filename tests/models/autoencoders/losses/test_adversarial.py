import pytest
import torch

from models.autoencoders.losses.adversarial import (
    AdversarialOptions,
    PatchDiscriminator,
    hinge_loss,
    new_discriminator,
)
from options import UsageError


def test_hinge_loss_of_known_scores():
    """Images: max(0, 1 - s) = 0, 0.5, 2; reconstructions: max(0, 1 + s) = 0, 1, 3."""
    real, generated = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-1.0, 0.0, 2.0])
    assert hinge_loss(real, generated).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 3) / 3) / 2)
    assert hinge_loss(torch.full((4,), 1.0), torch.full((4,), -1.0)) == 0
    assert hinge_loss(torch.zeros(4), torch.zeros(4)) == 1


def test_scores_beyond_the_margin_have_no_gradient():
    real = torch.tensor([2.0, 0.5], requires_grad=True)
    hinge_loss(real, torch.tensor([-3.0])).backward()
    assert real.grad.tolist() == [0.0, -0.25]


@pytest.mark.parametrize(("halvings", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch_of_the_papers_size(halvings, patch):
    """Without normalization, which sees the whole image, the gradient of one score covers one patch."""
    network = PatchDiscriminator(1, 16, halvings)
    for index, layer in enumerate(network.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            network.layers[index] = torch.nn.Identity()
    pixels = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scores = network(pixels)
    middle = scores.shape[2] // 2
    scores[0, 0, middle, middle].backward()
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == patch


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_the_smallest_images_have_one_score(halvings):
    network = PatchDiscriminator(1, 16, halvings)
    side = network.smallest
    assert network(torch.zeros(1, 1, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 1, side - 1, side - 1))


def test_scores_of_an_image_do_not_depend_on_the_batch():
    network = new_discriminator(3, AdversarialOptions(discriminator_width=16), 0)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(pixels)[:1], network(pixels[:1]))


def test_the_initial_weights_depend_only_on_the_seed():
    options = AdversarialOptions(discriminator_width=16, discriminator_layers=1)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (new_discriminator(1, options, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])
    assert first["layers.2.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_scores_are_float32_under_autocast():
    network = new_discriminator(1, AdversarialOptions(discriminator_width=16, discriminator_layers=1), 0)
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        scores = network(pixels)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, network(pixels))


def test_a_width_that_cannot_be_grouped_is_refused():
    with pytest.raises(UsageError, match="--discriminator_width 24: expected a multiple of 16"):
        new_discriminator(1, AdversarialOptions(discriminator_width=24), 0)
