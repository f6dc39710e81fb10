"""Training, sampling, encoding and scoring on a fake CUDA device (tests/fake_cuda.py): devices, dtypes and waiting hosts."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchdiffeq

import evaluation.features.fashion
import evaluation.features.inception
import flow.multistep
import flow.solvers
import models.autoencoders.pretrained
import tasks.training_free_inpainting as free_inpainting
import training.data
from datasets_prep.conditions import MaskedImages, class_shares
from datasets_prep.datasets import DatasetFacts
from evaluation.features.fashion import FashionFeatures
from evaluation.features.inception import InceptionFeatures
from flow import adaptive
from flow.auxiliary.losses import AuxiliaryOptions
from flow.auxiliary.objective import AuxiliaryDraws, auxiliary_names
from flow.guidance import GuidanceOptions, GuidedVelocity, VelocityNetwork
from flow.likelihood import log_likelihood
from flow.objectives import FlowMatching, Times
from flow.paths import PathOptions
from flow.repaint import replace_known
from flow.solvers import SOLVERS, SolverOptions, solve
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace, decode_images
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.conditions import Condition, DenseInput
from models.dit import DIT_SIZES, DiTOptions, build_dit, hidden_matrices
from models.family import Family
from models.registry import NETWORKS, build_network
from runtime.distributed import Processes
from runtime.inference import for_sampling
from runtime.precision import Machine
from sampling.sampler import Sampler, generate
from tasks.training_free_inpainting import training_free_draw
from tests.drawn_batches import draw_batches
from tests.fake_cuda import CUDA, READS_A_VALUE, HostWaitsError, Products, outside, pretend_cuda
from tests.small_networks import SMALL
from training.auxiliary.setup import add_auxiliary
from training.data import Batch
from training.optimizers import OptimizerOptions
from training.state import TrainingState
from training.validation import validation_loss

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # torch's own code causes this warning

OBJECTIVE = FlowMatching(PathOptions(sigma_min=1e-5))
FAMILIES = {**SMALL, "ddpm++": SMALL["ncsn++"]}
TINY = "DiT-Tiny/2"


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setitem(DIT_SIZES, "Tiny", (32, 2, 2))
    monkeypatch.setitem(NETWORKS, TINY, Family(DiTOptions, partial(build_dit, "Tiny", 2), hidden_matrices))
    on_the_host = (flow.solvers, "time_grid"), (flow.multistep, "mean_weights"), (free_inpainting, "time_grid")
    for module, name in on_the_host:
        monkeypatch.setattr(module, name, with_values(getattr(module, name)))
    monkeypatch.setattr(Sampler, "decode_batch", decode_without_reading)
    with pretend_cuda(monkeypatch) as mode:
        yield mode


def decode_without_reading(sampler, latents, indices):
    """`Sampler.decode_batch` without the list of samples that are not finite, which is read once per batch."""
    images, finite = sampler._decode(latents)
    assert finite.device.type == "cpu"
    return images, ()


def with_values(function):
    def call(*arguments):
        with outside():
            return function(*arguments)

    return call


def new_state(model_type=TINY, options=SMALL["DiT-Mi/2"], precision="fp32", optimizer="adamw", dense=None):
    network = build_network(model_type, 8, options, dense).train()
    settings = OptimizerOptions(optimizer=optimizer, lr=1e-2)
    matrices = NETWORKS[model_type].hidden_matrices
    return TrainingState(network, Machine(CUDA, precision), 0.99, settings, hidden_matrices=matrices)


def batch_of(count=2, channels=3, dense=None):
    data, noise = torch.rand(2, count, channels, 8, 8, device=CUDA)
    labels = torch.zeros(count, dtype=torch.long, device=CUDA)
    return Batch(data, noise, Times(torch.rand(count, device=CUDA)), Condition(labels, dense))


def advance(state, batch, accumulation=1, network=None):
    state.advance(network or state.network, OBJECTIVE, batch, 1e-2, grad_clip=1.0, accumulation=accumulation)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model_type", [TINY, *list(FAMILIES)[1:]])
def test_a_step_of_every_family_runs_on_the_device_without_waiting(fake_cuda, model_type, precision):
    """All gradients, moments and averages are float32 on the device, and every product has the run's precision."""
    state = new_state(model_type, FAMILIES.get(model_type, SMALL["DiT-Mi/2"]), precision)
    with fake_cuda.forbid_waiting(), Products() as products:
        advance(state, batch_of())
    assert products.dtypes == {state.machine.dtype}
    attention = any(hasattr(module, "attention") for module in state.network.modules())
    assert any(name.startswith("_scaled_dot_product") for name in products.names) == attention
    floats = [p.grad for p in state.parameters] + tensors([o.state_dict()["state"] for o in state.optimizers])
    assert len(floats) == 4 * len(state.parameters)  # AdamW holds a step and two moments
    floats += [state.sums, state.consecutive_skips, *state.ema.weights.values()]
    assert {(tensor.device, tensor.dtype) for tensor in floats} == {(CUDA, torch.float32)}


