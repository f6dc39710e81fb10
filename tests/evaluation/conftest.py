"""Weights in the published formats, random: nothing is downloaded."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> str:
    """A state dict of the FID's InceptionV3 with random weights, under which features have about unit variance."""
    from pytorch_fid import inception

    torch.manual_seed(0)
    with (
        mock.patch.object(inception, "load_state_dict_from_url"),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        network = inception.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    noise = torch.rand(8, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.train()(
            torch.nn.functional.interpolate(noise, (139, 139)) * 2 - 1
        )  # sets the normalisations' statistics
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.clamp_(min=1e-2)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> tuple[Path, Path]:
    """Two folders of 70 PNG images of 20 x 16 pixels: noise of two colours, of which the second is smoother."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low, high in (("a", 0, 255), ("b", 60, 200)):
        (root / name).mkdir()
        for index in range(70):
            pixels = generator.integers(low, high, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root / "a", root / "b"
