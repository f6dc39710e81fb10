import pytest
import timm
import torch


@pytest.fixture(scope="session")
def dinov2_weights(tmp_path_factory) -> str:
    """Random weights for DINOv2's ViT-S/14."""
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", img_size=70, num_classes=0)
    path = tmp_path_factory.mktemp("dinov2") / "small.pth"
    torch.save(network.state_dict(), path)
    return str(path)