@pytest.mark.parametrize("blocks", [{}, {"class_tokens": 1, "rope": True, "value_residual": True}])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_auxiliary_losses_and_routing_do_not_wait(fake_cuda, precision, blocks):
    heads = {"auxiliary_velocity": 0.5, "align_latents": 1.0, "align_features": 0.5, "align_width": 5}
    options = replace(SMALL["DiT-Mi/2"], **heads, **blocks, tap_block=1, route_blocks=(1, 2), route_rate=0.5)
    objective = add_auxiliary(OBJECTIVE, options, AuxiliaryOptions(dispersive=0.5, auxiliary_until=3))
    network = build_network(TINY, 8, options).train()
    names = auxiliary_names(objective)
    state = TrainingState(network, Machine(CUDA, precision), 0.99, OptimizerOptions(lr=1e-2), auxiliary=names)
    batch = batch_of(4)
    routing, features = torch.rand(4, 8, 8, device=CUDA), torch.rand(4, 5, 4, 4, device=CUDA)
    batch = batch._replace(draws=AuxiliaryDraws(batch.draws, torch.ones(4, device=CUDA), routing, features))
    with fake_cuda.forbid_waiting():
        state.advance(state.network, objective, batch, 1e-2, 1.0, accumulation=2)
    assert (state.sums.device, state.sums.shape) == (CUDA, (8,))
    assert {p.grad.dtype for p in state.parameters} == {torch.float32}


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 1.0)])
def test_internal_guidance_does_not_wait(fake_cuda, interval):
    options = replace(SMALL["DiT-Mi/2"], tap_block=1, auxiliary_velocity=0.5)
    network = VelocityNetwork(build_network(TINY, 8, options).eval().to(CUDA), OBJECTIVE.velocity)
    guidance = GuidanceOptions(3.0, internal_guidance=1.9, internal_guidance_interval=interval)
    velocity = replace(new_sampler(guidance=guidance), network=network).velocity(torch.zeros(2, dtype=torch.long))
    t, x = torch.full((), 0.5, device=CUDA), torch.rand(2, 3, 8, 8, device=CUDA)
    with fake_cuda.forbid_waiting(), torch.no_grad():
        found = velocity.restrict(1.0, 0.4)(t, x)
    assert (found.device, found.dtype) == (CUDA, torch.float32)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_muon_with_accumulated_gradients(fake_cuda, precision):
    state = new_state(precision=precision, optimizer="muon")
    with fake_cuda.forbid_waiting():
        advance(state, batch_of(4), accumulation=2)
    assert {matrix.device for matrix in tensors(state.optimizers[1].state_dict()["state"])} == {CUDA}


@pytest.mark.parametrize("model_type", [TINY, "adm", "origin_adm", "unet"])
def test_gradient_checkpointing(fake_cuda, model_type):
    options = FAMILIES.get(model_type, SMALL["DiT-Mi/2"])
    state = new_state(model_type, replace(options, use_grad_checkpointing=True), "bf16")
    with fake_cuda.forbid_waiting():
        advance(state, batch_of())
    assert {p.grad.device for p in state.parameters} == {CUDA}


@pytest.mark.parametrize("classes", [None, 5], ids=["inpainting", "label maps"])
def test_dense_conditions(fake_cuda, classes):
    dense = DenseInput(4, classes, dropout=0.1)
    state = new_state(options=replace(SMALL["DiT-Mi/2"], num_in_channels=7), precision="bf16", dense=dense)
    with fake_cuda.forbid_waiting():
        advance(state, batch_of(dense=torch.rand(2, classes or 4, 8, 8, device=CUDA)))
    assert {p.grad.device for p in state.parameters} == {CUDA}


