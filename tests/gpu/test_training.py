"""Training on the device: exact resume, compilation, waiting, memory and the loader."""

import importlib.util
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import benchmarks._latents as latents
from benchmarks._gpu_timing import moved, release, seconds_of, wait
from benchmarks.gpu import Ours
from benchmarks.training_step import CASES, DECAY, OBJECTIVE, RATE, Case, new_batch, new_network
from exits import explain
from models.autoencoders.kl import new_autoencoder_kl
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.conditions import Condition
from models.dit import DiTOptions
from options import Options
from runtime.distributed import Processes
from runtime.memory import MARGIN, StepMemory, measure_activations
from runtime.precision import Machine
from runtime.processes.parallel import is_sharded, shard
from tests.drawn_batches import draw_batches
from tests.small_networks import SMALL as FAMILIES
from tests.small_networks import new_network as new_small_network
from training.loop import train
from training.optimizers import OptimizerOptions
from training.resources import estimate_memory
from training.state import TrainingState

specification = importlib.util.spec_from_file_location(
    "test_loop_runs", Path(__file__).parents[1] / "training" / "test_loop.py"
)
runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(runs)

SMALL = Case("DiT-Mi/2", 8, 8, DiTOptions(num_classes=10))


def new_run(folder, machine, **changes):
    """The run of tests/training/test_loop.py on another machine."""
    run = runs.new_run(folder, **changes)
    run.machine = machine
    run.validation = replace(run.validation, machine=machine)
    source = runs.Source(runs.stripes(), PixelSpace(1).encode, machine, 1)
    source.event, run.source = run.source.event, source
    return run


@contextmanager
def determinism():
    torch.use_deterministic_algorithms(True)  # with warn_only, memory-efficient attention would stay random
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_same_bits(tmp_path, optimizer, precision, device):
    machine = Machine(device, precision)
    stopping = {"event": (6, runs.send_signal(runs.signal.SIGINT))}
    with determinism():
        train(new_run(tmp_path / "whole", machine, optimizer=optimizer), resume=False)
        assert not train(new_run(tmp_path / "parts", machine, optimizer=optimizer, **stopping), resume=False)
        assert train(new_run(tmp_path / "parts", machine, optimizer=optimizer), resume=True)
    whole, parts = (content_of(tmp_path / name, device) for name in ("whole", "parts"))
    assert whole == parts
    assert runs.metrics_of(tmp_path / "whole") == runs.metrics_of(tmp_path / "parts")


def content_of(folder, device):
    def comparable(value):
        if isinstance(value, torch.Tensor):
            return value.cpu().numpy().tobytes()
        if isinstance(value, dict):
            return {key: comparable(item) for key, item in value.items()}
        return [comparable(item) for item in value] if isinstance(value, list) else value

    content = runs.read_torch_file(folder / "content.pth", device)
    content.pop("seconds")
    return comparable(content)


def losses(step, count=5):
    """The losses of training steps on one batch."""
    found = []
    for _ in range(count):
        step.state.sums.zero_()
        step()
        found.append(step.state.sums[0].item())
    return found


def test_determinism_has_a_cost(device, on_gpu, report):
    case = CASES["DiT-S/2"] if on_gpu else SMALL
    step = Ours(case, Machine(device, "bf16"))
    free = seconds_of(step, device, 0.5)
    with determinism():
        fixed = seconds_of(step, device, 0.5)
    report(f"deterministic algorithms: a bf16 step of {case.model_type} takes {fixed / free:.2f} times as long")
    assert fixed < 20 * free


@pytest.mark.parametrize("replays", [False, True], ids=["without CUDA graphs", "with CUDA graphs"])
def test_compiled_steps_agree_with_eager_ones(replays, device, on_gpu, report):
    expected = losses(Ours(SMALL, Machine(device, "bf16")))
    counters.clear()
    found = losses(Ours(SMALL, Machine(device, "bf16", compile=True, replays=replays)))
    report(f"compiled{' with CUDA graphs' if replays else ''}: losses {found[0]:.5f} to {found[-1]:.5f}, eager "
           f"{expected[0]:.5f} to {expected[-1]:.5f}")  # fmt: skip
    assert found == pytest.approx(expected, rel=2e-2)
    assert found[-1] < found[0]
    if replays and on_gpu:
        assert not counters["inductor"]["cudagraph_skips"]


