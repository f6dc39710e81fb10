import pytest
import torch

from options import UsageError
from sampling.labels import choose_labels


def test_balanced_labels_cycle_through_the_classes():
    labels = choose_labels("balanced", 0, 3, 10)
    assert labels([0, 1, 2, 3, 7], 3).tolist() == [0, 1, 2, 0, 1]


def test_a_random_label_depends_only_on_seed_and_index():
    labels = choose_labels("random", 5, 10, 1000)
    together = labels(range(1000), 10)
    assert torch.equal(labels([999, 3], 10), together[[999, 3]])
    assert not torch.equal(choose_labels("random", 6, 10, 1000)(range(1000), 10), together)
    counts = torch.bincount(together, minlength=10)
    assert counts.min() > 60
    assert counts.max() < 140


def test_labels_of_a_file(tmp_path):
    (tmp_path / "labels.txt").write_text("2\n0\n1\n2\n")
    labels = choose_labels(str(tmp_path / "labels.txt"), 0, 3, 4)
    assert labels([3, 1], 3).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n", "expected a class id for each of 3 samples, but found 2"),
        ("0\n1\n3\n", r"class ids must lie in 0\.\.2"),
        ("0\n-1\n2\n", r"class ids must lie in 0\.\.2"),
        ("cat\ndog\n", "expected balanced, random, or a file with one class id per line"),
        (None, "expected balanced, random, or a file with one class id per line"),
    ],
)
def test_invalid_label_files_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        choose_labels(str(tmp_path / "labels.txt"), 0, 3, 3)
