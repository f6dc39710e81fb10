import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.features.inception import InceptionFeatures
from evaluation.features.protocol import describe_features
from evaluation.features.registry import FeatureOptions, load_features
from options import UsageError


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (3, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def pip_network(weights: str, dims: int) -> torch.nn.Module:
    from unittest import mock

    from pytorch_fid import inception

    with mock.patch.object(inception, "load_state_dict_from_url", return_value=torch.load(weights)):
        return inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_features_equal_pip_pytorch_fids(inception_weights, images, dims):
    features = InceptionFeatures(inception_weights, "cpu", dims)
    with torch.no_grad():
        expected = pip_network(inception_weights, dims)(images / 255)[0].mean((2, 3))
    assert 0.01 < expected.std() < 100
    assert set(features.outputs) == ({"features", "spatial", "logits"} if dims == 2048 else {"features"})
    found = features(images, {"features"})["features"]
    assert found.shape == (3, dims)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_spatial_features_and_logits(inception_weights, images):
    network = InceptionFeatures(inception_weights, "cpu")
    assert network.outputs == {"features": 2048, "spatial": 2023, "logits": 1008}
    found = network(images, network.outputs)
    pip = pip_network(inception_weights, 768)
    captured = []
    pip.blocks[2][6].register_forward_hook(lambda module, inputs, output: captured.append(output))
    with torch.no_grad():
        pip(images / 255)
    torch.testing.assert_close(found["spatial"], captured[0][:, :7].flatten(1), rtol=1e-4, atol=1e-4)
    weight = torch.load(inception_weights)["fc.weight"]
    torch.testing.assert_close(found["logits"], found["features"] @ weight.T)


def test_bfloat16_features_are_close_and_labeled(inception_weights, images):
    exact, lowered = (InceptionFeatures(inception_weights, "cpu", 64, name) for name in ("fp32", "bf16"))
    found, expected, restored = (
        network(images, {"features"})["features"] for network in (lowered, exact, lowered.exact())
    )
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.03
    assert torch.equal(restored, expected)
    assert lowered.sha256 == exact.sha256
    assert describe_features(lowered) == {**describe_features(exact), "precision": "bf16"}


def test_other_layers_are_refused(inception_weights):
    with pytest.raises(UsageError, match="64, 192, 768, 2048"):
        InceptionFeatures(inception_weights, "cpu", 100)


def test_oblong_images_are_not_cropped(inception_weights, tmp_path):
    from evaluation.sources import decode

    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(decode(tmp_path / "a.png", "a").permute(1, 2, 0), torch.from_numpy(pixels))


def test_inception_accepts_gray_and_color_images(inception_weights):
    from pytorch_fid import inception

    images = torch.randint(256, (2, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    download = inception.load_state_dict_from_url
    features = load_features("inception", FeatureOptions(feature_weights=inception_weights), "cpu")
    assert inception.load_state_dict_from_url is download
    assert features.label == "FID"
    gray, color = (features(batch, {"features"})["features"] for batch in (images, images.expand(-1, 3, -1, -1)))
    assert gray.shape == (2, 2048)
    torch.testing.assert_close(gray, color, rtol=1e-3, atol=1e-3)
    assert (
        features.sha256 == load_features("inception", FeatureOptions(feature_weights=inception_weights), "cpu").sha256
    )


def test_foreign_inception_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("foreign.pth", "text.pth", "missing.pth"):
        with pytest.raises(UsageError, match=name):
            load_features("inception", FeatureOptions(feature_weights=str(tmp_path / name)), "cpu")


def test_without_internet_the_error_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UsageError, match=r"no route to host.*--feature_weights FILE"):
        load_features("inception", FeatureOptions(), "cpu")