def test_the_training_state_can_be_saved_and_restored(fake_cuda):
    state, other = new_state(precision="bf16", optimizer="muon"), new_state(precision="bf16", optimizer="muon")
    advance(state, batch_of())
    content = state.content()
    assert {tensor.device for tensor in tensors(content["network"])} == {CUDA}
    on_the_cpu = as_read_on_the_cpu(content)
    on_the_cpu["ema"]["updates"] = content["ema"]["updates"]  # a 0-d tensor, whose value is read
    for stored in (content, on_the_cpu):
        other.restore(stored)
        again = other.content()
        assert again.pop("sums").device.type == "cpu"  # exchanged between processes through the host
        assert {tensor.device for tensor in tensors(again)} == {CUDA}
        with fake_cuda.forbid_waiting():
            advance(other, batch_of())


def as_read_on_the_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: as_read_on_the_cpu(item) for key, item in value.items()}
    return [as_read_on_the_cpu(item) for item in value] if isinstance(value, list) else value


# What these tests notice


def on_the_cpu(network):
    return lambda t, x, condition: network(t, x, condition) + torch.zeros(3, 8, 8)


def reading_a_value(network):
    return lambda t, x, condition: network(t, x, condition) * x.abs().max().item()


def waiting_for_a_copy(network):
    return lambda t, x, condition: network(t, x, condition) * torch.tensor([1.0, 2, 3], device=CUDA).view(3, 1, 1)


def with_a_boolean_mask(network):
    return lambda t, x, condition: network(t, x, condition) * (1 + t[t > 0.5].sum())


def in_another_precision(network):
    return lambda t, x, condition: network(t, x, condition) @ torch.eye(8, device=CUDA, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mutation", "errors"),
    [
        (on_the_cpu, RuntimeError),
        (reading_a_value, READS_A_VALUE),
        (with_a_boolean_mask, READS_A_VALUE),
        (waiting_for_a_copy, HostWaitsError),
        (in_another_precision, RuntimeError),
    ],
)
def test_a_step_that_does_not_suit_a_gpu_is_noticed(fake_cuda, mutation, errors):
    state = new_state()
    with pytest.raises(errors), fake_cuda.forbid_waiting(), Products():
        advance(state, batch_of(), network=mutation(state.network))


def test_a_generator_of_another_device_is_noticed(fake_cuda):
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device=CUDA, generator=torch.Generator())


# Batches

ON_CUDA = {"batch_size": 2, "num_classes": 2, "device": CUDA}


class Moments:
    labels = torch.arange(6) % 2

    def __init__(self, channels):
        self.channels = channels

    def __len__(self):
        return len(self.labels)

    def moments(self, indices, mirrored):
        return torch.zeros(len(indices), self.channels, 8, 8)


class Images:
    split, labels = "train", Moments.labels
    facts = DatasetFacts("images", 16, 3, None, True, ())

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.zeros(3, 16, 16, dtype=torch.uint8)


@pytest.fixture
def read_at_once(monkeypatch):
    """Read batches outside the fake mode, in the same thread."""

    def read(reader, first, last, device):
        for step in range(first, last):
            with outside():
                found = reader(step)()
            yield step, found

    monkeypatch.setattr(training.data, "read_ahead", read)


def new_autoencoder(monkeypatch):
    monkeypatch.setattr(models.autoencoders.pretrained, "weights_hash", lambda weights: "")
    with outside():
        network = new_autoencoder_kl(3, (8, 8), 4, 16, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4})
        autoencoder = PretrainedAutoencoder(network, "new")
    return autoencoder.to(CUDA)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "stratified"])
def test_batches_are_copied_without_waiting(fake_cuda, read_at_once, monkeypatch, sampling):
    autoencoder = new_autoencoder(monkeypatch)
    objective = FlowMatching(PathOptions(time_sampling=sampling))
    with fake_cuda.forbid_waiting():
        (batch,) = draw_batches(Moments(8), autoencoder, 0, 1, objective=objective, **ON_CUDA)
        parts = batch.split(2)
    found = [batch.data, batch.noise, *batch.draws, batch.condition.labels, parts[1].data]
    assert {tensor.device for tensor in found} == {CUDA}


def test_masked_images_are_encoded_for_a_step_without_waiting(fake_cuda, read_at_once, monkeypatch):
    autoencoder = new_autoencoder(monkeypatch)
    condition = MaskedImages(
        Images(), autoencoder, lambda draw: torch.ones(16, 16, dtype=torch.bool), Machine(CUDA, "bf16")
    )
    with fake_cuda.forbid_waiting():
        (batch,) = draw_batches(Moments(8), autoencoder, 0, 1, **ON_CUDA, condition=condition, condition_dropout=0.1)
    assert (batch.condition.dense.device, batch.condition.dense.shape) == (CUDA, (2, 5, 8, 8))


