import sys

import diffusers
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional
from tqdm import tqdm

from models.autoencoders import diffusers_files
from models.autoencoders import pretrained as module
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace, images_to_pixels, pixels_to_images
from models.autoencoders.pretrained import PretrainedAutoencoder
from options import UsageError
from runtime.weights import weights_hash

STATISTICS = {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.25]}


def tiny_network(channels=3, **statistics):
    torch.manual_seed(0)
    return new_autoencoder_kl(channels, (8, 16), 2, 8, statistics)


def random_images(count, channels=3, side=8):
    return torch.randint(256, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()


def noise_like(tensor, seed=0):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "autoencoder"
    tiny_network(**STATISTICS).save_pretrained(folder)
    return folder


def load(name, channels=3, **settings):
    return load_autoencoder(AutoencoderOptions(pretrained_autoencoder_ckpt=str(name), **settings), channels)


def test_pixels_and_images_are_inverse():
    images = torch.arange(256, dtype=torch.uint8)
    pixels = images_to_pixels(images)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(pixels_to_images(pixels), images)


def test_pixels_are_rounded_to_the_nearest_level():
    """round(127.5 x + 127.5), clamped. Half a level is enough to round up; 0 maps to 127.5, which rounds to even."""
    levels = torch.tensor([-1.5, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1 - 0.51 / 127.5, 1.0, 7.0])
    assert pixels_to_images(levels).tolist() == [0, 0, 0, 1, 128, 254, 255, 255]


def test_pixel_space_is_the_identity():
    space = load("none", channels=1)
    assert isinstance(space, PixelSpace)
    images = random_images(4, channels=1)
    moments = space.encode(images)
    assert moments.shape[1] == space.moment_channels == space.latent_channels == 1
    latents = space.sample(moments, noise_like(moments))
    assert torch.equal(latents, images_to_pixels(images))
    assert torch.equal(pixels_to_images(space.decode(latents)), images)


def test_moments_and_decoding_equal_diffusers(saved):
    autoencoder = load(saved)
    network = diffusers.AutoencoderKL.from_pretrained(saved).eval()
    images = random_images(3)
    with torch.no_grad():
        posterior = network.encode(images_to_pixels(images)).latent_dist
        z = posterior.mean
        decoded = network.decode(z).sample
    moments = autoencoder.encode(images)
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert not moments.requires_grad
    latents = autoencoder.sample(moments)
    mean, std = (torch.tensor(STATISTICS[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (z - mean) / std)
    torch.testing.assert_close(autoencoder.decode(latents), decoded, atol=1e-4, rtol=1e-4)


def test_samples_have_the_posteriors_mean_and_variance():
    autoencoder = PretrainedAutoencoder(tiny_network(**STATISTICS), "x")
    mean = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1)
    logvar = torch.tensor([-2.0, 1.0]).view(1, 2, 1, 1)
    moments = torch.cat([mean, logvar], dim=1).expand(200_000, -1, -1, -1)
    samples = autoencoder.sample(moments, noise_like(moments[:, :2])).double().flatten(1)
    expected_mean = torch.tensor([(3.0 - 0.5) / 2.0, (-2.0 + 1.0) / 0.25])
    expected_std = torch.tensor([-2.0, 1.0]).mul(0.5).exp() / torch.tensor([2.0, 0.25])
    standard_error = expected_std / 200_000**0.5
    assert ((samples.mean(0) - expected_mean).abs() < 5 * standard_error).all()
    assert ((samples.std(0) - expected_std).abs() < 5 * standard_error).all()


@pytest.mark.parametrize(
    ("statistics", "scale_factor", "mean", "std"),
    [
        ({}, None, [0, 0], [1 / 0.18215] * 2),  # diffusers' default, from Stable Diffusion
        ({"scaling_factor": 0.5}, None, [0, 0], [2, 2]),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, None, [0.1, 0.1], [2, 2]),
        (STATISTICS, None, [0.5, -1.0], [2.0, 0.25]),
        (STATISTICS | {"scaling_factor": 0.5}, None, [0.5, -1.0], [4.0, 0.5]),  # both, as in diffusers
        (STATISTICS | {"shift_factor": 0.1}, 4.0, [0, 0], [0.25, 0.25]),
    ],
)
def test_scale_rules(statistics, scale_factor, mean, std):
    autoencoder = PretrainedAutoencoder(tiny_network(**statistics), "x", scale_factor)
    torch.testing.assert_close(autoencoder.mean.flatten(), torch.tensor(mean, dtype=torch.float32))
    torch.testing.assert_close(autoencoder.std.flatten(), torch.tensor(std, dtype=torch.float32))
    described = autoencoder.describe()
    assert described.latents_mean == tuple(autoencoder.mean.flatten().tolist())
    assert described.latents_std == tuple(autoencoder.std.flatten().tolist())
    assert described.scale_factor == scale_factor


def test_log_variance_is_clamped():
    network = tiny_network()
    with torch.no_grad():
        network.quant_conv.weight.zero_()
        network.quant_conv.bias.copy_(torch.tensor([1.0, 2.0, 1e9, -1e9]))
    moments = PretrainedAutoencoder(network, "x").encode(random_images(1))
    assert [channel.unique().tolist() for channel in moments[0]] == [[1.0], [2.0], [20.0], [-30.0]]


def test_chunking_does_not_change_results(monkeypatch):
    autoencoder = PretrainedAutoencoder(tiny_network(), "x")
    images = random_images(7)
    whole = autoencoder.encode(images)
    pixels = autoencoder.decode(autoencoder.sample(whole))
    seen = []
    hook = autoencoder.network.encoder.register_forward_pre_hook(lambda layer, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(module, "PIXELS_PER_CHUNK", 3 * 8 * 8 + 1)
    parts = autoencoder.encode(images)
    hook.remove()
    assert seen == [3, 3, 1]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(autoencoder.decode(autoencoder.sample(whole)), pixels)


def test_moments_in_bfloat16_are_close_to_those_in_float32():
    """Caches may use bfloat16. Its error is small compared with the posterior, and smaller still compared with rounding."""
    autoencoder = load("pretrained/fashion_mnist_autoencoder", channels=1)
    digits = torch.from_numpy(load_digits().images[:64, None]).float() * 255 / 16
    images = functional.interpolate(digits, size=(32, 32), mode="bilinear").round().byte()
    exact = autoencoder.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = autoencoder.encode(images)
    assert rounded.dtype == torch.float32
    latents = [autoencoder.sample(moments) for moments in (exact, rounded)]  # approximately unit scale
    error = (latents[1] - latents[0]).square().mean().sqrt()
    posterior = (exact.chunk(2, dim=1)[1].exp().mean((0, 2, 3)).sqrt() / autoencoder.std.flatten()).min()
    assert 0 < error < 0.02
    assert error < posterior / 2
    assert (rounded - exact).chunk(2, dim=1)[1].abs().max() < 0.2  # log-variances are around -5
    grey = [pixels_to_images(autoencoder.decode(part)).double() for part in latents]
    assert (grey[1] - grey[0]).square().mean().sqrt() < 1  # gray levels out of 256


def test_gray_images_are_repeated_for_a_color_autoencoder():
    autoencoder = PretrainedAutoencoder(tiny_network(channels=3), "x")
    grey = random_images(2, channels=1)
    assert torch.equal(autoencoder.encode(grey), autoencoder.encode(grey.repeat(1, 3, 1, 1)))


def test_wrong_channels():
    autoencoder = PretrainedAutoencoder(tiny_network(channels=1), "grey/ae")
    with pytest.raises(UsageError, match="grey/ae expects 1-channel images, but the dataset has 3-channel images"):
        autoencoder.encode(random_images(1, channels=3))


def test_wrong_size():
    autoencoder = PretrainedAutoencoder(tiny_network(), "some/ae")
    with pytest.raises(
        UsageError,
        match=r"multiple of 2 for the autoencoder some/ae, but the images have 7 x 7 pixels \(--image_size\)",
    ):
        autoencoder.encode(random_images(1, side=7))


def test_a_saved_autoencoder_round_trips_bit_for_bit(saved):
    original = PretrainedAutoencoder(tiny_network(**STATISTICS), str(saved))
    loaded = load(saved)
    assert loaded.describe() == original.describe()
    images = random_images(2)
    assert torch.equal(loaded.encode(images), original.encode(images))
    assert (loaded.image_channels, loaded.latent_channels, loaded.factor) == (3, 2, 2)
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())


def test_a_half_precision_file_is_used_in_single_precision(tmp_path):
    tiny_network().half().save_pretrained(tmp_path / "half")
    assert {value.dtype for value in load(tmp_path / "half").network.state_dict().values()} == {torch.float32}


def test_a_contradicting_factor_is_refused(saved):
    assert load(saved, f=2).factor == 2
    with pytest.raises(UsageError, match=r"--f 8 contradicts .*whose factor is 2"):
        load(saved, f=8)


def test_the_hash_depends_on_the_weights():
    network = tiny_network()
    weights = network.state_dict()
    before = weights_hash(weights)
    assert weights_hash(dict(reversed(weights.items()))) == before
    with torch.no_grad():
        last = network.decoder.conv_out.bias
        last[0] = torch.nextafter(last[0], torch.tensor(9.0))
    assert weights_hash(network.state_dict()) != before


def test_missing_folder(tmp_path):
    with pytest.raises(UsageError, match=rf"--pretrained_autoencoder_ckpt {tmp_path}/none: no such folder"):
        load(tmp_path / "none")


@pytest.mark.parametrize("damage", ["no config", "torn config", "no weights", "torn weights", "code"])
def test_damaged_folder_is_named(saved, damage):
    config, weights = saved / "config.json", saved / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "torn config":
        config.write_text(config.read_text()[:50])
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        if damage == "code":
            torch.save(tiny_network().state_dict() | {"code": print}, saved / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError) as raised:
        load(saved)
    assert str(raised.value).startswith(f"cannot load the autoencoder {saved}: ")
    assert "\n" not in str(raised.value)
    assert "network" not in str(raised.value).removeprefix(f"cannot load the autoencoder {saved}")


def test_a_folder_above_autoencoders_names_one(saved):
    with pytest.raises(UsageError, match=rf"it has no config.json, so .*; did you mean {saved}\?"):
        load(saved.parent)


def test_a_failed_download_hints_at_a_local_folder(monkeypatch):
    def unreachable(*arguments, **settings):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", unreachable)
    with pytest.raises(UsageError) as raised:
        load("owner/name")
    assert str(raised.value) == (
        "cannot load the autoencoder owner/name: We couldn't connect; "
        "without internet access, give a local folder in diffusers format"
    )


def test_download_may_show_its_progress(monkeypatch):
    def download(*arguments, **settings):
        for _ in tqdm(range(3), file=sys.stderr):
            pass
        return tiny_network(), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(diffusers_files, "check_hub", lambda name: None)
    monkeypatch.setattr(diffusers.AutoencoderKL, "load_config", lambda *arguments, **settings: {})
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", download)
    assert load("owner/name").identity == "owner/name"
