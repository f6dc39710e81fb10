import pytest
import torch
from torch import nn

from models.autoencoders.losses import perceptual as parts
from options import UsageError
from training.autoencoder.terms import perceptual as module


class Distance(nn.Module):
    """In place of LPIPS: the mean squared difference of color images."""

    def forward(self, a, b):
        assert a.shape[1] == b.shape[1] == 3
        return (a - b).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def asked(monkeypatch):
    """The arguments with which LPIPS is built."""
    calls = []

    def build(network, flag, read_weights):
        calls.append((network, flag))
        return Distance()

    monkeypatch.setattr(module, "build_lpips", build)
    return calls


def test_the_term_adds_its_weight_times_the_distance(runs, asked):
    plain, run = runs.SmallRun(), runs.SmallRun(lpips_weight=0.5)
    ours, expected = run.evaluate(0), plain.evaluate(0)
    logged = dict(zip(run.loss.names, ours.logged, strict=True))
    torch.testing.assert_close(logged["lpips"], logged["squared_error"])
    torch.testing.assert_close(ours.total, expected.total + 0.5 * logged["lpips"])
    assert asked == [("vgg", "--lpips_weight")]
    assert not run.loss.modules


def test_it_is_part_of_the_reconstruction_that_adaptive_weights_follow(runs, asked):
    """Twice the reconstruction's gradient doubles the adaptive weight."""
    weights = []
    for options in ({}, {"lpips_weight": 1.0}):
        run = runs.SmallRun(**runs.ADVERSARIAL, **options)
        weights.append(run.evaluate(2).logged[run.loss.names.index("adversarial_weight")].item())
    assert weights[1] / weights[0] == pytest.approx(2, rel=1e-3)


def test_images_that_transforms_make_too_small_are_left_out(runs, asked, monkeypatch):
    monkeypatch.setitem(parts.BACKBONES, "vgg", parts.BACKBONES["vgg"]._replace(smallest=12))
    run = runs.SmallRun(lpips_weight=1.0, equivariance=1.0)
    sides, found = [], []
    run.network.decoder.register_forward_hook(lambda layer, inputs, output: sides.append(output.shape[2]))
    for number in range(8):
        found.append(run.step(run.batch(0).pixels, run.batch(number).draws, 0).logged[run.loss.names.index("lpips")])
    assert {side < 12 for side in sides} == {True, False}
    assert all((value == 0) == (side < 12) for side, value in zip(sides, found, strict=True))


def test_the_file_or_the_cache_is_read(monkeypatch, tmp_path, runs):
    weights, asked = {"features.0.weight": torch.zeros(2)}, []
    torch.save(weights, tmp_path / "alexnet.pth")
    options = {"lpips_weight": 1.0, "lpips_network": "alex"}
    found = module._read(runs.autoencoder_options(**options, lpips_backbone=str(tmp_path / "alexnet.pth")))
    assert torch.equal(found["features.0.weight"], weights["features.0.weight"])

    def download(url, what, flag, *, check_hash=False):
        asked.append((url, what, flag, check_hash))
        raise UsageError(f"cannot download the {what} weights (offline): pass it as {flag} FILE")

    monkeypatch.setattr(module, "download_weights", download)
    with pytest.raises(UsageError, match="cannot download the AlexNet weights .*--lpips_backbone FILE"):
        module._read(runs.autoencoder_options(**options))
    assert asked == [(parts.BACKBONES["alex"].url, "AlexNet", "--lpips_backbone", True)]


def test_images_that_are_too_small_are_refused_before_weights_are_read(runs, asked):
    with pytest.raises(UsageError, match="AlexNet needs .* at least 31 x 31 pixels, .* 1 channels and 16 x 16 pixels"):
        runs.SmallRun(lpips_weight=1.0, lpips_network="alex")
    assert not asked
