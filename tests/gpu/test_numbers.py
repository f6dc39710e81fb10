"""Networks, solvers, autoencoders and scores on the device, compared with the CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets_prep.datasets import DatasetFacts
from evaluation.features.fashion import FashionFeatures
from evaluation.features.inception import InceptionFeatures
from evaluation.metrics import compute_metrics
from evaluation.summary import Gatherer
from flow.guidance import GuidanceOptions
from flow.likelihood import log_likelihood
from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions
from flow.solvers import SOLVERS, SolverOptions
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import PixelSpace, pixels_to_images
from models.conditions import Condition
from models.registry import NETWORKS
from runtime.inference import for_sampling
from runtime.precision import Machine
from sampling.sampler import Sampler, generate
from tests.small_networks import SMALL, new_network
from training.data import Batch
from training.optimizers import OptimizerOptions
from training.state import TrainingState

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests" / "golden").glob("*.safetensors"))
OBJECTIVE = FlowMatching(PathOptions(sigma_min=1e-5))
CPU = torch.device("cpu")
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}  # relative to float32 on a CPU
GOLDEN_FACTOR = 10  # other kernels sum in another order


def relative(found, expected):
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_golden_cases(path, golden, device):
    for name, error in golden.check_case(path, device).items():
        assert error <= GOLDEN_FACTOR * golden.LIMITS[name], name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", SMALL)
def test_three_steps_agree_with_float32_on_a_cpu(model_type, precision, device, report):
    def trained(machine):
        network = new_network(model_type, SMALL[model_type]).requires_grad_(True).train()
        if "pos_embed" in dict(network.named_parameters()):
            network.pos_embed.requires_grad_(False)
        muon = model_type.startswith("DiT")
        options = OptimizerOptions(optimizer="muon" if muon else "adamw", lr=1e-3, muon_lr=1e-3)
        state = TrainingState(network, machine, 0.9, options, None, NETWORKS[model_type].hidden_matrices)
        watched = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9)).to(machine.device)
        condition = Condition((torch.arange(4) % 2).to(machine.device))

        @torch.no_grad()
        def velocity():
            return network(torch.full((4,), 0.5, device=machine.device), watched, condition)

        before = velocity()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            data, noise = torch.randn(2, 4, 3, 8, 8, generator=generator).to(machine.device)
            batch = Batch(data, noise, Times(torch.rand(4, generator=generator).to(machine.device)), condition)
            state.advance(network, OBJECTIVE, batch, 1e-3, grad_clip=1.0, accumulation=2)
        return state.sums[0] / 3, velocity() - before, state.take_skipped()

    loss, change, skipped = trained(Machine(device, precision))
    expected, expected_change, _ = trained(Machine(CPU, "fp32"))
    assert not skipped
    errors = relative(loss, expected), relative(change, expected_change)
    report(f"three steps of {model_type} in {precision}: loss {errors[0]:.1e}, change of the velocity {errors[1]:.1e}")
    assert errors[0] < LARGEST_ERROR[precision]
    # Adam divides by the size of a gradient, so rounding changes the steps of weights with tiny gradients.
    assert errors[1] < (0.02 if precision == "fp32" else 0.3)


FACTS = DatasetFacts("images", 8, 3, None, True, ())


def new_sampler(device, method="heun", precision="fp32"):
    machine = Machine(device, precision)
    network = new_network("DiT-Mi/2", replace(SMALL["DiT-Mi/2"], until_embedding="decoupled")).to(device)
    guidance, solver = GuidanceOptions(2.0, (0.2, 0.8)), SolverOptions(method, num_steps=8, atol=1e-4, rtol=1e-4)
    return Sampler(
        for_sampling(network, machine), PixelSpace(3), FACTS, (3, 8, 8), 2, solver, machine, seed=0, guidance=guidance
    )


def images_of(sampler, batch_size=6):
    return torch.cat([batch.images for batch in generate(sampler, range(6), batch_size=batch_size)]).int()


@pytest.mark.parametrize("method", SOLVERS)
def test_samples_equal_a_cpus_up_to_rounding(method, device):
    found, expected = images_of(new_sampler(device, method)), images_of(new_sampler(CPU, method))
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.01


def test_samples_do_not_depend_on_the_batch_size(device):
    whole = images_of(new_sampler(device))
    for size in (1, 4):
        assert (images_of(new_sampler(device), size) - whole).abs().max() <= 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_samples_in_reduced_precision(precision, device, report):
    found, expected = images_of(new_sampler(device, precision=precision)), images_of(new_sampler(CPU))
    error = (found - expected).float().square().mean().sqrt().item()
    report(f"samples in {precision}: RMS error {error:.2f} of 255")
    assert error < 12


def test_the_autoencoder(device, report):
    images = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = AutoencoderOptions(str(ROOT / "pretrained" / "fashion_mnist_autoencoder"))
    ours, theirs = (load_autoencoder(options, 1).to(place) for place in (device, CPU))
    expected = theirs.encode(images)
    for precision in ("fp32", "bf16"):
        with Machine(device, precision).autocast():
            error = relative(ours.encode(images.to(device)), expected)
        report(f"encoding in {precision}: relative error {error:.1e}")
        assert error < LARGEST_ERROR[precision]
    latents = theirs.sample(expected)
    difference = (
        pixels_to_images(ours.decode(latents.to(device))).cpu().int() - pixels_to_images(theirs.decode(latents)).int()
    )
    assert difference.abs().max() <= 1


def scores_of(network, sets):
    gatherers = [Gatherer(network, {"moments", "rows"}) for _ in sets]
    for gatherer, images in zip(gatherers, sets, strict=True):
        for batch in images.split(32):
            gatherer.update(batch)
    return compute_metrics(("fid", "kid", "precision", "recall"), *(gatherer.summary() for gatherer in gatherers))


def image_sets():
    generator = torch.Generator().manual_seed(0)
    both = torch.randint(256, (2, 160, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return both[0], both[1] // 2 + 40


@pytest.mark.parametrize("name", ["fashion_mnist", "inception"])
def test_scores_equal_a_cpus_within_their_error(name, device, inception_weights, report):
    def network(place):
        return (
            FashionFeatures(None, place) if name == "fashion_mnist" else InceptionFeatures(inception_weights, place, 64)
        )

    sets = image_sets()
    found, expected = scores_of(network(device), sets), scores_of(network(CPU), sets)
    for metric, value in expected.items():
        report(f"{metric} of {name}: {found[metric]:.6g}, on a CPU {value:.6g}")
        counted = metric in ("precision", "recall")  # a neighbor at nearly equal distance counts as one image of 160
        assert found[metric] == pytest.approx(value, rel=1e-3, abs=0.02 if counted else 1e-4)


def test_features_in_bfloat16(device, inception_weights, report):
    images = image_sets()[0][:32]
    exact = InceptionFeatures(inception_weights, CPU)(images, {"features"})["features"]
    found = InceptionFeatures(inception_weights, device, precision="bf16")(images, {"features"})["features"]
    report(f"Inception features in bf16: relative error {relative(found, exact):.1e}")
    assert relative(found, exact) < LARGEST_ERROR["bf16"]
    assert relative(InceptionFeatures(inception_weights, device)(images, {"features"})["features"], exact) < 1e-4


def test_likelihood_of_a_guided_sampler_is_finite(device):
    sampler = replace(new_sampler(device), guidance=GuidanceOptions())
    data = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    velocity = sampler.velocity(torch.zeros(2, dtype=torch.long))
    found = log_likelihood(velocity, data, SolverOptions("euler", num_steps=4), torch.ones_like(data))
    assert found.log_density.isfinite().all()
