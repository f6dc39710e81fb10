import pytest
import torch

from models.autoencoders.losses.alignment import (
    AlignmentOptions,
    LatentAlignment,
    cosine_loss,
    distance_loss,
    new_alignment,
)

GENERATOR = torch.Generator().manual_seed(0)
LATENTS = torch.randn(3, 4, 2, 2, generator=GENERATOR)
FEATURES = torch.randn(3, 6, 2, 2, generator=GENERATOR)


def test_cosine_loss_of_known_angles():
    """Cosines 1, 0 and -1 with a margin of 0.25: max(0, -0.25), 0.75 and 1.75."""
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]).T[None, :, None]  # [1, 2, 1, 3]
    theirs = torch.tensor([[3.0, 0.0]] * 3).T[None, :, None]
    assert cosine_loss(ours, theirs, 0.25).item() == pytest.approx((0 + 0.75 + 1.75) / 3)


def test_distance_loss_of_known_angles():
    """Two orthogonal latents and two equal features: similarities 0 and 1 for 2 of the 4 pairs."""
    ours = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T[None, :, None]
    theirs = torch.tensor([[1.0, 1.0], [2.0, 2.0]]).T[None, :, None]
    assert distance_loss(ours, theirs, 0.25).item() == pytest.approx(2 * 0.75 / 4)


def test_aligned_latents_have_no_loss():
    assert cosine_loss(3 * FEATURES, FEATURES, 0.0).item() == pytest.approx(0, abs=1e-6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    rotated = torch.einsum("de,behw->bdhw", rotation, FEATURES)
    assert distance_loss(rotated, FEATURES, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(rotated, FEATURES, 0.0) > 0.1


def test_latents_within_the_margins_have_neither_loss_nor_gradient():
    z = (FEATURES + 0.1 * torch.randn(FEATURES.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()
    assert cosine_loss(z, FEATURES, 0.0) > 0
    loss = cosine_loss(z, FEATURES, 0.5) + distance_loss(z, FEATURES, 0.25)
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("loss", [cosine_loss, distance_loss])
def test_the_loss_ignores_lengths_and_the_order_of_positions(loss):
    options = {"margin": 0.05}
    z = FEATURES.flip(0)
    plain = loss(z, FEATURES, **options)
    assert plain > 0.1
    torch.testing.assert_close(loss(2 * z, 5 * FEATURES, **options), plain)
    torch.testing.assert_close(loss(z.flip(2, 3), FEATURES.flip(2, 3), **options), plain)


def test_images_are_not_compared_with_each_other():
    each = torch.stack([distance_loss(LATENTS[[i]], FEATURES[[i]], 0.1) for i in range(3)])
    torch.testing.assert_close(distance_loss(LATENTS, FEATURES, 0.1), each.mean())


def test_gradients_reach_latents_and_projection():
    alignment = new_alignment(4, 6, AlignmentOptions(), 0)
    z = LATENTS.clone().requires_grad_()
    alignment(z, FEATURES).backward()
    assert z.grad.flatten(1).norm(dim=1).min() > 0
    assert alignment.projection.weight.grad.norm() > 0


def test_the_loss_is_float32_under_autocast():
    alignment = new_alignment(4, 6, AlignmentOptions(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment(LATENTS, FEATURES)
    assert torch.equal(loss, alignment(LATENTS, FEATURES))


def test_margins_and_seed_come_from_the_options():
    strict, lenient = (
        new_alignment(4, 6, AlignmentOptions(align_cosine_margin=m, align_distance_margin=m), 0) for m in (0.0, 2.0)
    )
    assert torch.equal(strict.projection.weight, lenient.projection.weight)
    assert strict(LATENTS, FEATURES) > lenient(LATENTS, FEATURES) == 0
    assert not torch.equal(new_alignment(4, 6, AlignmentOptions(), 1).projection.weight, strict.projection.weight)
    assert isinstance(strict, LatentAlignment)
