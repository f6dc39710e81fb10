"""Recognition of projects by names and shapes: every combination of a project's options, and files of nobody."""

import itertools
from dataclasses import replace

import pytest
import torch

from checkpoints.lfm_files import PublishedFile
from checkpoints.projects.registry import PROJECTS, find_project, fitting_projects
from models.dit import DiTOptions
from models.registry import build_network, published_options

SIZE = {"model_width": 48, "model_depth": 4, "model_heads": 3, "num_classes": 5, "label_dropout": 0.1}
LIGHTNING = {
    "norm": ("layer", "rms_affine"),
    "mlp": ("gelu", "swiglu"),
    "qk_norm": (False, True),
    "rope": (False, True),
    "adaln_shift": (True, False),
}
VARIANTS = {
    "SiT": {"learn_sigma": (False, True)},
    "REPA": {"qk_norm": (False, True)},
    "LightningDiT": LIGHTNING,
    "MeanFlow": {},
    "DiTDH": {
        "qk_norm": (False, True),
        "pos_embed": (False, True),
        "ddt_width": (48, 72),
        "adaln_shift": (True, False),
    },
}


def variants(project):
    """All networks of a project, by their options."""
    head = {"ddt_heads": 3} if project == "DiTDH" else {}
    base = DiTOptions(**{**published_options(project), **head, **SIZE, "learn_sigma": False})
    choices = VARIANTS[project]
    for values in itertools.product(*choices.values()):
        yield replace(base, **dict(zip(choices, values, strict=True)))


def file_of(project, options, patch=2, size=8):
    with torch.device("meta"):
        own = build_network(f"DiT/{patch}", size, options).state_dict()
    return PublishedFile({name: own[mine] for name, mine in PROJECTS[project].names(own).items()}, {}, {}, {})


@pytest.mark.parametrize("project", PROJECTS)
def test_every_combination_of_options_is_recognized(project):
    count = 0
    for options in variants(project):
        file = file_of(project, options)
        fitting = [each.name for each in fitting_projects(file)]
        assert project in fitting
        found = PROJECTS[project].describe(PROJECTS[project].read(file.weights), {})
        assert (found.pop("label_rows"), found.pop("model_type")) == (6, "DiT/2")
        expected = {name: getattr(options, name) for name in found}
        assert found == expected
        shown = replace(DiTOptions(**{**SIZE, "model_heads": None}), **found)
        hidden = {} if options.rope or options.qk_norm else {"model_heads": 3}
        assert replace(shown, **hidden) == options
        plain = all(getattr(options, name) == values[0] for name, values in LIGHTNING.items())
        plain_besides_qk = all(getattr(options, name) == LIGHTNING[name][0] for name in LIGHTNING if name != "qk_norm")
        shared = project in ("SiT", "REPA", "LightningDiT") and plain_besides_qk and not options.learn_sigma
        expected_names = ["SiT", "REPA", "LightningDiT"] if plain else ["REPA", "LightningDiT"]
        assert fitting == (expected_names if shared else [project]), options
        count += 1
    assert count == {"SiT": 2, "REPA": 2, "LightningDiT": 32, "MeanFlow": 1, "DiTDH": 16}[project]


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patch_side_and_latents_are_recognized(patch):
    options = replace(next(variants("SiT")), learn_sigma=True, num_in_channels=6, num_out_channels=6)
    file = file_of("SiT", options, patch, 16)
    found = PROJECTS["SiT"].describe(file.weights, {})
    assert (found["model_type"], found["num_in_channels"], found["num_out_channels"]) == (f"DiT/{patch}", 6, 6)
    assert find_project(file, "file") is PROJECTS["SiT"]


@pytest.mark.parametrize("size", ["S", "B", "L", "XL", "1p0B", "1p6B"])
def test_published_sizes_are_recognized(size):
    options = DiTOptions(**published_options("LightningDiT-.../1"), num_classes=7)
    with torch.device("meta"):
        weights = build_network(f"DiT-{size}/1", 8, options).state_dict()
    assert PROJECTS["LightningDiT"].describe(weights, {})["model_type"] == f"DiT-{size}/1"


@pytest.mark.parametrize(
    "options",
    [
        {"value_residual": True},
        {"shared_adaln": True},
        {"fine_blocks": 1},
        {"guidance_embedding": True, "until_embedding": "interval"},
        {"class_tokens": 2},
        {"num_in_channels": 9},
        {"time_embedding": "fourier"},
    ],
)
def test_networks_of_this_project_alone_are_nobodys(options):
    with torch.device("meta"):
        weights = build_network("DiT/2", 8, DiTOptions(**{**SIZE, **options})).state_dict()
    assert fitting_projects(PublishedFile(dict(weights), {}, {}, {})) == []


def test_files_of_lfm_and_of_this_project_are_left_alone():
    file = file_of("LightningDiT", next(variants("LightningDiT")))
    for other in (file._replace(ours=True), file._replace(step=4), file._replace(arguments={"dataset": "cifar10"})):
        assert fitting_projects(other) == []
        assert find_project(other, "file") is None
    assert find_project(file, "file", "DiT-XL/2") is None
    assert find_project(file, "file", "adm") is None
    assert find_project(file, "file", "REPA-XL/2") is PROJECTS["REPA"]
    assert find_project(PublishedFile({"a.weight": torch.empty(2)}, {}, {}, {}), "file") is None
