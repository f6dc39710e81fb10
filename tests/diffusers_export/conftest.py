"""A checkpoint of each network family, and the folders exported from them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from checkpoints.files import save_weights
from datasets_prep.image_dataset import DatasetFacts
from diffusers_export.writer import export
from flow.flow_maps.mean_flow import MeanFlowOptions
from flow.guidance import GuidanceOptions
from flow.losses.options import FlowMatchingOptions
from flow.solvers import SolverOptions
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.loading import load_pretrained
from models.dit import DiTOptions
from options import make_options
from tests.headers import header_of
from tests.small_networks import SMALL, new_network

LATENTS = {"num_in_channels": 4, "num_out_channels": 4}
NAMES = ("cat", "dog")
LATENT = DiTOptions(**LATENTS, num_classes=2, label_dropout=0.1, time_scale_factor=1000.0)
MAP = DiTOptions(num_in_channels=3, num_out_channels=3, num_classes=2, label_dropout=0.1, until_embedding="interval")


class Case(NamedTuple):
    """Command-line flags of the solver and guidance, and header entries besides the network's."""

    model_type: str
    network: object
    flags: dict
    header: dict = {}  # noqa: RUF012


GUIDED = {"method": "dpm", "num_steps": 8, "cfg_scale": 2.5, "cfg_interval": (0.2, 0.7), "time_shift": 2.0}
CASES = {
    "latent": Case("DiT-Mi/2", LATENT, GUIDED),
    "pixels": Case("DiT-Mi/2", SMALL["DiT-Mi/2"], {"method": "stochastic", "num_steps": 3}),
    "data": Case(
        "DiT-Mi/2", SMALL["DiT-Mi/2"], {"method": "euler", "num_steps": 2},
        {"path": FlowMatchingOptions(prediction="data")},
    ),
    "map": Case(
        "DiT-Mi/2", MAP, {"method": "flow_map", "num_steps": 2, "reinject_noise": 0.5},
        {"objective": "mean_flow", "path": MeanFlowOptions()},
    ),
    **{
        name: Case(name, SMALL[name], {"method": "heun", "num_steps": 2})
        for name in ("adm", "ncsn++", "origin_adm", "unet")
    },
}  # fmt: skip


class Places(NamedTuple):
    """Folder of the checkpoints NAME/best.safetensors, and of the exported folders NAME."""

    checkpoints: Path
    exported: Path


@pytest.fixture(scope="session")
def tiny_autoencoder(tmp_path_factory) -> str:
    """An autoencoder of 16 x 16 grayscale images with latents of side 8."""
    folder = tmp_path_factory.mktemp("autoencoder") / "vae"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        statistics = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [0.5, 0.6, 0.7, 0.8]}
        new_autoencoder_kl(1, (8, 8), 4, 16, statistics).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def places(tmp_path_factory, tiny_autoencoder) -> Places:
    """All CASES, exported with their flags as defaults."""
    root = tmp_path_factory.mktemp("places")
    for name, case in CASES.items():
        save_case(name, root / "runs" / name / "best.safetensors", tiny_autoencoder)
        options = [
            make_options(group, {key: value for key, value in case.flags.items() if hasattr(group, key)})
            for group in (SolverOptions, GuidanceOptions)
        ]
        export(root / "runs" / name / "best.safetensors", root / name, *options, given={}, license_name="mit")
    return Places(root / "runs", root)


def save_case(name: str, path: Path, tiny_autoencoder: str) -> None:
    case, entries = CASES[name], {}
    if name == "latent":
        facts = load_pretrained(tiny_autoencoder).describe()
        entries = {"autoencoder": facts, "dataset": DatasetFacts("tiny", 16, 1, 12, False, NAMES)}
    header = header_of(case.network, case.model_type, 8, **entries, **case.header)
    network, generator = new_network(case.model_type, case.network), torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # so that the velocity clearly depends on time and label
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_weights(path, network.state_dict(), header)


@pytest.fixture
def latent_copy(places, tmp_path) -> Path:
    """A copy of the exported folder `latent` that a test may damage."""
    return Path(shutil.copytree(places.exported / "latent", tmp_path / "copy"))
