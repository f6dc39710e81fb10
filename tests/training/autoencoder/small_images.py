"""Small images and the options of short runs, for the tests in this folder."""

import signal

import numpy as np
import torch

from datasets_prep.datasets import DatasetFacts, ImageDataset
from runtime.precision import Machine
from training.autoencoder.run import autoencoder_options, train_autoencoder
from training.autoencoder.state import AutoencoderState

CPU = Machine(torch.device("cpu"), "fp32")
TINY = {"widths": (8, 16), "latent_channels": 2, "batch_size": 16, "max_steps": 2, "tracker": "none"}
TINY_DC = TINY | {"widths": (8, 8)}


def dataset_of(images, flips=False, crop=None):
    facts = DatasetFacts("folder", images.shape[-1], images.shape[1], crop, flips, ())
    return ImageDataset(facts, "train", np.zeros(len(images)), images.__getitem__, "fingerprint")


def blobs(count, side=8, channels=1):
    """Bright spots at random positions on black: uint8 [count, channels, side, side]."""
    generator = torch.Generator().manual_seed(0)
    center = torch.rand(count, 2, 1, 1, generator=generator) * side
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = (x - center[:, 0]) ** 2 + (y - center[:, 1]) ** 2
    return (255 * (-distance / 6).exp()).round().byte()[:, None].expand(-1, channels, -1, -1)


def train(output, dataset=None, held_out=None, machine=CPU, **options):
    """Run a short training in the folder `output`."""
    dataset = dataset or dataset_of(blobs(64))
    held_out = held_out or dataset_of(blobs(20))
    given = autoencoder_options(output=str(output), **TINY | options)
    return train_autoencoder(dataset, held_out, given, machine)


def stop_after(step, monkeypatch):
    """Send SIGTERM to this process in the given step."""
    advance = AutoencoderState.advance

    def stopping(state, *arguments):
        advance(state, *arguments)
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AutoencoderState, "advance", stopping)


PARALLEL = {  # runs that two processes repeat
    "kl": {"max_steps": 4, "equivariance": 0.5, "augment": ("flip", "crop", "color")},
    "dc": {"max_steps": 4, "architecture": "dc", "optimizer": "muon", "widths": (8, 8)},
}
