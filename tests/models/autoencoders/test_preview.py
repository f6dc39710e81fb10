"""A twin decodes the run's latents, whatever their scale, and must have their shape."""

import diffusers
import pytest
import torch

from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.preview import fit_twin, load_twin
from options import UsageError


@pytest.fixture
def autoencoder(tmp_path):
    new_autoencoder_kl(3, (8, 8, 8), 4, 8, {"scaling_factor": 0.5, "shift_factor": 0.25}).save_pretrained(
        tmp_path / "ae"
    )
    return load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), 3)


def save_twin(folder, levels=3, **settings):
    widths = (8,) * levels
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        **settings,
    )
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("scale", ["own", "measured", "factor"])
def test_the_twin_sees_latents_in_the_autoencoders_own_scale(autoencoder, tmp_path, scale):
    """As TAESD does, which decodes the latents that pipelines see: (z - shift_factor) * scaling_factor."""
    torch.manual_seed(0)
    network = save_twin(tmp_path / "tiny")
    if scale == "factor":
        autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae"), scale_factor=2.0), 3)
    twin = load_twin(str(tmp_path / "tiny"), autoencoder, 3)
    if scale == "measured":
        facts = autoencoder.describe()
        means, stds = (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 3.0, 0.5)
        autoencoder.restore_scale(
            type(facts)(facts.id, facts.sha256, None, latents_mean=means, latents_std=stds, statistics="measured")
        )
    fit_twin(twin, autoencoder)
    x = torch.randn(2, 4, 2, 2)
    z = x * autoencoder.std + autoencoder.mean
    with torch.no_grad():
        expected = network.decode((z - 0.25) * 0.5).sample
    torch.testing.assert_close(twin.decode(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"levels": 2}, {"latent_channels": 3}])
def test_another_shape_is_refused(autoencoder, tmp_path, settings):
    save_twin(tmp_path / "tiny", **settings)
    with pytest.raises(
        UsageError, match=r"tiny decodes \d channels by the factor \d, but this run's latents have 4 channels"
    ):
        load_twin(str(tmp_path / "tiny"), autoencoder, 3)


@pytest.mark.parametrize("factor", [None, 0.18215])
def test_an_autoencoder_without_a_scale_has_no_twin(tmp_path, factor):
    """Such as Stable Diffusion's original file: nothing says which latents the twin was trained on."""
    network = new_autoencoder_kl(3, (8, 8, 8), 4, 8, {})
    autoencoder = PretrainedAutoencoder(network, "sd.ckpt", factor, scaled=False)
    save_twin(tmp_path / "tiny")
    with pytest.raises(UsageError, match=r"own scale of the run's autoencoder sd.ckpt, but its files record none"):
        load_twin(str(tmp_path / "tiny"), autoencoder, 3)