def test_label_maps_are_encoded_without_waiting(fake_cuda):
    maps = torch.zeros(2, 16, 16, dtype=torch.uint8, device=CUDA)
    with fake_cuda.forbid_waiting():
        shares = class_shares(maps, 5, 2)
    assert (shares.device, shares.dtype, shares.shape) == (CUDA, torch.float32, (2, 5, 8, 8))


class Reached(Exception):  # noqa: N818
    """The values on the device have been computed."""


class StoppingProcesses(Processes):
    def sum(self, value):
        raise Reached(str(value.device))


def test_the_validation_loss(fake_cuda, monkeypatch):
    """Its last step, which compares times on the host, needs values."""
    network = build_network(TINY, 8, replace(SMALL["DiT-Mi/2"], num_in_channels=4, num_out_channels=4)).eval().to(CUDA)
    with pytest.raises(Reached, match="cpu"):
        machine = Machine(CUDA, "bf16")
        validation_loss(network, OBJECTIVE, Moments(8), new_autoencoder(monkeypatch), machine, StoppingProcesses())


def test_images_are_encoded_on_the_fly(fake_cuda, monkeypatch):
    autoencoder = new_autoencoder(monkeypatch)
    with outside():
        images = torch.stack([Images()[0], Images()[1]])
    with Machine(CUDA, "bf16").autocast():
        moments = autoencoder.encode(images.to(CUDA))
    assert (moments.device, moments.dtype, moments.shape) == (CUDA, torch.float32, (2, 8, 8, 8))


# Sampling

FLOW_MAP = replace(SMALL["DiT-Mi/2"], until_embedding="decoupled")  # with every other solver, a plain network


def new_sampler(method="euler", precision="fp32", autoencoder=None, guidance=None, guide=False):
    machine = Machine(CUDA, precision)
    network, other = (
        for_sampling(build_network(TINY, 8, FLOW_MAP).eval().requires_grad_(False).to(CUDA), machine) for _ in range(2)
    )
    return Sampler(
        network=network,
        guide=other if guide else None,
        autoencoder=autoencoder or PixelSpace(3),
        facts=DatasetFacts("images", 8, 3, None, True, ()),
        latent_shape=(3, 8, 8),
        num_classes=2,
        solver=SolverOptions(method, num_steps=4),
        machine=machine,
        seed=0,
        guidance=guidance or GuidanceOptions(2.0, (0.3, 0.8)),
    )


FIXED = [name for name, method in SOLVERS.items() if not method.adaptive]


@pytest.mark.parametrize("method", FIXED)
def test_a_guided_solver_does_not_wait(fake_cuda, method):
    sampler = new_sampler(method)
    x, labels = sampler.noise(range(2)), torch.zeros(2, dtype=torch.long, device=CUDA)
    draws = [torch.randn(2, 3, 8, 8, device=CUDA)] * 20  # `Sampler.draw` draws on the CPU, so that devices agree
    velocity = sampler.velocity(labels)
    with fake_cuda.forbid_waiting():
        solution = solve(velocity, x, sampler.solver, draw=draws.__getitem__)
    assert (solution.x.device, solution.x.dtype, solution.evaluations.device) == (CUDA, torch.float32, CUDA)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("guide", [False, True])
def test_samples_are_drawn_and_decoded(fake_cuda, precision, guide):
    sampler = new_sampler("heun", precision, guide=guide)
    with Products() as products:
        (batch,) = generate(sampler, range(2))
    assert products.dtypes == {sampler.machine.dtype}
    assert {column.device.type for column in batch[1:-1]} == {"cpu"}
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (2, 3, 8, 8))


def test_latents_are_decoded_in_float32(fake_cuda, monkeypatch):
    autoencoder = new_autoencoder(monkeypatch)
    with Products() as products:
        images, finite = decode_images(autoencoder, torch.rand(2, 4, 8, 8, device=CUDA))
    assert products.dtypes == {torch.float32}
    assert (finite.device, finite.dtype, finite.shape) == (CUDA, torch.bool, (2,))
    assert (images.device, images.dtype, images.shape) == (CUDA, torch.uint8, (2, 3, 16, 16))


