"""Photographs included in the packages scikit-image and scikit-learn."""

from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FILES = {
    "scikit-image": [f"skimage/data/{name}" for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")],
    "scikit-learn": [f"sklearn/datasets/images/{name}" for name in ("china.jpg", "flower.jpg")],
}


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """24 RGB images of 72 x 64 to 95 x 64 pixels: quarters of six photographs."""
    paths = [Path(distribution(package).locate_file(name)) for package, names in FILES.items() for name in names]
    pictures = []
    for index in range(24):
        with Image.open(paths[index % 6]) as file:
            photograph = file.convert("RGB")
        width, height = photograph.width // 2, photograph.height // 2
        left, top = (index // 6 % 2) * width, (index // 12) * height
        quarter = photograph.crop((left, top, left + width, top + height))
        pictures.append(quarter.resize((72 + index, 64), Image.Resampling.BICUBIC))
    return pictures


@pytest.fixture(scope="session")
def squares(photographs) -> list[np.ndarray]:
    """The left parts of the photographs, uint8 [64, 64, 3]."""
    return [np.array(picture.crop((0, 0, 64, 64))) for picture in photographs]
