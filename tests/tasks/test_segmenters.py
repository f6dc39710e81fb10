"""Networks that predict label maps from images."""

import pytest
import torch
from torchvision.models.segmentation import deeplabv3_resnet50

from datasets_prep.label_maps.silhouettes import silhouette
from options import UsageError
from tasks.segmenters import load_segmenter, silhouette_segmenter
from tests.fake_features import FakeFeatures


class ByBrightness(FakeFeatures):
    """Replaces the classifier: class 7 for bright images, otherwise class 2."""

    outputs, classes = {"probabilities": 10}, tuple("abcdefghij")

    def probabilities(self, images):
        bright = images.float().mean((1, 2, 3)) > 60
        return torch.nn.functional.one_hot(torch.where(bright, 7, 2), 10).float()


def test_silhouettes_are_filled_with_the_predicted_class_plus_one():
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    images[0, 0, 2:26, 3:25], images[1, 0, 10:14, 10:20] = 200, 30
    images[1, 0, 20, 20] = 19  # too dark to be foreground
    found = silhouette_segmenter(ByBrightness())(images)
    assert torch.equal(found, silhouette(images)[:, 0] * torch.tensor([8, 3]).view(2, 1, 1))
    assert (found[0] == 8).sum() == 24 * 22
    assert (found[1] == 3).sum() == 40
    colors = torch.cat([images, images, images], dim=1)
    assert torch.equal(silhouette_segmenter(ByBrightness())(colors), found)


@pytest.fixture(scope="module")
def deeplab_file(tmp_path_factory):
    """Weights of deeplabv3_resnet50 with three classes and an auxiliary head. They assign all pixels to class 1."""
    with torch.device("meta"):
        shapes = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).state_dict()
    weights = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in shapes.items()}
    weights["classifier.4.bias"][1] = 1
    path = tmp_path_factory.mktemp("deeplab") / "weights.pth"
    torch.save(weights, path)
    return path


def test_deeplab_with_the_same_number_of_classes(deeplab_file):
    segment = load_segmenter(str(deeplab_file), 3, "cpu")
    images = torch.randint(256, (1, 1, 24, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = segment(images)  # gray images are accepted as well
    assert found.shape == (1, 24, 40)
    assert found.unique().tolist() == [1]


def test_deeplab_with_another_number_of_classes_is_refused_in_one_line(deeplab_file):
    with pytest.raises(UsageError) as error:
        load_segmenter(str(deeplab_file), 19, "cpu")
    message = str(error.value)
    assert "weights.pth: expected a state dict of torchvision's deeplabv3_resnet50 for 19 classes" in message
    assert "classifier.4.bias (3 in the file, 19 in the network)" in message
    assert "\n" not in message
