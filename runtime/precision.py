"""Device and floating-point precision of a run."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from options import UsageError, option
from runtime.distributed import Processes

__all__ = ["DeviceOptions", "Machine", "MachineOptions", "choose_device", "choose_machine"]


@dataclass(frozen=True)
class DeviceOptions:
    """Device."""

    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N")
    num_threads: int = option(
        0,
        "CPU threads, 0: the machine's, shared among its processes; results are bit-identical for one number",
        minimum=0,
    )


@dataclass(frozen=True)
class MachineOptions(DeviceOptions):
    """Machine."""

    precision: str = option(
        "auto",
        "fp32, bf16 (autocast), or auto: bf16 where the processor multiplies it natively (GPUs since 2020, CPUs with AMX)",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "compile the network with torch.compile (the first step takes a minute)")


@dataclass(frozen=True)
class Machine:
    """A device and the precision used on it: "fp32" or "bf16"."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager:
        """The context in which networks run; weights and losses stay in float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def choose_device(options: DeviceOptions, processes: Processes = Processes()) -> torch.device:  # noqa: B008
    """Resolve "auto" and set the number of threads; every process of a machine gets a GPU and its share of the cores.

    Raises:
        UsageError: a device that torch does not know or cannot use here, or more processes than GPUs.
    """
    name = options.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{processes.local_rank}"
        if processes.local_count > torch.cuda.device_count():
            raise UsageError(
                f"{processes.local_count} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "start one per GPU, or use --device cpu"
            )
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown name; a GPU, or a driver, that is not there
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N of this machine ({reason})") from error
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    elif processes.local_count > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes.local_count))
    return device


def choose_machine(options: MachineOptions, processes: Processes = Processes()) -> Machine:  # noqa: B008
    """The device, and the precision on it with "auto" resolved; errors as `choose_device`."""
    device = choose_device(options, processes)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision != "fp32"
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if _multiplies_bfloat16(device) else "fp32"
    return Machine(device, precision)


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
