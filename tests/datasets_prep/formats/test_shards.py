"""Which files belong to which split."""

import pytest

from datasets_prep.folder_layout.splits import split_names
from datasets_prep.formats.shards import find_shards


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("a-0 a-1", "a-0 a-1", ""),
        ("train-00000-of-00002 train-00001-of-00002 validation-00000-of-00001", None, "validation-00000-of-00001"),
        ("imagenet1k-train-0 imagenet1k-validation-0", "imagenet1k-train-0", "imagenet1k-validation-0"),
        ("train-0 test-0 validation-0", "train-0", "validation-0"),
        ("test-0 test-1", "test-0 test-1", ""),
        ("cifar10 cifar10-test", "cifar10", "cifar10-test"),
        ("pretraining-0 retest-0", "pretraining-0 retest-0", ""),
    ],
)
def test_words_in_names_choose_the_split(names, train, held_out):
    found = split_names(names.split())
    expected = [name for name in names.split() if name.startswith("train")] if train is None else train.split()
    assert (found.train, found.held_out) == (expected, held_out.split())


def test_files_of_other_splits_are_reported(tmp_path):
    for name in ("train-0.tar", "test-0.tar", "val-0.tar", "._train-1.tar", "notes.txt"):
        (tmp_path / name).touch()
    shards = find_shards(tmp_path, (".tar",))
    assert [path.name for path in shards.train] == ["train-0.tar"]
    assert shards.rule() == "from val-0.tar"
    assert shards.left_out() == ("files of other splits: 1 (test-0.tar)",)
    assert find_shards(tmp_path, (".npz",)) is None
    assert find_shards(tmp_path / "missing", (".tar",)) is None


def test_only_folders_of_splits_are_entered(tmp_path):
    for name in ("train", "val", "cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").touch()
    shards = find_shards(tmp_path, (".tar",))
    assert (shards.train, shards.held_out) == ([tmp_path / "train" / "a.tar"], [tmp_path / "val" / "a.tar"])
    (tmp_path / "val" / "a.tar").unlink()
    assert find_shards(tmp_path, (".tar",)).held_out == []
    (tmp_path / "train" / "a.tar").unlink()
    assert find_shards(tmp_path, (".tar",)) is None
