import torch

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.idx import CLASSES
from datasets_prep.label_maps.datasets import open_segmentation
from datasets_prep.label_maps.silhouettes import silhouette


def test_brighter_pixels_belong_to_the_garment():
    images = torch.zeros(2, 1, 6, 6, dtype=torch.uint8)
    images[0, 0, 1, 2], images[0, 0, 3, 3], images[1, 0, 4, 0] = 21, 20, 255
    found = silhouette(images)
    assert (found.dtype, found.shape) == (torch.bool, images.shape)
    assert found.nonzero().tolist() == [[0, 0, 1, 2], [1, 0, 4, 0]]


def frame(hole_rows, hole_columns):
    image = torch.zeros(12, 12, dtype=torch.uint8)
    image[1:11, 1:11] = 200
    image[3 : 3 + hole_rows, 3 : 3 + hole_columns] = 5
    return image


def test_small_enclosed_holes_are_filled():
    """Holes of up to eight edge-connected pixels are filled. Larger ones belong to the background."""
    assert int(silhouette(frame(2, 4)).sum()) == 100
    assert int(silhouette(frame(3, 3)).sum()) == 91
    diagonal = frame(2, 4)  # touches six further hole pixels only at a corner, so there are two holes
    diagonal[5:7, 7:10] = 0
    assert int(silhouette(diagonal).sum()) == 100
    open_hole = frame(1, 2)
    open_hole[0:4, 3] = 0  # a gap that connects it to the outside
    assert int(silhouette(open_hole).sum()) == 96


def test_images_in_a_batch_are_filled_independently():
    batch = torch.stack([frame(3, 3), frame(2, 4), frame(2, 4), frame(3, 3)])
    assert silhouette(batch).sum((1, 2)).tolist() == [91, 100, 100, 91]
    for image, expected in zip(batch, silhouette(batch), strict=True):
        assert torch.equal(silhouette(image), expected)


def test_fashion_mnist_has_eleven_classes(fashion_mnist_dir):
    options = DatasetOptions("fashion_mnist", str(fashion_mnist_dir), 32)
    dataset, plain = open_segmentation(options, "validation"), open_dataset(options, "validation")
    assert dataset.classes.names == ("background", *CLASSES["fashion_mnist"])
    assert dataset.classes.mirrored == ()
    assert dataset.facts == plain.facts
    assert dataset.fingerprint == plain.fingerprint  # so the latent cache is shared
    for index in range(150):
        labels, image, number = dataset.label_map(index), dataset[index], int(plain.stored_labels[index]) + 1
        assert (labels.dtype, labels.shape) == (torch.uint8, (32, 32))
        assert labels.unique().tolist() == [0, number]
        assert (labels[image[0] > 20] == number).all()
        assert labels[[0, 1, 30, 31]].sum() == 0  # the padding
        assert torch.equal(labels > 0, silhouette(image)[0])
