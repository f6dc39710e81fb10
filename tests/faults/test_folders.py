"""Folders as users bring them: junk, links, splits, wrappers, label files, and more or fewer classes than the network has."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints.experiments import newest_model
from checkpoints.files import read_weights
from datasets_prep.build_lmdb import list_in_order
from datasets_prep.datasets import DatasetFacts, DatasetOptions, FlipOptions, ImageDataset, choose_flips, open_dataset
from datasets_prep.folder_layout.label_files import FileLabels, number_labels
from datasets_prep.folder_layout.report import show_data
from datasets_prep.folder_layout.splits import name_splits
from datasets_prep.folders import list_files
from datasets_prep.images import IMAGE_SUFFIXES, read_image
from datasets_prep.label_maps.datasets import open_segmentation
from datasets_prep.latent_cache import LatentCacheOptions
from datasets_prep.latents import open_latents
from datasets_prep.masks import MaskSetOptions, mask_set
from datasets_prep.moments import open_moments
from evaluation.sources import open_source
from models.dit import DiTOptions
from options import UsageError
from runtime.files import read_json, write_json
from runtime.messages import note
from runtime.precision import Machine
from tests.plain_autoencoder import PlainAutoencoder
from training.network import check_classes

MACHINE = Machine(torch.device("cpu"), "fp32")
SIZE = 8


def write(root, counts):
    """Write images of one color each; `counts` are numbers of images by folder."""
    value = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            value += 1
            Image.new("RGB", (SIZE, SIZE), (value % 256, value // 256, 0)).save(root / name / f"{index:03d}.png")
    return root


def open_folder(root, split="train", name="folder"):
    return open_dataset(DatasetOptions(name, str(root), SIZE), split)


def both(root):
    return open_folder(root), open_folder(root, "validation")


def class_counts(dataset):
    return dict(zip(dataset.survey.classes, torch.bincount(dataset.labels).tolist(), strict=True))


def colors(dataset):
    return [int(dataset[index][0, 0, 0]) for index in range(len(dataset))]


def warnings_of(root):
    return "\n".join(open_folder(root).survey.warnings)


# Junk.

JUNK = (
    ".ipynb_checkpoints/0-checkpoint.png", ".hidden/0.png", "__MACOSX/cat/0.png", "cat/._000.png", "cat/@eaDir/0.png/x.jpg",
    "@eaDir/0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png", "System Volume Information/0.png", "lost+found/0.png",
    "cat/.DS_Store", "cat/Thumbs.db", "desktop.ini", "cat/.thumbnails/0.png", ".Trash-1000/0.png", "dog/__pycache__/0.png",
)  # fmt: skip


@pytest.fixture
def littered(tmp_path):
    root = write(tmp_path / "littered", {"cat": 6, "dog": 6})
    for name in JUNK:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


def test_junk_is_no_class_and_no_image(littered):
    train, held_out = both(littered)
    assert (class_counts(train), len(held_out)) == ({"cat": 6, "dog": 5}, 1)
    (left_out,) = train.survey.left_out
    assert left_out.startswith(f"hidden or system entries: {len(JUNK)} (")


def test_every_reader_of_folders_passes_over_junk(littered, tmp_path, capsys):
    expected = sorted([*littered.glob("cat/0*.png"), *littered.glob("dog/0*.png")])
    assert len(expected) == 12
    assert list_files(littered, IMAGE_SUFFIXES) == expected
    assert "not read in" in capsys.readouterr().err
    assert list_in_order(littered) == expected
    assert open_source(littered).count == 12
    assert capsys.readouterr().err == ""  # noted once
    masks = write(tmp_path / "masks", {".": 2})
    (masks / "._000.png").write_bytes(b"no image")
    for index in range(2):
        Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255).save(masks / f"{index:03d}.png")
    assert mask_set(MaskSetOptions(mask_dir=str(masks)), SIZE)(2).sum() == SIZE


def test_junk_next_to_label_maps(tmp_path):
    for split in ("training", "validation"):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            folder = tmp_path / "ADEChallengeData2016" / kind / split
            folder.mkdir(parents=True)
            Image.new("L" if suffix == "png" else "RGB", (SIZE, SIZE)).save(folder / f"0.{suffix}")
            (folder / f"._0.{suffix}").write_bytes(b"no image")
    assert len(open_segmentation(DatasetOptions("ade20k", str(tmp_path), SIZE), "train")) == 1


def test_nothing_but_junk_is_an_error_that_says_so(tmp_path):
    write(tmp_path, {".cache": 3})
    with pytest.raises(UsageError, match=r"no images in .*not read: hidden or system entries: 1 \(\.cache\)"):
        open_folder(tmp_path)


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    assert len(open_folder(write(tmp_path / ".data" / "pics", {"cat": 6, "dog": 6}))) == 11


# Links.


def test_linked_class_folders_and_files_are_read(tmp_path):
    store = write(tmp_path / "store", {"dog": 6, "one": 1})
    root = write(tmp_path / "root", {"cat": 6})
    (root / "dog").symlink_to(store / "dog")
    (root / "cat" / "linked.png").symlink_to(store / "one" / "000.png")
    assert class_counts(open_folder(root)) == {"cat": 7, "dog": 5}
    assert open_source(root).count == len(list_in_order(root)) == 13


def test_links_alone_make_a_dataset(tmp_path):
    store = write(tmp_path / "root" / ".store", {"cat": 6, "dog": 6}).resolve()
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).symlink_to(store / name)
    assert class_counts(open_folder(tmp_path / "root")) == {"cat": 6, "dog": 5}


def test_loops_end_and_nothing_is_read_twice(tmp_path):
    root = write(tmp_path / "root", {"cat": 3, "dog": 3})
    write(tmp_path, {"other": 5})
    for place, target in {
        "loop": ".",
        "up": "..",
        "cat/back": "../dog",
        "dog/back": "../cat",
        "dog/self": "self",
    }.items():
        (root / place).symlink_to(target)
    paths = list_files(root, IMAGE_SUFFIXES)
    assert paths == sorted([*root.glob("cat/0*.png"), *root.glob("dog/0*.png")])
    (repeated,) = [text for text in open_folder(root).survey.left_out if "read already" in text]
    assert repeated.startswith("links to folders that are read already: 4 (")


def test_links_of_many_folders_to_each_other_are_read_once(tmp_path):
    names = [f"{number:02d}" for number in range(20)]
    root = write(tmp_path, dict.fromkeys(names, 1))
    for first in names:
        for second in names:
            (root / first / f"to_{second}").symlink_to(root / second)
    assert len(list_files(root, IMAGE_SUFFIXES)) == 20


def test_broken_links_are_counted(tmp_path):
    root = write(tmp_path, {"cat": 3, "dog": 3})
    (root / "eel").symlink_to(tmp_path / "unmounted" / "eel")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "unmounted" / "gone.png")
    assert len(open_folder(root)) == 5
    assert f"broken links in {root}: 2 (cat/gone.png, eel)" in warnings_of(root)


def test_special_files_are_not_opened(tmp_path):
    write(tmp_path, {"cat": 3})
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    assert open_source(tmp_path).count == 3


# Splits.


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train", "validation"], "train", "validation"),
        (["train", "val", "test"], "train", "val"),
        (["train", "test", "valid"], "train", "valid"),
        (["train", "test"], "train", "test"),
        (["Train", "Test"], "Train", "Test"),
        (["TRAINING", "Validation", "TEST"], "TRAINING", "Validation"),
        (["training", "testing"], "training", "testing"),
        (["train", "dev"], "train", "dev"),
        (["Train", "train", "Val", "val"], "train", "val"),
        (["train2017", "val2017", "train2014"], "train2017", "val2017"),
        (["training_set", "test_set"], "training_set", "test_set"),
        (["train_images", "test_images"], "train_images", "test_images"),
        (["trainset", "valset"], "trainset", "valset"),
        (["seg_train", "seg_test", "seg_pred"], "seg_train", "seg_test"),
        (["train", "test1"], "train", "test1"),
    ],
)
def test_usual_names_of_splits(tmp_path, names, train, held_out):
    counts = {f"{name}/{pet}": 2 + index for index, name in enumerate(names) for pet in ("cat", "dog")}
    root = write(tmp_path, counts)
    opened, other = both(root)
    assert class_counts(opened) == dict.fromkeys(("cat", "dog"), counts[f"{train}/cat"])
    assert other.labels.bincount().tolist() == [counts[f"{held_out}/cat"]] * 2
    assert opened.survey.held_out == f"from {held_out}"


@pytest.mark.parametrize(
    "names",
    [["bus", "train"], ["train", "test_tube"], ["cat", "val"], ["training_shoes", "test_card"], ["trainer", "tester"]],
)
def test_other_names_are_classes(tmp_path, names):
    assert name_splits(names) == []
    assert open_folder(write(tmp_path, dict.fromkeys(names, 4))).survey.classes == tuple(sorted(names))


def test_unused_splits_and_strays_are_reported(tmp_path):
    root = write(tmp_path, {"train/cat": 4, "train/dog": 4, "valid/cat": 2, "test/cat": 2, "extra/eel": 3, ".": 1})
    train, held_out = both(root)
    assert (len(train), len(held_out)) == (8, 2)
    assert "test/ (not used)" in train.survey.left_out
    assert "that are not used: 2 (" in warnings_of(root)
    assert str(root / "extra") in warnings_of(root)


@pytest.mark.parametrize("names", [["trainA", "trainB", "testA", "testB"], ["valid", "test"], ["cat", "test"]])
def test_classes_that_look_like_splits_get_a_warning(tmp_path, names):
    root = write(tmp_path, dict.fromkeys(names, 4))
    assert "look like splits" in warnings_of(root)
    assert str(root) in warnings_of(root)


def test_splits_inside_class_folders_get_a_warning(tmp_path):
    root = write(tmp_path, {f"{pet}/{split}": 3 for pet in ("cat", "dog") for split in ("train", "test")})
    assert "contain splits, which are read as one set" in warnings_of(root)


def test_an_empty_validation_folder_holds_nothing_out(tmp_path):
    root = write(tmp_path, {"train/cat": 4, "train/dog": 4, "val": 0})
    train, held_out = both(root)
    assert (class_counts(train), len(held_out)) == ({"cat": 4, "dog": 3}, 1)
    assert f"empty folders: 1 ({root / 'val'})" in warnings_of(root)


def test_very_unequal_splits_get_a_warning(tmp_path):
    root = write(tmp_path, {"train": 2, "val": 3})
    assert f"{root / 'val'} has 3 images, more than the 2 in {root / 'train'}" in warnings_of(root)
    (tmp_path / "link").mkdir()
    for name in ("train", "val"):
        (tmp_path / "link" / name).symlink_to(root / "val")
    assert "are the same folder" in warnings_of(tmp_path / "link")


@pytest.mark.parametrize("test", ["test", "test/unknown", "test/test"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_test_folder_without_classes_is_not_used(tmp_path, test, split):
    root = write(tmp_path, {"train/cat": 20, "train/dog": 20, test: 3})
    dataset = open_folder(root, split)
    assert len(dataset) == (38 if split == "train" else 2)
    assert dataset.survey.classes == ("cat", "dog")
    assert f"{root / 'test'} is not used, because none of its 3 files belongs to a training class" in warnings_of(root)


# Wrappers.


@pytest.mark.parametrize("wrapper", ["animals", "a/b/c", "train", "Training", "data/train"])
def test_folders_around_the_classes_are_entered(tmp_path, wrapper):
    root = write(tmp_path, {f"{wrapper}/cat": 5, f"{wrapper}/dog": 5})
    assert class_counts(open_folder(root)) == {"cat": 5, "dog": 4}


def test_folders_around_the_splits_are_entered(tmp_path):
    inside = {"images/train/cat": 3, "images/train/dog": 3, "images/val/dog": 2}
    train, held_out = both(write(tmp_path / "yolo", inside))
    assert (class_counts(train), held_out.labels.tolist()) == ({"cat": 3, "dog": 3}, [1, 1])
    twice = {"train/train/cat": 3, "train/train/dog": 3, "test/test/dog": 2}
    train, held_out = both(write(tmp_path / "twice", twice))
    assert (class_counts(train), held_out.labels.tolist()) == ({"cat": 3, "dog": 3}, [1, 1])


def test_a_single_class_is_no_wrapper(tmp_path):
    assert open_folder(write(tmp_path, {"cat": 5})).survey.classes == ("cat",)


# Counts that surprise.


def test_files_next_to_class_folders_get_a_warning(tmp_path):
    root = write(tmp_path, {"cat": 4, "dog": 4, ".": 1})
    dataset = open_folder(root)
    assert dataset.survey.classes == ()
    assert f"the folders cat, dog in {root} are no classes, because files lie next to them: 1 (000.png)" in warnings_of(
        root
    )


def test_empty_and_single_classes_get_a_warning(tmp_path):
    root = write(tmp_path, {"cat": 4, "Cat": 1, "dog": 0})
    (root / "cat" / "phone.HEIC").touch()
    found = warnings_of(root)
    assert f"empty folders: 1 ({root / 'dog'})" in found
    assert f"classes with a single image in {root}: 1 (Cat)" in found
    assert "differ only in capitals or spaces: Cat, cat" in found
    assert "in formats that are not read: 1 (.heic)" in found


def test_validation_images_have_the_labels_of_training_classes(tmp_path):
    counts = {"train/a": 2, "train/b": 2, "train/c": 2, "val/a": 1, "val/b": 0, "val/c": 2}
    train, held_out = both(write(tmp_path, counts))
    assert held_out.labels.tolist() == [0, 2, 2]
    assert train.survey.classes == held_out.survey.classes == ("a", "b", "c")


def test_numbers_that_are_sorted_as_text_get_a_warning(tmp_path):
    """torchvision sorts them so, too."""
    survey = open_folder(write(tmp_path / "short", dict.fromkeys(map(str, range(12)), 2))).survey
    assert survey.classes[2] == "10"
    assert [w for w in survey.warnings if "label 2 is the folder 10, not 2; longer names such as 02 would" in w]
    for names in (range(10), [f"{number:02d}" for number in range(12)], ["1", "10", "a"]):
        root = write(tmp_path / f"{names}"[:9], dict.fromkeys(map(str, names), 2))
        assert open_folder(root).survey.warnings == ()


def test_a_healthy_folder_has_no_warning(tmp_path, capsys):
    root = write(tmp_path, {"train/cat": 9, "train/dog": 3, "val/cat": 2, "val/dog": 1})
    (root / "README.txt").touch()
    (root / "latent_cache" / "x").mkdir(parents=True)
    (root / "latent_cache" / "x" / "moments_00000.npy").touch()
    show_data(*both(root))
    out, err = capsys.readouterr()
    assert err == ""
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "data folder, 12 training images, 3 held out (from val)",
        "classes 2 from class folders: cat 9, dog 3",
        "left out files of other types: 1 (.txt)",
    ]


def test_many_classes_are_summed_up(tmp_path, capsys):
    root = write(tmp_path, {f"{number:02d}": 2 + (number == 7) for number in range(12)})
    show_data(*both(root))
    assert "12 from class folders: 1 (09) to 3 (07) images each" in " ".join(capsys.readouterr().out.split())


def test_what_worked_before_is_read_as_before(tmp_path):
    """Caches and exact resume depend on the order of the images, their labels, and the fingerprint of names and sizes."""
    root = tmp_path / "train"
    for name in ("dog/b.png", "dog/B.JPG", "dog/10.png", "dog/sub/a.png", "cat/2.webp", "Eel/x.jpeg", "Eel/notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    write(tmp_path, {"val/dog": 1})
    (tmp_path / "val" / "dog" / "000.png").write_bytes(b"x")
    train, held_out = (open_folder(tmp_path, split, "imagenet_256") for split in ("train", "validation"))
    assert train.facts.class_names == ("Eel", "cat", "dog")
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1, 2, 2, 2, 2], [2])
    assert train.fingerprint == "23f1d8e3d2de2268428e5a91415f89e2b90b2305749bd092b51d76df73a5adb2"
    assert held_out.fingerprint == "fc37c94be9e4b423743da6e064e8aea6cb72b6c41b3b40fcc1ee54da18d44554"


# Label files.


def write_labels(path, pairs):
    """Write a label file of the kind that `path` names; `pairs` are names of images and labels."""
    if path.suffix == ".json":
        text = json.dumps({"labels": pairs})
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps({"file_name": name, "label": label, "text": "a pet"}) + "\n" for name, label in pairs)
    else:
        text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in pairs)
    path.write_text(text, encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8")


LABEL_FILES = pytest.mark.parametrize("file", ["dataset.json", "metadata.jsonl", "metadata.csv"])


@LABEL_FILES
def test_label_files_override_folders(tmp_path, file):
    root = write(tmp_path, {"00000": 4, "00001": 4})
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.png"))]
    write_labels(root / file, [(name, index % 3) for index, name in enumerate(names)])
    train, held_out = both(root)
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1, 2, 0, 1, 2, 0], [1])
    assert train.facts.class_names == ("0", "1", "2")
    assert colors(train) == list(range(1, 8))  # the order of the images does not depend on labels
    assert train.survey.source == f"from {root / file}"


@LABEL_FILES
def test_names_as_labels_in_files_of_each_split(tmp_path, file):
    root = write(tmp_path, {"train": 4, "test": 4})
    for split, labels in (("train", ["eel", "cat", "cat", "dog"]), ("test", ["dog", "eel", "fly", "cat"])):
        write_labels(root / split / file, [(f"{index:03d}.png", label) for index, label in enumerate(labels)])
    train, held_out = both(root)
    assert train.labels.tolist() == [2, 0, 0, 1]
    assert (held_out.labels.tolist(), colors(held_out)) == ([1, 2, 0], [5, 6, 8])  # without the fly
    assert train.facts.class_names == ("cat", "dog", "eel")
    assert "held-out files of no training class, which are left out: 1 (" in warnings_of(root)


def test_numbering_many_names_takes_time_in_proportion(tmp_path):
    """With one search per name, 20,000 names would take many seconds."""
    paths = [tmp_path / f"{number}.png" for number in range(20_000)]
    labels = FileLabels({str(path): f"a {path.stem}" for path in paths}, "", [], [])
    began = time.process_time()
    numbers, names = number_labels(labels, paths)
    assert time.process_time() - began < 2
    assert all(names[numbers[str(path)]] == f"a {path.stem}" for path in paths)


def test_one_file_may_label_both_splits(tmp_path):
    root = write(tmp_path, {"train": 2, "test": 1})
    write_labels(root / "metadata.csv", [("train/000.png", 1), (r"train\001.png", 0), ("./test/000.png", 1)])
    train, held_out = both(root)
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([1, 0], [1])


def test_a_relative_folder_is_labeled_too(tmp_path, monkeypatch):
    write_labels(write(tmp_path, {".": 3}) / "metadata.csv", [(f"{index:03d}.png", index) for index in range(3)])
    monkeypatch.chdir(tmp_path)
    for root in (".", "./", f"../{tmp_path.name}"):
        assert open_folder(root).labels.tolist() == [0, 1]


def test_unlabeled_test_images_are_not_used(tmp_path):
    root = write(tmp_path, {"train": 4, "test": 2})
    write_labels(root / "train" / "metadata.csv", [(f"{index:03d}.png", index % 2) for index in range(4)])
    train, held_out = both(root)
    assert (train.labels.tolist(), held_out.labels.tolist()) == ([0, 1, 0], [1])


def test_partial_labels_give_no_classes(tmp_path):
    root = write(tmp_path, {"a": 4, "b": 4})
    write_labels(root / "metadata.csv", [(f"a/{index:03d}.png", index) for index in range(4)])
    dataset = open_folder(root)
    assert (dataset.survey.classes, dataset.labels.unique().tolist(), len(dataset)) == ((), [0], 7)
    assert "has no label for 4 of 8 images, such as" in warnings_of(root)
    assert "has no label for 4 of 8 images" in dataset.survey.no_classes


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("dataset.json", '{"labels": null}', "without a list of image names and labels"),
        ("dataset.json", '{"name": "pets"}', "without a list of image names and labels"),
        ("dataset.json", '{"labels": [["cat/000.png", [0.1, 0.2]]]}', "not class ids or names"),
        ("dataset.json", '{"labels": [["other/000.png", 0]]}', "labels none of the images"),
        ("dataset.json", "{", "cannot read the labels"),
        (
            "metadata.csv",
            "file_name,text\ncat/000.png,a cat\n",
            "without the columns file_name and label, but with 'file_name', 'text'",
        ),
        ("metadata.csv", "file_name,label\n" + 200_000 * "x" + ",0\n", "cannot read the labels"),
        ("metadata.csv", "file_name;label\ncat/000.png;0\n", "without the columns file_name and label"),
        (
            "metadata.jsonl",
            '{"file_name": "cat/000.png", "text": "a cat"}\n',
            "without the columns file_name and label",
        ),
        ("metadata.jsonl", "[1]\n", "without the columns file_name and label"),
    ],
)
def test_files_without_labels_leave_the_class_folders(tmp_path, file, text, told):
    root = write(tmp_path, {"cat": 3, "dog": 3})
    (root / file).write_text(text)
    survey = open_folder(root).survey
    assert (survey.classes, survey.source) == (("cat", "dog"), "from class folders")
    assert any(told in line and file in line for line in (*survey.left_out, *survey.warnings))


def test_class_ids_without_images_and_images_without_files(tmp_path):
    root = write(tmp_path, {".": 4})
    write_labels(
        root / "metadata.csv", [(f"{index:03d}.png", 1 + 2 * (index % 2)) for index in range(4)] + [("x.png", 0)]
    )
    assert open_folder(root).labels.tolist() == [1, 3, 1]
    assert f"classes from {root / 'metadata.csv'} without images: 2 (0, 2)" in warnings_of(root)
    assert "lists images that do not exist: 1 (" in warnings_of(root)


def test_two_labels_of_one_image_are_told(tmp_path):
    root = write(tmp_path, {".": 4})
    labels = [(f"{index:03d}.png", "ab"[index % 2]) for index in range(4)]
    write_labels(root / "metadata.csv", [*labels, labels[0]])
    assert "several labels" not in warnings_of(root)
    write_labels(root / "metadata.csv", [*labels, ("000.png", "b")])
    assert f"has several labels for one image, and the last is used: 1 ({root / '000.png'})" in warnings_of(root)


def test_a_folder_of_an_lmdb_is_told(tmp_path):
    (tmp_path / "data.mdb").touch()
    with pytest.raises(UsageError, match=r"not read: .*\.mdb\)\); for an LMDB, pass another --dataset"):
        open_folder(tmp_path)


def test_latents_have_label_files_too(tmp_path):
    for index in range(4):
        (tmp_path / "00000").mkdir(exist_ok=True)
        np.save(tmp_path / "00000" / f"{index}.npy", np.zeros((4, 2, 2), np.float32))
    write_labels(tmp_path / "dataset.json", [(f"00000/{index}.npy", index % 2) for index in range(4)])
    assert open_latents("latent_imagenet_256", tmp_path, "train", 16).labels.tolist() == [0, 1, 0]


# The network's classes and the files'.


def labeled(labels):
    facts = DatasetFacts("tiny", SIZE, 3, None, True, ())
    return ImageDataset(facts, "train", np.array(labels), lambda index: torch.zeros(3, SIZE, SIZE).byte(), "f")


def test_one_class_for_a_network_of_several_is_refused(tmp_path):
    options = DiTOptions(num_classes=2)
    with pytest.raises(UsageError, match=r"--num_classes 2, but all 3 training images have one label .*: leave out"):
        check_classes(options, labeled([0, 0, 0]), new=True)
    flat = open_folder(write(tmp_path / "flat", {".": 4}))
    with pytest.raises(
        UsageError, match=r"there are no classes, because files lie directly in .*flat\): put the images"
    ):
        check_classes(options, flat, new=True)
    single = open_folder(write(tmp_path / "single", {"cat": 4}))
    with pytest.raises(UsageError, match=r"one label \(cat\): put"):
        check_classes(options, single, new=True)


def test_missing_classes_are_told_and_trained_without(capsys):
    check_classes(DiTOptions(num_classes=4), labeled([0, 2, 2]), new=True)
    assert "--num_classes 4, but no training image has the label 1, 3: " in capsys.readouterr().err
    check_classes(DiTOptions(num_classes=1000), labeled([0, 0]), new=False)  # weights that know more classes
    assert "label 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 989 more: " in capsys.readouterr().err
    for options in (DiTOptions(num_classes=2), DiTOptions(num_classes=1)):
        check_classes(options, labeled([0, 1, 1]), new=True)
    assert capsys.readouterr().err == ""


def test_an_unconditional_network_says_that_it_ignores_class_folders(tmp_path, capsys):
    pets = open_folder(write(tmp_path / "pets", {"cat": 3, "dog": 3, "eel": 3}))
    check_classes(DiTOptions(), pets, new=True)
    shown = " ".join(capsys.readouterr().err.split())
    assert "the network is unconditional: it ignores the 3 classes; --num_classes 3 trains on them" in shown
    check_classes(DiTOptions(), pets, new=False)
    check_classes(DiTOptions(), open_folder(write(tmp_path / "flat", {".": 4})), new=True)
    assert capsys.readouterr().err == ""


# Whole runs.


def train_flags(place, *more):
    flags = ["--dataset", "folder", "--datadir", place / "images", "--image_size", SIZE, "--model_type", "DiT-Mi/4"]
    flags += ["--pretrained_autoencoder_ckpt", "none", "--batch_size", 4, "--device", "cpu", "--max_steps", 1]
    return [*flags, "--method", "euler", "--num_steps", 1, "--save_root", place / "saved", "--exp", "run", *more]


TRAIN = "train_flow_latent.py"


@pytest.mark.parametrize("flip", [None, "auto", "on", "off"])
def test_the_header_records_whether_images_are_mirrored(tmp_path, call, flip):
    write(tmp_path / "images", {"cat": 4, "dog": 4})
    code, _, err = call(TRAIN, train_flags(tmp_path, *(["--flip", flip] if flip else [])))
    assert code == 0, err
    folder = tmp_path / "saved" / "latent_flow" / "folder" / "run"
    assert read_weights(newest_model(folder))[1].dataset.flips == (flip != "off")
    assert json.loads((folder / "config.json").read_text())["options"]["flip"] == (flip or "auto")
    if flip == "off":
        code, _, err = call(TRAIN, train_flags(tmp_path))
        assert code == 2
        assert "--flip was off, now auto" in err


def test_changed_labels_need_resume(tmp_path, call):
    root = write(tmp_path / "images", {".": 6})
    write_labels(root / "metadata.csv", [(f"{index:03d}.png", index % 2) for index in range(6)])
    flags = train_flags(tmp_path, "--num_classes", 2)
    assert call(TRAIN, flags)[0] == 0
    write_labels(root / "metadata.csv", [(f"{index:03d}.png", (index + 1) % 2) for index in range(6)])
    code, _, err = call(TRAIN, flags)
    assert code == 2
    assert "labels of the training images was " in err
    assert call(TRAIN, [*flags, "--resume"])[0] == 0


def test_classes_that_are_not_there_are_refused_before_anything_is_made(tmp_path, call):
    write(tmp_path / "images", {".": 8})
    code, out, err = call(TRAIN, train_flags(tmp_path, "--num_classes", 2))
    assert code == 2
    assert "--num_classes 2, but all 7 training images have one label" in err
    assert "none, because files lie directly in" in out
    assert not (tmp_path / "saved" / "latent_flow" / "folder" / "run" / "config.json").exists()


# Latent caches.


def cached(root, flip="auto", cache="", spare=None):
    data = DatasetOptions("folder", str(root), SIZE)
    dataset = choose_flips(open_dataset(data, "train"), FlipOptions(flip))
    options = LatentCacheOptions(latent_cache_dir=cache)
    return open_moments(dataset, PlainAutoencoder(3), data, options, MACHINE, spare=spare)


def test_a_cache_with_mirror_images_serves_a_run_without(tmp_path):
    root = write(tmp_path, {".": 4})
    both_ways, upright = cached(root), cached(root, "off")
    assert both_ways.folder == upright.folder
    assert upright.orientations == 2


def test_a_cache_without_mirror_images_does_not_serve_a_run_with_them(tmp_path):
    root = write(tmp_path, {".": 4})
    upright, both_ways, again = cached(root, "off"), cached(root, "on"), cached(root, "off")
    assert (upright.orientations, both_ways.orientations) == (1, 2)
    assert upright.folder == again.folder != both_ways.folder
    assert cached(root).folder == both_ways.folder


def test_latents_without_mirror_images_cannot_be_mirrored(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((4, 2, 2), np.float32))
    dataset = open_latents("latent_imagenet_256", tmp_path, "train", 16)
    with pytest.raises(UsageError, match=r"--flip on: .*datasets_prep\.build_latents --flip on"):
        choose_flips(dataset, FlipOptions("on"))


def test_labels_of_a_cache_follow_the_images(tmp_path):
    root = write(tmp_path / "images", {".": 4})
    cache = cached(root, cache=str(tmp_path / "cache"))
    before = {path.name: path.read_bytes() for path in cache.folder.glob("moments*")}
    write_labels(root / "metadata.csv", [(f"{index:03d}.png", index % 2) for index in range(4)])
    cached(root, cache=str(tmp_path / "cache"))
    assert open_latents("latent_imagenet_256", cache.folder, "train", SIZE).labels.tolist() == [0, 1, 0]
    assert {path.name: path.read_bytes() for path in cache.folder.glob("moments*")} == before
    assert len(list(cache.folder.glob("labels*"))) == 1


def test_a_folder_that_cannot_be_written_has_its_cache_elsewhere(tmp_path, capsys):
    roots = [write(tmp_path / name / "images", {".": 4 + number}) for number, name in enumerate("ab")]
    for root in roots:
        (root / "latent_cache").write_text("in the way, as a read-only disk is")
    with pytest.raises(
        UsageError, match=r"cannot write the latent cache in .*: name another folder with --latent_cache_dir"
    ):
        cached(roots[0])
    with pytest.raises(UsageError, match="--latent_cache_dir"):
        cached(roots[0], cache=str(roots[0] / "latent_cache"), spare=tmp_path / "saved")
    first, second = (cached(root, spare=tmp_path / "saved") for root in roots)
    assert first.folder.is_relative_to(tmp_path / "saved")
    assert (len(first), len(second)) == (3, 4)
    assert first.folder != second.folder
    assert f"so the latent cache is in {first.folder.parent}" in " ".join(capsys.readouterr().err.split())


# Names of any bytes.


def test_names_that_cannot_be_printed_are_escaped(tmp_path, capsys):
    root = write(tmp_path, {os.fsdecode(b"\xff\xfe"): 4, "a\nb": 4})
    show_data(*both(root))
    note(f"{os.fsdecode(bytes([255]))}")
    out, err = capsys.readouterr()
    assert r"a\nb 4, \udcff\udcfe 3" in out
    assert r"\udcff" in err


def test_names_are_no_patterns(tmp_path):
    root = write(tmp_path / "[abc]" / "a*?{1}", {"x[0-9]": 2, "y ~$HOME": 2})
    assert class_counts(open_folder(root)) == {"x[0-9]": 2, "y ~$HOME": 1}
    assert open_source(root).count == 4


def test_no_file_stays_open(tmp_path):
    dataset, open_files = open_folder(write(tmp_path, {"a": 60})), Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    images = [dataset[index] for index in range(len(dataset))]
    assert len(images) == 57
    assert len(list(open_files.iterdir())) <= before


def test_a_folder_with_names_of_any_bytes_can_be_scored(tmp_path):
    root = write(tmp_path / os.fsdecode(b"caf\xe9"), {os.fsdecode(b"\xff\xfe"): 2})
    (root / os.fsdecode(b"\xff\xfe") / "000.png").rename(root / os.fsdecode(b"\xfc.png"))
    source = open_source(root)
    assert source.count == 2
    write_json(tmp_path / "result.json", source.meta)
    assert read_json(tmp_path / "result.json") == source.meta


def test_one_image_is_read_the_same_in_every_place(tmp_path):
    root = write(tmp_path, {"animals/cat": 2, "animals/dog": 2})
    dataset = open_folder(root)
    assert torch.equal(dataset[0], read_image(root / "animals" / "cat" / "000.png", SIZE))
