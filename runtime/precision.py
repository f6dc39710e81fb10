"""Device, floating-point precision, compilation and memory of a run: all that decides how fast it computes."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from options import UsageError, option
from runtime.cpu_kernels import with_cpu_kernels
from runtime.distributed import Processes

__all__ = [
    "DeviceOptions",
    "Machine",
    "MachineOptions",
    "PrecisionOptions",
    "choose_device",
    "choose_machine",
    "keep_freed_memory",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALLS_THAT_PAY = 1000  # of a network, for the minute that compiling it takes
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's parameters in glibc's malloc.h


@dataclass(frozen=True)
class DeviceOptions:
    """Device."""

    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N", on_resume="freely", common=True)
    num_threads: int = option(
        0,
        "CPU threads, 0: the machine's, shared among its processes; results are bit-identical for one number",
        minimum=0,
        on_resume="rounding",
    )


@dataclass(frozen=True)
class PrecisionOptions(DeviceOptions):
    """Machine."""

    precision: str = option(
        "auto",
        "of matrix products: fp32, bf16, or auto: bf16 where the processor is faster in it (GPUs since 2020, CPUs with "
        "AMX, AMD's with AVX512_BF16)",
        choices=("auto", "fp32", "bf16"),
        on_resume="on_request",
        common=True,
    )


@dataclass(frozen=True)
class MachineOptions(PrecisionOptions):
    """Machine."""

    precision: str = option(
        "auto",
        "of matrix products: fp32, bf16, fp16 (losses are scaled), or auto: bf16 where the processor is faster in "
        "it (GPUs since 2020, CPUs with AMX, AMD's with AVX512_BF16), but fp32 for adaptive solvers at tolerances below 1e-3",
        choices=("auto", *DTYPES),
        on_resume="on_request",
        common=True,
    )
    compile: bool | None = option(
        None,
        "compile the network, which takes a minute; default: in bf16 or fp16, where the run is long enough to gain",
        on_resume="rounding",
        common=True,
    )


@dataclass(frozen=True)
class Machine:
    """A device, the precision used on it (a key of DTYPES), and whether networks are compiled; None: where it pays."""

    device: torch.device
    precision: str
    compile: bool | None = False
    replays: bool = False  # a training step as CUDA graphs; only where --compile was given

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in; weights, losses and latents are float32 everywhere."""
        return DTYPES[self.precision]

    @property
    def for_encoding(self) -> "Machine":
        """For autoencoders, some of which overflow in float16."""
        return replace(self, precision="fp32") if self.precision == "fp16" else self

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of torch.compile: dropout draws as it does eagerly.

        On a CPU, short sums are stored, not unrolled into later loops: such are those over the channels of a group
        (runtime/cpu_kernels.py). A product and the sum it goes into are one instruction, rounded once, as they are on GPUs.
        """
        on_cpu = {"unroll_reductions_threshold": 1, "cpp.enable_floating_point_contract_flag": "fast"}
        return {"fallback_random": True, **(on_cpu if self.device.type == "cpu" else {})}

    def autocast(self) -> AbstractContextManager:
        """The context in which networks run."""
        return nullcontext() if self.precision == "fp32" else _reduced_precision(self.device, self.dtype)

    def evaluating(self, network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The network, run in this machine's precision whatever surrounds the call."""

        def evaluate(*arguments: Any) -> torch.Tensor:
            with self.autocast():
                return network(*arguments)

        return evaluate

    def settled(self, calls: float, processes: Processes, whole: bool = True) -> "Machine":
        """This machine with compilation decided on, for all processes, by the main one.

        Args:
            calls: forward passes of a network, about.
            processes: those of the run.
            whole: whether each holds the whole network (else only `--compile` compiles it).
        """
        pays = whole and self.precision != "fp32" and calls >= CALLS_THAT_PAY
        wanted = pays if self.compile is None else self.compile
        if processes.is_main and wanted and (reason := _why_not_compiled(self)):
            print(f"note: networks are not compiled, since torch.compile fails here: {reason}")
            wanted = False
        replays = self.compile is True and self.device.type != "cpu"
        return replace(self, compile=processes.from_main(wanted), replays=replays)

    def describe(self) -> str:
        """The device, precision and compilation in words."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        way = "compiled (takes about a minute at the start)" if self.compile else "not compiled"
        return f"{self.device}{threads}, {self.precision}, {way}"

    def compiled(self, network: nn.Module, always_alike: bool = False) -> nn.Module:
        """The network with CPU kernels, swapped in in place, and compiled if this machine compiles.

        Compiled or not, it draws the same random numbers.

        Args:
            network: perhaps wrapped for several processes.
            always_alike: whether all calls have one shape, and no output or gradient outlives the next call, so that GPUs
                may replay it as CUDA graphs.
        """
        network = with_cpu_kernels(network)
        if not self.compile:
            return network
        options = self.compiler_options | {"triton.cudagraphs": self.replays and always_alike}
        return torch.compile(network, options=options)  # type: ignore[return-value]


def choose_device(options: DeviceOptions, processes: Processes = Processes()) -> torch.device:  # noqa: B008
    """Resolve "auto" and set the number of threads; every process of a machine gets a GPU and its share of the cores.

    On a CPU the process keeps the memory that it frees (`keep_freed_memory`).

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
    if device.type == "cpu":
        keep_freed_memory()
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    elif processes.local_count > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes.local_count))
    return device


def choose_machine(
    options: PrecisionOptions,
    processes: Processes = Processes(),  # noqa: B008
    precise: bool = False,
) -> Machine:
    """The device, and the precision on it with "auto" resolved: to float32 if `precise`; errors as `choose_device`."""
    device, precision = choose_device(options, processes), options.precision
    if precision == "auto":
        precision = "bf16" if not precise and _multiplies_bfloat16(device) else "fp32"
    _allow_tf32(False)  # where there is no autocast: in decoding and scores
    return Machine(device, precision, options.compile if isinstance(options, MachineOptions) else False)


def keep_freed_memory(keep: bool = True) -> None:
    """Let glibc's allocator hold on to memory that is freed, which a training step asks for again.

    By itself it gives large blocks back to the system at once, and the next tensor waits for new pages, cleared one by one:
    up to a fifth of a step. `keep=False` brings back the thresholds that it settles on by itself. Other C libraries are left
    alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(TRIM_THRESHOLD, -1 if keep else 64 << 20)


@contextmanager
def _reduced_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast; on a GPU, products that it leaves in float32 are computed in TF32."""
    try:
        _allow_tf32(device.type == "cuda")
        with torch.autocast(device.type, dtype):
            yield
    finally:
        _allow_tf32(False)  # not what it was before: that may be another thread's


def _allow_tf32(allow: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow


@cache
def _why_not_compiled(machine: Machine) -> str:
    """Why torch.compile fails here, in a few words; empty where it works, as a trial of a few seconds shows."""
    try:
        torch.compile(torch.neg, options=machine.compiler_options)(torch.zeros(2, device=machine.device))
    except Exception as error:  # torch raises many kinds for one thing: there is no compiler, or it lacks headers
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or _is_amd_with_bfloat16())


def _is_amd_with_bfloat16() -> bool:
    """Whether this is an AMD processor with AVX512_BF16; a Xeon with that alone is slower than in float32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return bool(capabilities.get("avx512_bf16")) and str(capabilities.get("cpu_name")).startswith("AMD")
