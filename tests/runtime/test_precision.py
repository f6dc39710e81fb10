import resource
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from options import UsageError
from runtime import precision
from runtime.precision import DeviceOptions, Machine, MachineOptions, PrecisionOptions, choose_device, choose_machine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LONG, SHORT = 10_000, 10  # calls of a network
FAULTS = """
import resource, torch
from runtime.precision import keep_freed_memory

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
def test_precision_is_the_one_asked_for(name):
    assert choose_machine(MachineOptions("cpu", precision=name)) == Machine(CPU, name, compile=None)


@pytest.mark.parametrize(("native", "chosen"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, native, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    assert choose_machine(MachineOptions("cpu")).precision == chosen


def test_what_must_be_precise_is_float32_unless_asked_otherwise(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_machine(MachineOptions("cpu"), precise=True).precision == "fp32"
    assert choose_machine(MachineOptions("cpu", precision="bf16"), precise=True).precision == "bf16"


def test_only_scripts_that_train_or_sample_networks_compile_and_scale_losses():
    assert choose_machine(PrecisionOptions("cpu")).compile is False
    assert {field.name for field in fields(MachineOptions)} - {field.name for field in fields(PrecisionOptions)} == {
        "compile"
    }
    assert "fp16" not in PrecisionOptions.__dataclass_fields__["precision"].metadata["choices"]


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_cannot_be_used_is_the_users_error(name):
    with pytest.raises(UsageError, match=f"--device {name}: expected auto, cpu, cuda or cuda:N of this machine"):
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
def test_compiles_when_asked_to_or_where_it_pays(monkeypatch, asked, calls, whole, name, compiles):
    monkeypatch.setattr(precision, "_why_not_compiled", lambda device: "")
    machine = Machine(CPU, name, asked).settled(calls, whole)
    assert machine.compile is compiles
    assert ("networks compiled" in machine.describe()) == compiles
    assert name in machine.describe()


def test_without_a_compiler_networks_run_as_they_are_and_a_line_says_so(monkeypatch, capsys):
    def broken(function):
        raise RuntimeError("no g++ found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    precision._why_not_compiled.cache_clear()
    machine = Machine(CPU, "bf16", True).settled(LONG)
    precision._why_not_compiled.cache_clear()
    network = nn.Linear(2, 2)
    assert machine.compiled(network, graphs=True) is network
    assert capsys.readouterr().out == (
        "note: networks are not compiled, since torch.compile fails here: no g++ found\n"
    )


def test_only_on_a_gpu_is_a_training_step_replayed_as_graphs(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, mode: modes.append(mode))
    gpu = Machine(torch.device("cuda"), "bf16", True)
    for machine, graphs in ((gpu, True), (gpu, False), (replace(gpu, device=CPU), True)):
        machine.compiled(nn.Linear(2, 2), graphs)
    assert modes == ["reduce-overhead", None, None]


@pytest.mark.skipif(precision.platform.libc_ver()[0] != "glibc", reason="another C library's allocator")
def test_memory_that_is_freed_is_used_again_without_page_faults():
    pages = 20 * (1 << 26) // resource.getpagesize()
    command = [sys.executable, "-c", FAULTS]
    before, after = map(int, subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split())
    assert before > pages / 2
    assert after < pages / 100
