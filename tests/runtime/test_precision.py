import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from options import UsageError
from runtime import precision
from runtime.distributed import Processes
from runtime.precision import DeviceOptions, Machine, MachineOptions, PrecisionOptions, choose_device, choose_machine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LONG, SHORT = 10_000, 10  # network evaluations
FAULTS = """
import ctypes, resource, torch
from runtime.precision import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 kB wherever it runs

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(1 << 24)  # 64 MB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_an_explicit_precision_is_used(name):
    assert choose_machine(MachineOptions("cpu", precision=name)) == Machine(CPU, name, compile=None)


@pytest.mark.parametrize(
    ("amx", "name", "avx512_bf16", "chosen"),
    [
        (True, "Intel(R) Xeon(R) Processor", True, "bf16"),
        (False, "Intel(R) Xeon(R) Processor", True, "fp32"),
        (False, "AMD EPYC", True, "bf16"),
        (False, "AMD EPYC", False, "fp32"),
    ],
)
def test_automatic_precision_is_bfloat16_on_processors_that_gain_from_it(monkeypatch, amx, name, avx512_bf16, chosen):
    capabilities = {"cpu_name": name, "avx512_bf16": avx512_bf16}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_machine(MachineOptions("cpu")).precision == chosen


def test_precise_computations_default_to_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_machine(MachineOptions("cpu"), precise=True).precision == "fp32"
    assert choose_machine(MachineOptions("cpu", precision="bf16"), precise=True).precision == "bf16"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_an_unavailable_device_is_a_usage_error(name):
    with pytest.raises(
        UsageError, match=f"--device {name} is not available: expected auto, cpu, cuda or cuda:N on this machine"
    ):
        choose_device(DeviceOptions(name))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast_follows_the_precision(name, dtype):
    with Machine(CPU, name).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype == Machine(CPU, name).dtype


@pytest.mark.parametrize(
    ("asked", "calls", "whole", "name", "compiles"),
    [
        (None, LONG, True, "bf16", True),
        (None, LONG, True, "fp32", False),
        (None, SHORT, True, "bf16", False),
        (None, LONG, False, "bf16", False),
        (True, SHORT, False, "fp32", True),
        (False, LONG, True, "bf16", False),
    ],
)
def test_compiles_if_requested_or_if_it_pays(monkeypatch, asked, calls, whole, name, compiles):
    monkeypatch.setattr(precision, "_why_not_compiled", lambda machine: "")
    machine = Machine(CPU, name, asked).settled(calls, Processes(), whole)
    assert machine.compile is compiles
    assert ("not compiled" not in machine.describe()) == compiles
    assert name in machine.describe()


def test_without_a_compiler_networks_run_eagerly_with_a_note(monkeypatch, capsys):
    def broken(function, options):
        raise RuntimeError("no g++ found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    precision._why_not_compiled.cache_clear()
    machine = Machine(CPU, "bf16", True).settled(LONG, Processes())
    precision._why_not_compiled.cache_clear()
    network = nn.Linear(2, 2)
    assert machine.compiled(network, always_alike=True) is network
    assert capsys.readouterr().err == (
        "note: networks are not compiled, because torch.compile fails on this machine: no g++ found\n"
    )


def test_cuda_graphs_are_used_only_on_gpus_and_on_request(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda network, options: graphs.append(options["triton.cudagraphs"]))
    monkeypatch.setattr(precision, "_why_not_compiled", lambda machine: "")
    gpu = torch.device("cuda")
    for device, asked, always_alike in ((gpu, True, True), (gpu, None, True), (gpu, True, False), (CPU, True, True)):
        machine = Machine(device, "bf16", asked).settled(LONG, Processes())
        machine.compiled(nn.Linear(2, 2), always_alike)
    assert graphs == [True, False, False, False]


def test_a_compiled_network_has_the_same_dropout():
    network, x = nn.Dropout(0.5), torch.ones(64)
    compiled = Machine(CPU, "fp32", True).compiled(network)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)


def test_tf32_is_never_used():
    torch.backends.cudnn.allow_tf32 = True  # the default
    choose_device(DeviceOptions("cpu"))
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_autoencoders_do_not_run_in_float16():
    assert [Machine(CPU, name).for_encoding.precision for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp32"]


@pytest.mark.skipif(precision.platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_freed_memory_is_reused_without_page_faults():
    pages = 20 * (1 << 26) // resource.getpagesize()
    command = [sys.executable, "-c", FAULTS]
    before, after = map(int, subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split())
    assert before > pages / 2
    assert after < pages / 100


def test_a_gpu_becomes_the_current_device(monkeypatch):
    """Libraries look up properties of the current device, and allocate on it if they are given none."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, processes in (("cuda:1", Processes()), ("auto", Processes(1, 2, 1, 2)), ("cuda", Processes())):
        choose_device(DeviceOptions(name), processes)
    assert [device.index for device in chosen] == [1, 1, 0]


@pytest.mark.parametrize(("capable", "precision_used"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_without_bfloat16_causes_a_note(capable, precision_used, monkeypatch, capsys):
    monkeypatch.setattr(precision, "choose_device", lambda options, processes: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    machine = choose_machine(MachineOptions())
    assert machine.describe() == f"cuda:0, A Card, {precision_used}, not compiled"
    assert ("--precision fp16 is faster" in capsys.readouterr().err) == (not capable)
    for options, precise in (
        (MachineOptions(precision="fp32"), False),
        (MachineOptions(), True),
        (PrecisionOptions(), False),
    ):
        choose_machine(options, precise=precise)
        assert capsys.readouterr().err == ""
