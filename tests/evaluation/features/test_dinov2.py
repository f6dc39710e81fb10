import pytest
import torch

from evaluation.features.registry import FeatureOptions, load_features
from options import UsageError


def test_features_are_the_class_token_of_224_pixels(dinov2_weights):
    features = load_features("dinov2", FeatureOptions(feature_weights=dinov2_weights), "cpu")
    assert (features.label, features.name) == ("FD (DINOv2 ViT-S/14)", "dinov2_small")
    assert features.outputs == {"features": 384}
    images = torch.randint(256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = features.network.forward_features((images / 255 - mean) / std)
    torch.testing.assert_close(features(images, {"features"})["features"], tokens[:, 0])
    assert features(images[:, :1, :50, :50], {"features"})["features"].shape == (2, 384)


def test_foreign_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(UsageError, match=r"cannot load .*foreign\.pth as --feature_weights.*DINOv2"):
        load_features("dinov2", FeatureOptions(feature_weights=str(tmp_path / "foreign.pth")), "cpu")