@pytest.fixture
def one_process(device):
    """A process group with the device's communication library, such as NCCL."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_wrapped_networks_in_one_process(sharded, device, one_process):
    machine, network = Machine(device, "fp32"), new_network(SMALL).train()
    expected = losses(Ours(SMALL, machine))
    move = partial(shard, device=device, processes=Processes()) if sharded else None
    step = Ours(SMALL, machine)
    step.state = TrainingState(network, machine, DECAY, OptimizerOptions(lr=RATE), move)
    step.velocity = network if sharded else DistributedDataParallel(network, gradient_as_bucket_view=True)
    assert is_sharded(network) == sharded
    assert losses(step) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("fp16", False), ("bf16", True)])
def test_the_host_does_not_wait_in_a_step(precision, compiled, device, on_gpu):
    step = Ours(SMALL, Machine(device, precision, compile=compiled))
    for _ in range(3):
        if on_gpu and step.state.step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.state.advance(step.velocity, OBJECTIVE, step.batch, RATE, grad_clip=1.0)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    assert step.state.take_skipped() == []


def estimate_of(case, machine):
    """The estimated memory of a training step."""
    network = new_network(case).train()
    state_size = sum(value.numel() * value.element_size() for value in network.state_dict().values())

    def loss(velocity, count):
        batch = moved(new_batch(case._replace(batch_size=count)), machine.device)
        columns = batch.data, batch.noise, batch.draws, batch.condition
        return OBJECTIVE.loss(machine.evaluating(velocity), *columns).mean()

    activations = measure_activations(network, loss, machine.device)
    return StepMemory(state_size, state_size, 2 * state_size, state_size, activations, case.batch_size)


def test_the_estimated_memory_of_a_step(tmp_path, device, on_gpu, report):
    run = new_run(tmp_path, Machine(device, "bf16"), batch_size=40)
    needed = estimate_memory(run)
    assert needed.images == 40
    case = CASES["DiT-S/2"]._replace(batch_size=128) if on_gpu else SMALL
    machine = Machine(device, "bf16")
    found = estimate_of(case, machine)
    report(f"estimate of {case.model_type}, batch {case.batch_size}: {found.describe()}")
    if on_gpu:
        peak = peak_of(lambda: three_steps(case, machine), device)
        report(f"peak of {case.model_type}, batch {case.batch_size}: {peak:,} bytes")
        assert MARGIN * peak <= found.total
        assert peak > 0.5 * found.total


def three_steps(case, machine):
    step = Ours(case, machine)
    for _ in range(3):
        step()


def peak_of(work, device):
    """Bytes that `work` allocates on a GPU at its peak."""
    release(device)
    before = torch.cuda.memory_allocated(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def saved_bytes(work):
    """Bytes that autograd saves for the backward pass in `work`, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_saves_memory_and_keeps_gradients(model_type, precision, device, on_gpu, report):
    """U-Nets have dropout, which must be the same when a block is computed again."""
    machine, case = Machine(device, precision), SMALL._replace(batch_size=512 if on_gpu else 16)
    data, noise = torch.randn(2, case.batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    labels = (torch.arange(case.batch_size) % 2).to(device)
    options = FAMILIES[model_type]
    if hasattr(options, "dropout"):
        options = replace(options, dropout=0.1)

    def passed(checkpointing):
        """The loss, the gradients, and the memory of a step's two passes: a GPU's peak, or what autograd saves."""
        network = new_small_network(model_type, replace(options, use_grad_checkpointing=checkpointing))
        network.to(device).requires_grad_(True).train()
        results = []

        def forward():
            torch.manual_seed(1)
            times = OBJECTIVE.at(torch.linspace(0, 1, case.batch_size, device=device))
            loss = OBJECTIVE.loss(machine.evaluating(network), data, noise, times, Condition(labels)).mean()
            results.append(loss)
            return loss

        memory = peak_of(lambda: forward().backward(), device) if on_gpu else saved_bytes(lambda: forward())
        if not on_gpu:
            results[0].backward()
        return results[0].detach(), [p.grad for p in network.parameters() if p.grad is not None], memory

    loss, gradients, plain = passed(False)
    found_loss, found, checkpointed = passed(True)
    assert found_loss == loss
    assert len(found) == len(gradients) > 0
    largest = max(gradient.abs().max() for gradient in gradients)
    for one, other in zip(found, gradients, strict=True):
        if on_gpu:  # whose kernels may add in another order
            assert (one - other).abs().max() <= (1e-5 if precision == "fp32" else 1e-2) * largest
        else:
            assert torch.equal(one, other)
    report(f"gradient checkpointing of {model_type} in {precision}: {checkpointed / plain:.2f} of the memory")
    assert checkpointed < plain


def test_a_full_device_is_explained(device, on_gpu):
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 46, dtype=torch.float64, device=device)
    options = Options({"batch_size": 8, "grad_accumulation": 1}, explicit=frozenset())
    reason = explain(raised.value, options)
    assert reason.exit_code == 2
    assert ("--grad_accumulation" in reason.line) == on_gpu


def test_the_loader_is_faster_than_training(tmp_path, device, on_gpu, report):
    """Batches of a latent cache, with posterior samples on the device, against a step of DiT-S/2."""
    count = latents.write_random_cache(tmp_path, 1 << 27 if on_gpu else 1 << 20)
    cache = latents.open_random_cache(tmp_path, count)
    autoencoder = PretrainedAutoencoder(new_autoencoder_kl(3, (8, 8, 8, 8), 4, 256, {}), "random").to(device)
    size, steps = (256, 60) if on_gpu else (16, 4)

    def load(first, last):
        for batch in draw_batches(cache, autoencoder, first, last, batch_size=size, num_classes=10, device=device):
            assert batch.data.device == device
        wait(device)

    load(0, 3)
    started = time.perf_counter()
    load(3, 3 + steps)
    loaded = size * steps / (time.perf_counter() - started)
    case = CASES["DiT-S/2"]._replace(batch_size=size) if on_gpu else SMALL
    trained = case.batch_size / seconds_of(Ours(case, Machine(device, "bf16")), device, 0.5)
    report(f"loader {loaded:,.0f} images/s, eager training of {case.model_type} {trained:,.0f} images/s")
    assert loaded > (trained if on_gpu else 0)
