"""All published networks: names, shapes, order and outputs of the golden cases, and published parameter counts."""

import importlib.util
from pathlib import Path

import pytest
import torch

from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import NETWORKS, build_network

TESTS = Path(__file__).parents[1]
CASES = sorted((TESTS / "golden").glob("*.safetensors"))


def _golden_check():
    spec = importlib.util.spec_from_file_location("golden_check", TESTS / "golden_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_cases():
    assert len(CASES) == 13


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_names_and_outputs_are_the_published_ones(path):
    golden = _golden_check()
    for name, error in golden.check_case(path).items():
        assert error <= golden.LIMITS[name], name


UNET = {"nf": 256, "ch_mult": (1, 2, 3, 4)}
PUBLISHED_MILLIONS = {
    "celeb_f8_dit": ("DiT-L/2", DiTOptions(num_classes=1), 32, 457.1),
    "imnet_f8_ditb2": ("DiT-B/2", DiTOptions(num_classes=1000, label_dropout=0.1), 32, 130.5),
    "ffhq_f8_adm": ("adm", EdmUNetOptions(**UNET, attn_resolutions=(16, 8, 4)), 32, 406.4),
    "celeba_f8_adm": (
        "origin_adm",
        GuidedUNetOptions(nf=256, ch_mult=(1, 2, 2, 2), attn_resolutions=(16, 8)),
        32,
        153.1,
    ),
    "celeb512_f8_adm": (
        "origin_adm",
        GuidedUNetOptions(nf=256, ch_mult=(1, 2, 2, 2, 4), attn_resolutions=(16, 8)),
        64,
        352.2,
    ),
    "inpainting_kl": ("origin_adm", GuidedUNetOptions(**UNET, attn_resolutions=(16, 8), num_in_channels=9), 32, 356.1),
}


@pytest.mark.parametrize("experiment", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(experiment):
    model_type, options, size, millions = PUBLISHED_MILLIONS[experiment]
    with torch.device("meta"):
        network = build_network(model_type, size, options)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


SMALL = {"nf": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4, 2), "use_grad_checkpointing": True}


@pytest.mark.parametrize("model_type", ["adm", "ddpm++", "ncsn++", "origin_adm"])
def test_gradient_checkpointing_changes_no_gradient(model_type):
    torch.manual_seed(0)
    network = build_network(model_type, 8, NETWORKS[model_type].options(**SMALL)).train()
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    t, x = torch.rand(2), torch.randn(2, 4, 8, 8)

    def gradients():
        network.zero_grad()
        network(t, x).square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    recomputed = gradients()
    network.options = NETWORKS[model_type].options(**{**SMALL, "use_grad_checkpointing": False})
    for ours, plain in zip(recomputed, gradients(), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)
