"""ImageNet in torchvision's layout. The dataset `folder` is tested in test_datasets.py."""

import shutil

import pytest
import torch

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.images import read_image
from options import UsageError

WNIDS = ("n01440764", "n01443537", "n02119789")


@pytest.fixture
def imagenet(tmp_path, photographs):
    """Three classes with 4, 3 and 2 training images; the last two have one validation image each."""
    root = tmp_path / "imagenet"
    for split, counts in (("train", (4, 3, 2)), ("val", (0, 1, 1))):
        for number, count in enumerate(counts):
            folder = root / split / WNIDS[number]
            folder.mkdir(parents=True)
            for index in range(count):
                photographs[6 * number + index].save(folder / f"{WNIDS[number]}_{index}.JPEG")
    return root


def open_split(root, split="train", **settings):
    return open_dataset(DatasetOptions("imagenet_256", str(root), 48, **settings), split)


def test_images_and_labels(imagenet):
    train, validation = open_split(imagenet), open_split(imagenet, "validation")
    assert train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert validation.labels.tolist() == [1, 2]
    for dataset, folder in ((train, "train"), (validation, "val")):
        for index, path in enumerate(sorted((imagenet / folder).rglob("*.JPEG"))):
            assert torch.equal(dataset[index], read_image(path, 48))
    facts = train.facts
    assert (facts.name, facts.flips, facts.crop, facts.class_names) == ("imagenet_256", True, None, WNIDS)


def test_imagenets_class_names_are_not_stored(imagenet):
    for number in range(98):
        folder = imagenet / "train" / f"n1{number:07d}"
        shutil.copytree(imagenet / "train" / WNIDS[2], folder)
    dataset = open_split(imagenet)
    assert dataset.labels.max() == 100
    assert dataset.facts.class_names == ()


def test_the_fingerprint_depends_on_names_and_sizes(imagenet, tmp_path):
    before = open_split(imagenet).fingerprint
    shutil.copytree(imagenet, tmp_path / "copy", copy_function=shutil.copyfile)  # file times are not copied
    assert open_split(tmp_path / "copy").fingerprint == before
    image = imagenet / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    image.write_bytes(image.read_bytes() + b"\0")
    assert open_split(imagenet).fingerprint != before


def test_missing_folders_and_foreign_classes(imagenet):
    shutil.copytree(imagenet / "val" / WNIDS[1], imagenet / "val" / "n99999999")
    with pytest.raises(UsageError, match="does not belong to a class of the training images"):
        open_split(imagenet, "validation")
    shutil.rmtree(imagenet / "val")
    with pytest.raises(UsageError, match=r"val/<wnid>/\*\.JPEG in .*no such folders.*unpack_imagenet --datadir"):
        open_split(imagenet)
    (imagenet / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(UsageError, match=r"found only ILSVRC2012_img_val\.tar"):
        open_split(imagenet)