def test_adaptive_steps(fake_cuda):
    """The control of the step size reads values, so only the parts of `dopri5` run on a fake device."""
    sampler, options = new_sampler(guidance=GuidanceOptions(2.0)), SolverOptions("dopri5")
    x, t = sampler.noise(range(2)), torch.ones(2, dtype=torch.float64, device=CUDA)
    velocity = sampler.velocity(torch.zeros(2, dtype=torch.long))
    slope = velocity(t.float(), x)
    h = adaptive._first_step(velocity, t, x, slope, -1, 1.0, options)
    point, last, error = adaptive._step(velocity, t, x, slope, h)
    assert {tensor.device for tensor in (h, point, last, error)} == {CUDA}
    assert (h.dtype, point.dtype) == (torch.float64, torch.float32)
    rows = torch.arange(1, device=CUDA)
    assert velocity.select_rows(rows)(t[:1].float(), x[:1]).device == CUDA
    with pytest.raises(READS_A_VALUE):
        solve(velocity, x, options)


def test_torchdiffeq_gets_times_on_the_device(fake_cuda, monkeypatch):
    """torchdiffeq itself reads values, so one evaluation takes its place."""

    def evaluate_once(velocity, x, times, **others):
        assert (times.device, times.dtype) == (CUDA, torch.float32)
        return torch.stack([x, velocity(times[0], x)])

    monkeypatch.setattr(torchdiffeq, "odeint", evaluate_once)
    sampler = new_sampler(guidance=GuidanceOptions())
    velocity = sampler.velocity(torch.zeros(2, dtype=torch.long))
    assert solve(velocity, sampler.noise(range(2)), SolverOptions("torchdiffeq_dopri5")).x.device == CUDA


@pytest.mark.parametrize("exact", [False, True])
def test_likelihood(fake_cuda, exact):
    velocity = GuidedVelocity(lambda t, x, c: x * t.view(-1, 1, 1, 1), Condition(), Condition(), GuidanceOptions())
    data = torch.rand(2, 1, 2, 2, device=CUDA)
    probe = None if exact else torch.rand_like(data).sign()
    found = log_likelihood(velocity, data, SolverOptions("euler", num_steps=2), probe)
    assert {tensor.device for tensor in found} == {CUDA}


def test_training_free_completions(fake_cuda):
    sampler = new_sampler()
    header = SimpleNamespace(path=PathOptions(sigma_min=1e-5))
    conditioned = SimpleNamespace(
        image_indices=torch.tensor,
        raw=lambda indices: torch.zeros(len(indices), 4, 8, 8, dtype=torch.uint8),
        labels=lambda: lambda indices, classes: torch.zeros(len(indices), dtype=torch.long),
    )
    draw = training_free_draw(SimpleNamespace(header=header, sampler=sampler), conditioned, resamplings=2)
    (batch,) = draw(sampler, [0, 1])
    assert (batch.images.device.type, batch.images.shape) == ("cpu", (2, 3, 8, 8))


def test_inpainting_without_training(fake_cuda):
    sampler = new_sampler()
    velocity = sampler.velocity(torch.zeros(2, dtype=torch.long))
    known, hole = torch.rand(2, 3, 8, 8, device=CUDA), torch.rand(2, 1, 8, 8, device=CUDA) > 0.5
    draws = [torch.randn(2, 3, 8, 8, device=CUDA)] * 8
    with fake_cuda.forbid_waiting():
        solution = replace_known(velocity, draws[0], [1.0, 0.5, 0.0], known, hole, draws.__getitem__, resamplings=2)
    assert solution.x.device == CUDA


# Scoring


def test_fashion_features(fake_cuda, monkeypatch):
    monkeypatch.setattr(evaluation.features.fashion, "weights_hash", lambda weights: "")
    with outside():
        network = evaluation.features.fashion.load_classifier(evaluation.features.fashion.FASHION_WEIGHTS)
    monkeypatch.setattr(evaluation.features.fashion, "load_classifier", lambda path: network)
    features = FashionFeatures(None, CUDA)
    found = features(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), {"features", "probabilities"})
    assert {(value.device, value.dtype) for value in found.values()} == {(CUDA, torch.float32)}


@pytest.mark.parametrize(("precision", "dims"), [("fp32", 2048), ("bf16", 192)])
def test_inception_features(fake_cuda, monkeypatch, inception_weights, precision, dims):
    monkeypatch.setattr(evaluation.features.inception, "weights_hash", lambda weights: "")
    with outside():
        built = evaluation.features.inception._build(inception_weights, dims)
    monkeypatch.setattr(evaluation.features.inception, "_build", lambda weights, dims: built)
    features = InceptionFeatures(inception_weights, CUDA, dims, precision)
    with Products() as products:
        found = features(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), features.outputs)
    assert features.dtype in products.dtypes
    assert {name: value.shape[1] for name, value in found.items()} == features.outputs
    assert {(value.device, value.dtype) for value in found.values()} == {(CUDA, torch.float32)}
