import numpy as np
import pytest
import torch

from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pretrained import PretrainedAutoencoder
from options import DivergedError, UsageError
from tests.training.autoencoder.small_images import CPU, TINY, blobs, dataset_of
from training.autoencoder.output import check_output, check_statistics, posterior_statistics, save_autoencoder
from training.autoencoder.run import autoencoder_options

WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_network(channels=1):
    torch.manual_seed(0)
    return new_autoencoder_kl(channels, (8, 16), 2, 8, {})


def test_latent_statistics_include_the_posteriors_variance():
    """Uses more images than one batch of 512, and a posterior with about as much variance as its means."""
    network, images = tiny_network(), blobs(600)
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.tensor([0.7, -0.3, -1.0, 0.5]))
    statistics = posterior_statistics(network, dataset_of(images), CPU)
    autoencoder = PretrainedAutoencoder(network, "x", scale_factor=1.0)
    moments = autoencoder.encode(images)
    mean = moments[:, :2]
    noise = torch.randn(20, *mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([autoencoder.sample(moments, one) for one in noise]).double()
    np.testing.assert_allclose(statistics["latents_mean"], drawn.mean((0, 1, 3, 4)), atol=0.01)
    np.testing.assert_allclose(statistics["latents_std"], drawn.std((0, 1, 3, 4)), rtol=0.01)
    assert (drawn.std((0, 1, 3, 4)) > 1.05 * mean.double().std((0, 2, 3))).all()  # the means alone would not be enough


def test_an_unused_channel_is_not_scaled_up():
    network = tiny_network()
    with torch.no_grad():
        network.quant_conv.weight[[1, 3]] = 0  # mean and log-variance of channel 1
        network.quant_conv.bias[[1, 3]] = 0
    statistics = posterior_statistics(network, dataset_of(blobs(20)), CPU)
    assert statistics["latents_mean"][1] == 0
    assert statistics["latents_std"][1] == pytest.approx(1)


def test_a_constant_channel_is_refused():
    with pytest.raises(UsageError, match="channels 1 are constant"):
        check_statistics({"latents_mean": [0.0, 0.0], "latents_std": [1.0, 0.0]})


@pytest.mark.parametrize("half_weights", [False, True])
def test_saved_autoencoder_has_latents_of_unit_scale(tmp_path, half_weights):
    images, network = blobs(300), tiny_network()
    options = autoencoder_options(**TINY, half_weights=half_weights)
    save_autoencoder(network, tmp_path / "ae", posterior_statistics(network, dataset_of(images), CPU), options)
    autoencoder = load_autoencoder(AutoencoderOptions(str(tmp_path / "ae")), channels=1)
    moments = autoencoder.encode(images)
    noise = torch.randn(moments[:, :2].shape, generator=torch.Generator().manual_seed(0))
    latents = autoencoder.sample(moments, noise).double()
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=0.05)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=0.05)
    assert autoencoder.network.config.scaling_factor == 1.0  # diffusers' pipelines apply it next to the statistics
    size = (tmp_path / "ae" / WEIGHTS).stat().st_size
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 1 <= size / parameters / (2 if half_weights else 4) < 1.5


def test_weights_that_are_not_finite_do_not_replace_an_autoencoder(tmp_path):
    network, folder, options = tiny_network(), tmp_path / "ae", autoencoder_options(**TINY)
    save_autoencoder(network, folder, {}, options)
    before = (folder / WEIGHTS).read_bytes()
    for value in (1e6, float("nan")):  # the first overflows in the file's float16
        with torch.no_grad():
            network.decoder.conv_in.bias[0] = value
        with pytest.raises(DivergedError, match=r"autoencoder are not finite.*: decoder\.conv_in\.bias\. Start again"):
            save_autoencoder(network, folder, {}, options)
        assert (folder / WEIGHTS).read_bytes() == before
    with torch.no_grad():
        network.decoder.conv_in.bias[0] = 1e6
    save_autoencoder(network, folder, {}, autoencoder_options(**TINY, half_weights=False))


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match="exists and is not an autoencoder"):
        check_output(tmp_path / "photos")
