"""Small untrained models for the tests of the demo page: three classes, images of 14 x 14 pixels padded to 16 x 16."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import LoadedModel
from checkpoints.header import Header
from checkpoints.tasks import GENERATE, INPAINT, SEMANTIC
from datasets_prep.image_dataset import DatasetFacts
from demo_page.drawing import DemoModel
from demo_page.settings import Limits, Settings
from latent_flow import Flow
from models.conditions import DenseInput
from models.dit import DiTOptions
from runtime.precision import Machine
from tests.headers import header_of
from tests.plain_autoencoder import PlainAutoencoder
from tests.small_networks import new_network

__all__ = ["SETTINGS", "demo_header", "demo_model"]

CHANNELS = 12  # of PlainAutoencoder's latents of color images
FACTS = DatasetFacts("tiny", 16, 3, 14, False, ("shirt", "shoe", "bag"))
DENSE = {GENERATE.name: None, INPAINT.name: DenseInput(CHANNELS + 1), SEMANTIC.name: DenseInput(CHANNELS, classes=4)}
SETTINGS = Settings(
    method="dpm", steps=4, scale=1.0, low=0.2, high=0.7, internal=1.0, embedded=1.0, shift=1.0, seed=3
)  # fmt: skip


def demo_header(task: str = GENERATE.name, label_dropout: float = 0.1, **options: Any) -> Header:
    """The header of a small DiT for a task."""
    dense = DENSE[task]
    inputs = CHANNELS + (dense.channels if dense else 0)
    network = DiTOptions(inputs, CHANNELS, label_dropout, num_classes=3, **options)
    return header_of(network, latent_size=8, dataset=FACTS, task=task, dense=dense)


def demo_model(task: str = GENERATE.name, limits: Limits = Limits(8, 20, 60.0), **options: Any) -> DemoModel:  # noqa: B008
    """A model with a small untrained DiT for a task."""
    header = demo_header(task, **options)
    network = new_network(header.model_type, header.network, header.dense)
    flow = Flow(LoadedModel(network, PlainAutoencoder(3), header), Machine(torch.device("cpu"), "fp32"))
    return DemoModel(flow, Path("model.safetensors"), limits, ThreadPoolExecutor(1))
