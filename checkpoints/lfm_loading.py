"""Published files opened by flags: the network that they describe, its autoencoder, and the header that is missing."""

from pathlib import Path

import torch

from checkpoints.files import LoadedModel
from checkpoints.lfm import autoencoder_options, build_published, read_published, with_arguments
from datasets_prep.datasets import DatasetFacts, DatasetOptions
from models.autoencoders.loading import load_autoencoder
from models.registry import guided_diffusion_by_default
from options import Options, UsageError

__all__ = ["open_published", "published_facts"]

# The only datasets that are grey: the side of their images without padding.
GREY_SIDES = {"mnist": 28, "fashion_mnist": 28}


def open_published(path: Path, options: Options, device: torch.device | str, guided: bool = False) -> LoadedModel:
    """What `load_model` gives for our own files, of a published one.

    `guided`: --use_origin_adm is the default where neither flags nor the file name a network.

    Raises:
        UsageError: an unreadable file, or a network that its weights do not fit.
    """
    published = read_published(path)
    options = with_arguments(options, published)
    options = guided_diffusion_by_default(options) if guided else options
    facts = published_facts(options)
    autoencoder = load_autoencoder(autoencoder_options(options), facts.channels)
    network, header = build_published(published, path, options, autoencoder, facts)
    return LoadedModel(network.eval().requires_grad_(False).to(device), autoencoder.to(device), header)


def published_facts(options: Options) -> DatasetFacts:
    """What the flags say of the data that a published file was trained on; its files are not needed.

    Raises:
        UsageError: they do not name it. (A default would make wrong samples of a good network.)
    """
    missing = [f"--{name}" for name in ("dataset", "image_size") if name not in options.explicit]
    if missing:
        raise UsageError(f"a published file does not say what it was trained on: give {' and '.join(missing)}")
    data = options[DatasetOptions]
    side = GREY_SIDES.get(data.dataset)
    crop = side if side and side < data.image_size else None
    return DatasetFacts(data.dataset, data.image_size, 1 if side else 3, crop, not side, ())
