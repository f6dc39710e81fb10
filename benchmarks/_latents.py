"""Full-size substitutes for real data: a cache of random moments, and Stable Diffusion's autoencoder with random weights."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from datasets_prep.cached_moments import LatentCache
from datasets_prep.latent_cache import SHARD_BYTES
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import Autoencoder

__all__ = ["MOMENT_SHAPE", "ORIENTATIONS", "new_autoencoder", "new_network", "open_random_cache", "write_random_cache"]

MOMENT_SHAPE, ORIENTATIONS = (8, 32, 32), 2  # 256-pixel images, each also mirrored
IMAGE_BYTES = ORIENTATIONS * int(np.prod(MOMENT_SHAPE)) * 2
SHARD_SIZE = SHARD_BYTES // IMAGE_BYTES


def new_network() -> diffusers.AutoencoderKL:
    """An untrained network with the architecture of Stable Diffusion's autoencoder."""
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
    }
    return diffusers.AutoencoderKL(latent_channels=4, layers_per_block=2, sample_size=256, **levels)


def new_autoencoder() -> Autoencoder:
    """Stable Diffusion's autoencoder with random weights from a fixed seed."""
    torch.manual_seed(0)
    return PretrainedAutoencoder(new_network(), "random weights")


def write_random_cache(folder: Path, size: int) -> int:
    """Write shards of random moments, about `size` bytes in total, to `folder`. Returns the number of images."""
    folder.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).standard_normal((SHARD_SIZE, ORIENTATIONS, *MOMENT_SHAPE), np.float32)
    block = block.astype(np.float16)
    shards = max(1, size // block.nbytes)
    for number in range(shards):
        with _shard(folder, number).open("wb") as file:
            np.save(file, np.roll(block, number, axis=0))
    return shards * SHARD_SIZE


def open_random_cache(folder: Path, count: int) -> LatentCache:
    """Open the cache written by `write_random_cache`, without verifying checksums."""
    manifest = {
        "orientations": ORIENTATIONS,
        "shard_size": SHARD_SIZE,
        "moment_shape": MOMENT_SHAPE,
        "shards": [{"file": _shard(folder, number).name} for number in range(count // SHARD_SIZE)],
    }
    return LatentCache(folder, manifest, torch.zeros(count, dtype=torch.long))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"moments_{number:05d}.npy"
