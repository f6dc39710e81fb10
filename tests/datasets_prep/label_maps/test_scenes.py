"""ADE20K and COCO-Stuff in their archives' folder layouts, with real photographs of several shapes."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_prep.datasets import DatasetOptions
from datasets_prep.images import crop_map, read_image
from datasets_prep.label_maps.datasets import SEGMENTATION_DATASETS, open_segmentation
from datasets_prep.label_maps.segmented_dataset import NO_CLASS
from options import UsageError

ADE_INFO = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1576\t11664\t1172\t1\twall\n150\t0.0001\t43\t5\t0\tflag\n"
COCO_LABELS = "0: unlabeled\n1: person\n2: bicycle\n182: wood\n"
LAYOUTS = {
    "ade20k": ("ADEChallengeData2016", "images/{}", "annotations/{}", ("training", "validation")),
    "coco": ("coco", "{}", "stuffthingmaps/{}", ("train2017", "val2017")),
}


def ids_of(picture, name):
    """Class ids computed from an image's brightness. The darkest pixels are unlabeled."""
    brightness = np.asarray(picture.convert("L"))
    if name == "ade20k":
        return (brightness // 2).astype(np.uint8)
    return np.where(brightness < 30, NO_CLASS, brightness // 2).astype(np.uint8)


@pytest.fixture(params=list(LAYOUTS))
def scenes(request, tmp_path, photographs):
    """The dataset's name and its root folder, with 5 training and 2 validation images."""
    name = request.param
    tree, images, maps, splits = LAYOUTS[name]
    for split, chosen in zip(splits, (photographs[:5], photographs[5:7]), strict=True):
        for pattern in (images, maps):
            (tmp_path / tree / pattern.format(split)).mkdir(parents=True)
        for number, picture in enumerate(chosen):
            picture.save(tmp_path / tree / images.format(split) / f"{number:012d}.jpg")
            labels = Image.fromarray(ids_of(picture, name))
            labels.save(tmp_path / tree / maps.format(split) / f"{number:012d}.png")
    return name, tmp_path


def open_split(name, datadir, split="train", size=32, **settings):
    return open_segmentation(DatasetOptions(name, str(datadir), size, **settings), split)


def test_images_and_maps(scenes, photographs):
    name, datadir = scenes
    tree, images, _, splits = LAYOUTS[name]
    for place in (datadir, datadir / tree):
        for split, folder, offset, count in (("train", splits[0], 0, 5), ("validation", splits[1], 5, 2)):
            dataset = open_split(name, place, split)
            assert len(dataset) == count
            for index in range(count):
                path = datadir / tree / images.format(folder) / f"{index:012d}.jpg"
                assert torch.equal(dataset[index], read_image(path, 32))
                labels = dataset.label_map(index)
                assert (labels.dtype, labels.shape) == (torch.uint8, (32, 32))
                expected = crop_map(Image.fromarray(ids_of(photographs[offset + index], name)), 32)
                np.testing.assert_array_equal(labels.numpy(), expected)
    assert (dataset.facts.name, dataset.facts.flips, dataset.facts.image_size) == (name, True, 32)
    assert dataset.stored_labels.tolist() == [0, 0]


def test_classes_and_their_names(scenes):
    name, datadir = scenes
    tree = datadir / LAYOUTS[name][0]
    unnamed = open_split(name, datadir).classes
    assert unnamed.count == {"ade20k": 151, "coco": 182}[name]
    assert unnamed.names[-1] == f"class {unnamed.count - (name == 'ade20k')}"
    (tree / "objectInfo150.txt").write_text(ADE_INFO)
    (tree / "labels.txt").write_text(COCO_LABELS)
    names = open_split(name, datadir).classes.names
    assert len(names) == unnamed.count
    expected = {
        "ade20k": {0: "unlabelled", 1: "wall", 2: "class 2", 150: "flag"},
        "coco": {0: "person", 1: "bicycle", 2: "class 3", 181: "wood"},
    }[name]
    assert {number: names[number] for number in expected} == expected
    assert unnamed.mirrored == ()
    assert (unnamed.palette[0].sum() == 0) == (name == "ade20k")
    assert len(np.unique(unnamed.palette, axis=0)) == unnamed.count


def test_unlabeled_pixels_of_coco_have_no_class(scenes):
    name, datadir = scenes
    if name == "coco":
        found = torch.stack([open_split(name, datadir).label_map(index) for index in range(5)]).unique()
        assert found[-1] == NO_CLASS
        assert found[-2] < 182


def test_missing_and_foreign_files_are_named(scenes):
    name, datadir = scenes
    tree, images, maps, splits = LAYOUTS[name]
    path = datadir / tree / maps.format(splits[0]) / f"{1:012d}.png"
    Image.new("L", (73, 64), 200).save(path)
    with pytest.raises(UsageError, match=rf"{path.name}: expected class ids below \d+ or 255, but found 200"):
        open_split(name, datadir).label_map(1)
    assert len(open_split(name, datadir, skip_bad_images=True)) == 4
    path.unlink()
    with pytest.raises(UsageError, match=rf"{name}: 1 of 5 label maps are missing, the first is .*{path.name}"):
        open_split(name, datadir)
    for image in (datadir / tree / images.format(splits[1])).iterdir():
        image.unlink()
    with pytest.raises(UsageError, match="no images in .*ending in .jpg"):
        open_split(name, datadir, "validation")
    with pytest.raises(UsageError, match=f"{name}: expected the folders {images.format(splits[0])} and"):
        open_split(name, datadir / "elsewhere")


def test_unknown_datasets_are_refused():
    known = ", ".join(SEGMENTATION_DATASETS)
    assert known == "celeba, celeba_256, ade20k, coco, fashion_mnist"
    with pytest.raises(UsageError, match=f"the dataset 'mnist' has no label maps: expected one of {known}"):
        open_split("mnist", ".")
