"""Checkpoint headers of small networks, for tests that care about few of their entries."""

from typing import Any

from checkpoints.header import Header
from datasets_prep.image_dataset import DatasetFacts
from models.autoencoders.protocol import AutoencoderFacts
from models.family import FamilyOptions

__all__ = ["PIXELS", "header_of"]

PIXELS = AutoencoderFacts(id="none", sha256="none")  # pixel space


def header_of(network: FamilyOptions, model_type: str = "DiT-Mi/2", latent_size: int = 4, **others: Any) -> Header:
    """A header for a network in pixel space whose images have the network's size and channels; `others` overrides entries."""
    facts = DatasetFacts("tiny", latent_size, network.num_out_channels, None, False, ())
    return Header(model_type, network, latent_size, **{"autoencoder": PIXELS, "dataset": facts} | others)
