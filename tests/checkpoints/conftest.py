"""Files of other projects, built from the golden cases' lists of names, and autoencoders for their latents."""

from pathlib import Path

import pytest
import torch

from checkpoints.projects.registry import PROJECTS
from models.autoencoders.kl import new_autoencoder_kl

CASES = Path(__file__).parents[1] / "golden" / "published"


@pytest.fixture
def case_of(golden):
    """`case_of(name)` reads a golden case."""
    return lambda name: golden.read_case(CASES / f"{name}.safetensors")


@pytest.fixture
def weights_of(golden):
    """`weights_of(case)` gives the case's state dict, with the published names in their order."""

    def build(case):
        own = golden.build_case(case).state_dict()
        names = PROJECTS[case.arguments["model_type"]].names(own)
        assert list(names) == [name for name, _ in case.weights]
        return {name: own[mine].clone() for name, mine in names.items()}

    return build


@pytest.fixture(scope="session")
def autoencoder_for(tmp_path_factory):
    """`autoencoder_for(channels)` gives the folder of an autoencoder with so many latent channels and factor 2."""
    folders: dict[int, Path] = {}

    def build(channels):
        if channels not in folders:
            folders[channels] = tmp_path_factory.mktemp(f"ae{channels}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                new_autoencoder_kl(3, (8, 8), channels, 16, {}).save_pretrained(folders[channels])
        return str(folders[channels])

    return build
