"""Forward-mode derivatives of every network in (t, x), required for consistency training and flow maps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.conditions import Condition, DenseInput
from models.dit import DiTOptions
from models.edm_unet import EdmUNetOptions
from models.guided_unet import GuidedUNetOptions
from models.plain_unet import PlainUNetOptions
from models.registry import ORIGIN_ADM
from runtime.cpu.kernels import with_cpu_kernels
from tests.small_networks import DIT_VARIANTS, SMALL, UNET, new_network

STEP = 1e-6
UPDOWN = {"resblock_updown": True, "use_scale_shift_norm": False, "attn_resolutions": (2,)}
CASES = {
    **{name: (name, options) for name, options in SMALL.items()},
    **{f"DiT variant {n}": ("DiT-Mi/2", options) for n, options in enumerate(DIT_VARIANTS)},
    "ddpm++": ("ddpm++", EdmUNetOptions(**UNET, label_dim=2)),
    "updown": (ORIGIN_ADM, GuidedUNetOptions(**UNET | UPDOWN, num_classes=2)),
}
MAPPED = DenseInput(2, classes=4)
MAPPED_CHANNELS = {"num_in_channels": 5, "num_out_channels": 3}
MAPPED_UNET = UNET | MAPPED_CHANNELS
WRAPPED = {
    "DiT-Mi/2": DiTOptions(**MAPPED_CHANNELS),
    "adm": EdmUNetOptions(**MAPPED_UNET),
    "ddpm++": EdmUNetOptions(**MAPPED_UNET),
    "ncsn++": EdmUNetOptions(**MAPPED_UNET),
    ORIGIN_ADM: GuidedUNetOptions(**MAPPED_UNET | {"attn_resolutions": (2,)}),
    "unet": PlainUNetOptions(**MAPPED_CHANNELS),
}


def check_jvp(network, condition):
    """Compare the JVP with a central finite difference in float64."""
    network = network.double()
    generator = torch.Generator().manual_seed(2)
    t, dt = torch.rand(2, 2, generator=generator, dtype=torch.float64)
    x, dx = torch.randn(2, 2, 3, 8, 8, generator=generator, dtype=torch.float64)

    def velocity(t, x):
        return network(t, x, condition)

    with sdpa_kernel([SDPBackend.MATH]):
        value, slope = torch.func.jvp(velocity, (t, x), (dt, dx))
        after, before = (velocity(t + step * dt, x + step * dx) for step in (STEP, -STEP))
        assert torch.equal(value, velocity(t, x))
    difference = (after - before) / (2 * STEP)
    assert slope.norm() > 0.1
    assert (slope - difference).norm() < 1e-6 * difference.norm()


@pytest.mark.parametrize("swapped", [False, True], ids=["plain", "with kernels for compiling"])
@pytest.mark.parametrize("case", CASES)
def test_jvp_is_the_finite_difference(case, swapped):
    network = new_network(*CASES[case])
    check_jvp(with_cpu_kernels(network) if swapped else network, Condition(torch.tensor([0, 1])))


# The excluded networks need labels.
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("updown", ORIGIN_ADM)])
def test_jvp_without_labels(case):
    check_jvp(new_network(*CASES[case]), Condition())


@pytest.mark.parametrize("model_type", WRAPPED)
def test_jvp_under_a_dense_condition(model_type):
    dense = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    check_jvp(new_network(model_type, WRAPPED[model_type], MAPPED), Condition(None, dense))
