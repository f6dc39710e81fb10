"""Image encoders from a local file: their grids, and that cached features of mirror images are the mirrored images' own."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from datasets_prep.datasets import DatasetFacts, DatasetOptions, ImageDataset
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.moments import open_encoded
from models.autoencoders import hub
from models.image_encoder import ImageEncoder, feature_width, load_encoder
from options import UsageError
from runtime.precision import Machine

MACHINE = Machine(torch.device("cpu"), "fp32")
IMAGES = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """`weights(name)` is a file with random weights of a timm model."""
    folder = tmp_path_factory.mktemp("weights")

    def save(name):
        path = folder / f"{name}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(timm.create_model(name).state_dict(), path)
        return str(path)

    return save


@pytest.fixture(scope="module")
def encoder(weights):
    return ImageEncoder("test_vit", load_encoder("test_vit", weights("test_vit")), 4, 16)


@pytest.mark.parametrize(("name", "side"), [("test_vit", 64), ("test_convnext", 128), ("test_resnet", 128)])
def test_there_is_one_feature_per_token(weights, name, side):
    network = load_encoder(name, weights(name))
    encoder = ImageEncoder(name, network, 4, 16)
    assert (encoder.side, encoder.factor) == (side, 4)
    features = encoder.encode(IMAGES)
    assert features.shape == (5, feature_width(network), 4, 4)
    assert not features.requires_grad


def test_patch_tokens_are_in_their_places(encoder):
    """Without its class token, the transformer's tokens are the image's patches in row-major order."""
    tokens = encoder.network.forward_features(
        torch.nn.functional.interpolate(IMAGES.float() / 255, (64, 64), mode="bicubic", antialias=True)
        .clamp(0, 1)
        .expand(-1, 3, -1, -1)
        .sub(encoder._mean)
        .div(encoder._std)
    )
    features = encoder.encode(IMAGES)
    torch.testing.assert_close(features[:, :, 1, 2], tokens[:, 1 + 1 * 4 + 2])


def test_gray_and_color_images_agree(encoder):
    torch.testing.assert_close(encoder.encode(IMAGES), encoder.encode(IMAGES.expand(-1, 3, -1, -1)))


def test_the_hash_depends_on_weights_and_resolution(encoder, weights):
    other = ImageEncoder("test_vit", encoder.network, 2, 16)
    assert len({encoder.describe().sha256, other.describe().sha256}) == 2
    same = ImageEncoder("test_vit", load_encoder("test_vit", weights("test_vit")), 4, 16)
    assert same.describe() == encoder.describe()


def dataset_of(flips):
    facts = DatasetFacts("squares", 16, 1, None, flips, ())
    return ImageDataset(facts, "train", np.zeros(5), IMAGES.__getitem__, "f")


def test_cached_features_of_mirror_images_are_the_mirrored_images_own(encoder, tmp_path):
    data, cache = DatasetOptions("squares", datadir=str(tmp_path)), LatentCacheOptions()
    cached = open_encoded(dataset_of(True), encoder, data, cache, MACHINE, subfolder="features")
    folder = tmp_path / "latent_cache" / "features"
    assert len(list(folder.glob("*/manifest.json"))) == 1
    indices, mirrored = torch.tensor([3, 0, 3]), torch.tensor([True, False, False])
    found = cached.moments(indices, mirrored).float()
    expected = encoder.encode(torch.stack([IMAGES[3].flip(2), IMAGES[0], IMAGES[3]]))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(found[0], found[2], atol=0.1)
    on_the_fly = open_encoded(dataset_of(True), encoder, data, LatentCacheOptions(no_latent_cache=True), MACHINE)
    torch.testing.assert_close(on_the_fly.moments(indices, mirrored), expected)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("no_such_model", "", "cannot load --align_encoder no_such_model .*expected the name of a timm model"),
        ("test_vit2", "test_vit", "does not fit --align_encoder test_vit2"),
        ("test_vit", "missing", "cannot read .*missing"),
    ],
)
def test_encoders_that_cannot_be_loaded_are_refused(weights, name, file, message):
    path = weights(file) if file == "test_vit" else file
    with pytest.raises(UsageError, match=message):
        load_encoder(name, path)


def test_without_a_connection_the_error_comes_after_three_requests(monkeypatch):
    asked = []

    def fail(url, **settings):
        asked.append(url)
        raise ConnectionError("no connection")

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(hub, "PAUSES_S", (0, 0))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("timm would repeat its requests"))
    with pytest.raises(UsageError, match=r"cannot load --align_encoder test_vit \(no connection\): .*_weights FILE"):
        load_encoder("test_vit")
    assert len(asked) == 3
    assert asked[0].endswith("test_vit.r160_in1k/resolve/main/model.safetensors")


def test_weights_in_the_hubs_cache_need_no_connection(monkeypatch):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.setattr(
        hub, "try_to_load_from_cache", lambda name, file: "a file" if file == "pytorch_model.bin" else None
    )
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: settings)
    assert load_encoder("test_vit")["pretrained"]


def test_an_encoder_without_a_grid_is_refused():
    class Pooled(torch.nn.Module):
        num_features, pretrained_cfg = 3, {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        feature_info = ({"reduction": 8},)

        def forward_features(self, pixels):
            return pixels.mean((2, 3), keepdim=True)

    with pytest.raises(
        UsageError, match=r"--align_encoder pooled gives features of the shape \(3, 1, 1\) .*need \(3, 4, 4\)"
    ):
        ImageEncoder("pooled", Pooled(), 4, 16)
