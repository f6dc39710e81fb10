import re

import pytest
import torch

import options
from exits import exit_cleanly, explain
from flow.objectives import FlowMatching
from flow.paths import PathOptions
from models.conditions import Condition
from models.dit import DiT, DiTOptions
from models.edm_unet import EdmUNetOptions
from models.registry import build_network
from options import Options, UsageError, record_options
from runtime.memory import Activations, StepMemory, advise, free_memory, measure_activations
from runtime.precision import Machine
from tests.fuzz.scripts import SCRIPTS, declared_options
from tests.small_networks import BLOCKS, UNET

CPU = torch.device("cpu")
OBJECTIVE = FlowMatching(PathOptions())


def loss_on(machine, channels=4):
    def loss(network, count):
        data, noise = torch.rand(2, count, channels, 8, 8, device=machine.device)
        condition = Condition(torch.zeros(count, dtype=torch.long, device=machine.device))
        draws = OBJECTIVE.at(torch.rand(count, device=machine.device))
        return OBJECTIVE.loss(machine.evaluating(network), data, noise, draws, condition).mean()

    return loss


def saved_in_fact(network, loss, count):
    """Bytes that autograd saves for `count` images, each storage once, without the parameters'."""
    known = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(network, count)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def new_dit(depth=2, **options):
    return DiT(8, 2, 32, depth, 2, DiTOptions(num_classes=2, **options)).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        new_dit,
        lambda: new_dit(3, **BLOCKS, class_tokens=2, fine_blocks=1),
        lambda: new_dit(3, **BLOCKS, ddt_blocks=1, ddt_width=48),
        lambda: build_network("adm", 8, EdmUNetOptions(**UNET, label_dim=2)).train(),
    ],
)
def test_activations_are_those_that_autograd_saves(make, precision):
    network = make()
    loss = loss_on(Machine(CPU, precision), network.options.num_in_channels)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = measure_activations(network, loss, CPU)
    assert found.constant + 6 * found.per_image == pytest.approx(saved_in_fact(network, loss, 6), rel=0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    loss = loss_on(Machine(CPU, "fp32"))
    plain, shallow = (measure_activations(new_dit(depth), loss, CPU).per_image for depth in (9, 1))
    network = new_dit(9, use_grad_checkpointing=True)
    found = measure_activations(network, loss, CPU).per_image
    assert network.training
    tokens = 16 * 32 * 4
    assert found == pytest.approx(shallow + 8 * tokens, rel=0.1)
    assert found < plain / 3


def test_attention_on_a_gpu_saves_no_matrix_of_pairs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with torch.device("meta"):
        network = build_network("DiT-Mi/1", 64, DiTOptions())

    def loss(network, count):
        x = torch.rand(count, 4, 64, 64, device="cuda")
        with Machine(torch.device("cuda"), "bf16").autocast():
            return network(x[:, 0, 0, 0], x, Condition()).sum()

    found = measure_activations(network, loss, torch.device("cuda"))
    assert found.per_image < 6 * 4 * 4096**2  # blocks, heads and pairs of tokens, each of which would take two bytes


NEEDED = StepMemory(1e9, 1e9, 2e9, 1e9, Activations(0, 1e8), 128)


@pytest.mark.parametrize(
    ("free", "checkpointing", "advice"),
    [
        (20e9, False, None),
        (15e9, True, "--grad_accumulation 2 or --batch_size 85$"),
        (10e9, False, "--grad_accumulation 4, --batch_size 40 or --use_grad_checkpointing$"),
        (5e9, True, "--fsdp with several processes or a smaller network$"),
    ],
)
def test_advice_for_a_step_that_does_not_fit(free, checkpointing, advice):
    found = advise(NEEDED, free, 128, checkpointing)
    if advice is None:
        assert found is None
    else:
        assert found.startswith(
            f"the training step is estimated to need 17.8 GB, but the device has {free / 1e9:.1f} GB free"
        )
        with pytest.raises(UsageError, match=advice):
            raise UsageError(found)


def test_the_parts_of_the_estimate_are_named():
    assert NEEDED.describe() == (
        "about 17.8 GB: weights 1.0, gradients 1.0, optimizer 2.0, EMA 1.0, activations of 128 images 12.8"
    )
    assert free_memory(CPU) is None


def test_memory_that_torch_has_reserved_but_does_not_use_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 500), "memory_reserved": 300, "memory_allocated": 120}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == (280, 500)


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.00 GiB is free. "
    "Including non-PyTorch memory, this process has 22.00 GiB memory in use. Of the allocated memory 20.00 GiB is allocated."
)


FRAGMENTS = "if much memory is reserved but not allocated, set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


@pytest.fixture
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(options, "_RECORDED", [])


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (None, "use smaller batches, images or networks"),
        ({"batch_size": 1}, "use smaller batches, images or networks"),
        ({"batch_size": 200, "use_grad_checkpointing": False}, "use a smaller --batch_size (now 200)"),
        (
            {
                "batch_size": 32,
                "grad_accumulation": 1,
                "use_grad_checkpointing": True,
                "fsdp": False,
                "precision": "fp32",
            },
            "use a smaller --batch_size (now 32); --grad_accumulation N gives the same result with less memory; --fsdp shards "
            "weights across several GPUs; --precision bf16 needs less",
        ),
    ],
)
def test_running_out_of_memory_becomes_one_line(values, advice, nothing_recorded, capsys):
    def main():
        if values is not None:
            record_options(Options(values, explicit=frozenset()))
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    with pytest.raises(SystemExit) as ended:
        exit_cleanly(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.00 GiB is "
        f"free: {advice}; {FRAGMENTS}\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_advice_names_only_flags_of_the_script(script):
    values = {each.name: each.default for each in declared_options(script)}
    line = explain(torch.OutOfMemoryError(OUT_OF_MEMORY), Options(values, explicit=frozenset())).line
    named = set(re.findall(r"--(\w+)", line))
    assert named <= values.keys()
    assert ("batch_size" in named) == ("batch_size" in values)
    assert ("use_grad_checkpointing" in named) == script.startswith("train_flow_latent")


def test_other_errors_of_torch_are_defects():
    assert explain(RuntimeError("CUDA error: out of memory")).exit_code == 2
    for message in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "CUDNN_STATUS_ALLOC_FAILED"):
        assert explain(RuntimeError(message)).exit_code == 2
    assert explain(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
