"""All networks of LFM and other projects: names, shapes, order and outputs of the golden cases, and parameter counts."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.registry import NETWORKS, NetworkOptions, build_network, published_options

TESTS = Path(__file__).parents[1]
CASES = sorted((TESTS / "golden").glob("*.safetensors"))
OTHER_PROJECTS = sorted((TESTS / "golden" / "published").glob("*.safetensors"))


def test_there_are_cases():
    assert len(CASES) == 13
    assert len(OTHER_PROJECTS) == 7


@pytest.mark.parametrize("path", [*CASES, *OTHER_PROJECTS], ids=lambda path: path.stem)
def test_names_and_outputs_equal_the_published_ones(path, golden):
    scale = golden.read_case(path).cfg_scale
    for name, error in golden.check_case(path).items():
        assert error <= golden.limit(name, scale), name


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


MILLIONS_OF_OTHER_PROJECTS = {
    "SiT-XL/2": 675,
    "SiT-B/4": 131,
    "REPA-XL/2": 675,
    "LightningDiT-XL/1": 676,
    "MeanFlow-XL/2": 676,
    "DiTDH-XL": 839,
}


@pytest.mark.parametrize("model_type", MILLIONS_OF_OTHER_PROJECTS)
def test_other_projects_networks_have_the_published_size(model_type):
    channels = {"LightningDiT": 32, "DiTDH": 768}.get(model_type.split("-")[0], 4)
    own = published_options(model_type) | {"num_in_channels": channels, "num_out_channels": channels}
    with torch.device("meta"):
        network = build_network(NetworkOptions(model_type).resolve(), 16, DiTOptions(**own, num_classes=1000))
    found = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert found == pytest.approx(MILLIONS_OF_OTHER_PROJECTS[model_type], abs=1)


@pytest.mark.parametrize("experiment", PUBLISHED_MILLIONS)
def test_parameter_counts_equal_lfms(experiment):
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


@pytest.fixture
def case_file(tmp_path):
    """`write(change)` saves a golden case to a temporary file, after applying `change` to its header and tensors."""

    def write(change):
        path = next(path for path in CASES if path.stem == "guided_diffusion_inpainting_9ch")
        with safe_open(str(path), framework="pt") as file:
            header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(header, tensors)
        save_file(tensors, tmp_path / "case.safetensors", metadata=header)
        return str(tmp_path / "case.safetensors")

    return write


def nothing(header, tensors):
    pass


def far_off(header, tensors):
    tensors["out.velocity"] = tensors["out.velocity"] + 2e-5


def not_a_number(header, tensors):
    tensors["out.velocity"] = tensors["out.velocity"] * float("nan")


def of_another_shape(header, tensors):
    tensors["out.velocity"] = tensors["out.velocity"][:1]


def renamed(header, tensors):
    header["weights"] = header["weights"].replace("time_embed.0.weight", "time_embed.1.weight")


def without_time(header, tensors):
    del tensors["in.t"]


def without_arguments(header, tensors):
    del header["arguments"]


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        (nothing, 0, "ok   case: velocity "),
        (far_off, 1, "FAIL case: velocity 2."),
        (not_a_number, 1, "FAIL case: velocity nan"),
        (of_another_shape, 1, "FAIL case: velocity inf"),
        (renamed, 1, "but found ('time_embed.0.weight'"),
        (without_time, 2, "FAIL case: is not a golden case: it has no 'in.t'"),
        (without_arguments, 2, "FAIL case: is not a golden case: it has no 'arguments'"),
    ],
)
def test_golden_check_reports_differences(change, code, text, case_file, golden, capsys):
    assert golden.main([case_file(change)]) == code
    assert text in capsys.readouterr().out


def test_golden_check_continues_after_a_bad_file(case_file, golden, tmp_path, capsys):
    (tmp_path / "torn").write_bytes(b"no case")
    assert golden.main([str(tmp_path / "torn"), str(tmp_path / "absent"), case_file(nothing)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["FAIL", "FAIL", "ok  "]
    assert golden.main([]) == 2
    assert "golden_check.py FILE" in capsys.readouterr().err
