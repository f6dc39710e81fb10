import pytest
import torch
from torch import nn
from torch.nn import functional

from models.autoencoders.coding import Coder, encode_pixels
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import images_to_pixels
from runtime.randomness import StepDraws
from runtime.torch_files import read_torch_file
from tests.training.autoencoder.small_images import CPU, TINY, blobs, stop_after, train
from training.autoencoder import losses as module
from training.autoencoder.losses import make_loss
from training.autoencoder.run import autoencoder_options
from training.autoencoder.terms.protocol import LossSetup, TermValue, TrainedModule, call_fixed

OPTIONAL = {  # option: a value that switches it on
    "l1_weight": 0.5,
    "edge_weight": 0.5,
    "latent_noise": 0.3,
    "equivariance": 1.0,
    "standardize_weight": 0.1,
}


def tiny_network():
    torch.manual_seed(0)
    return new_autoencoder_kl(1, (8, 16), 2, 8, {})


def draws(step=0):
    return StepDraws(3, step, slice(0, 5), 5)


def loss_of(network, border=0, **options):
    coder = Coder(network)
    loss = make_loss(LossSetup(autoencoder_options(**TINY | options), coder, CPU, 8 - 2 * border, border))
    return loss(coder, images_to_pixels(blobs(5)), draws(), 0)


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


def test_without_options_the_loss_and_its_gradient_are_the_vaes_bit_for_bit():
    network, pixels = tiny_network(), images_to_pixels(blobs(5))
    mean, logvar = encode_pixels(network, pixels).chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    decoded = network.decode(mean + (0.5 * logvar).exp() * draws().normal("posterior", mean.shape[1:])).sample
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    error = functional.mse_loss(decoded[..., 1:7, 1:7], pixels[..., 1:7, 1:7])
    expected = error + 1e-3 * divergence
    losses = loss_of(network, border=1, kl_weight=1e-3)
    assert torch.equal(losses.total, expected)
    assert torch.equal(losses.logged, torch.stack([error, divergence]))
    assert all(map(torch.equal, gradients(network, losses.total), gradients(network, expected)))


@pytest.mark.parametrize(("name", "value"), OPTIONAL.items())
def test_every_option_changes_the_gradient_and_is_off_at_zero(name, value):
    network = tiny_network()
    plain, off, on = (
        gradients(network, loss_of(network, **options).total) for options in ({}, {name: 0.0}, {name: value})
    )
    assert all(map(torch.equal, plain, off))
    assert not all(map(torch.equal, plain, on))
    assert all(gradient.isfinite().all() for gradient in on)


def test_the_squared_error_is_logged_without_its_weight():
    network = tiny_network()
    both, alone = (loss_of(network, kl_weight=0.0, l1_weight=1.0, l2_weight=weight) for weight in (1.0, 0.0))
    assert torch.equal(both.logged, alone.logged)
    error, absolute, _ = alone.logged
    torch.testing.assert_close(alone.total, absolute)
    torch.testing.assert_close(both.total, absolute + error)


class Critic:
    """A term with a module that learns to tell reconstructions from originals."""

    names = ("fooled", "told")

    def __init__(self, begins=0):
        torch.manual_seed(0)
        self.module = nn.Conv2d(1, 1, 3)
        group = {"params": list(self.module.parameters()), "relative_lr": 0.5}
        self.modules = {"critic": TrainedModule(self.module, torch.optim.AdamW([group], fused=True), 1.0)}
        self.begins = begins

    def __call__(self, inputs):
        decoded, target = inputs.found.decoded, inputs.found.target
        fooled = -call_fixed(self.module, decoded).mean()
        told = self.module(decoded.detach()).mean() - self.module(target).mean()
        if inputs.step < self.begins:
            return TermValue(torch.zeros(()), (fooled, told))
        return TermValue(fooled + (0 if inputs.held_out else told), (fooled, told))


def test_a_term_with_a_module_of_its_own_keeps_the_gradients_apart():
    network, critic = tiny_network(), Critic()
    coder = Coder(network)
    loss = module.AutoencoderLoss((critic,), autoencoder_options(**TINY), 0)
    pixels = images_to_pixels(blobs(5))
    loss(coder, pixels, draws(), 0).total.backward()
    decoded = module.reconstruct(coder, pixels, 0, autoencoder_options(**TINY), draws()).decoded
    expected = torch.autograd.grad(-critic.module(decoded).mean(), network.decoder.conv_out.weight)[0]
    torch.testing.assert_close(network.decoder.conv_out.weight.grad, expected)
    told = critic.module(decoded.detach()).mean() - critic.module(pixels).mean()
    torch.testing.assert_close(critic.module.weight.grad, torch.autograd.grad(told, critic.module.weight)[0])


@pytest.mark.parametrize("begins", [0, 2])
def test_a_trained_module_is_saved_and_resumes_exactly(begins, tmp_path, monkeypatch):
    monkeypatch.setitem(module.TERMS, "critic", lambda setup: Critic(begins))
    whole = train(tmp_path / "whole", max_steps=5)
    assert {"fooled", "told"} <= whole.validation.keys()
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        train(tmp_path / "parts", max_steps=5)
    train(tmp_path / "parts", max_steps=5)
    found, expected = (read_torch_file(tmp_path / f"{name}.training" / "content.pth") for name in ("parts", "whole"))
    weight = found["modules"]["critic"]["module"]["weight"]
    assert torch.equal(weight, expected["modules"]["critic"]["module"]["weight"])
    assert not torch.equal(weight, Critic().module.weight)
    assert found["modules"]["critic"]["optimizer"]["state"][0]["step"] == 5 - begins
