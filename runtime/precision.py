"""Device, floating-point precision, compilation and memory of a run: the settings that determine its speed."""

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from options import UsageError, option
from runtime.cpu.cores import cpu_quota
from runtime.cpu.kernels import with_cpu_kernels
from runtime.cpu.yielding import yield_to_others
from runtime.distributed import Processes, each_process_has_its_gpu
from runtime.messages import note

__all__ = [
    "DeviceOptions",
    "Machine",
    "MachineOptions",
    "PrecisionOptions",
    "choose_device",
    "choose_machine",
    "find_device",
    "keep_freed_memory",
    "use_device",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_THREADS = 1024
EVALUATIONS_WORTH_COMPILING = 1000  # network evaluations that make up for the minute that compiling takes
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's parameters in glibc's malloc.h


@dataclass(frozen=True)
class DeviceOptions:
    """Device."""

    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N", on_resume="freely", common=True)
    num_threads: int = option(
        0,
        "CPU threads per process; 0: the machine's cores, divided among its processes. Results are bit-identical only for the "
        "same number",
        minimum=0,
        maximum=MOST_THREADS,
        on_resume="rounding",
    )


@dataclass(frozen=True)
class PrecisionOptions(DeviceOptions):
    """Machine."""

    precision: str = option(
        "auto",
        "precision of matrix products: fp32, bf16, or auto, which is bf16 on processors that are faster in it (GPUs since "
        "2020, CPUs with AMX, AMD CPUs with AVX512_BF16)",
        choices=("auto", "fp32", "bf16"),
        on_resume="on_request",
        common=True,
    )


@dataclass(frozen=True)
class MachineOptions(PrecisionOptions):
    """Machine."""

    precision: str = option(
        "auto",
        "precision of matrix products: fp32, bf16, fp16 (with loss scaling), or auto, which is bf16 on processors that are "
        "faster in it (GPUs since 2020, CPUs with AMX, AMD CPUs with AVX512_BF16), but fp32 for adaptive solvers at "
        "tolerances below 1e-3",
        choices=("auto", *DTYPES),
        on_resume="on_request",
        common=True,
    )
    compile: bool | None = option(
        None,
        "compile the network, which takes a minute; default: on in bf16 and fp16 if the run is long enough to benefit",
        on_resume="rounding",
        common=True,
    )


@dataclass(frozen=True)
class Machine:
    """A device, the precision used on it (a key of DTYPES), and whether to compile networks (None: if it pays off)."""

    device: torch.device
    precision: str
    compile: bool | None = False
    replays: bool = False  # replay training steps as CUDA graphs; only with an explicit --compile

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products; weights, losses and latents are always float32."""
        return DTYPES[self.precision]

    @property
    def for_encoding(self) -> "Machine":
        """This machine with float32 in place of float16, because some autoencoders overflow in float16."""
        return replace(self, precision="fp32") if self.precision == "fp16" else self

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options for torch.compile; dropout uses the same random numbers as in eager mode.

        On a CPU, short reductions, such as the sum over a group's channels (runtime/cpu/kernels.py), are stored instead of
        unrolled into later loops. A multiplication and the addition that uses it become one instruction that rounds once,
        as on GPUs.
        """
        on_cpu = {"unroll_reductions_threshold": 1, "cpp.enable_floating_point_contract_flag": "fast"}
        return {"fallback_random": True, **(on_cpu if self.device.type == "cpu" else {})}

    def autocast(self) -> AbstractContextManager:
        """The context manager for running networks."""
        return nullcontext() if self.precision == "fp32" else torch.autocast(self.device.type, self.dtype)

    def evaluating(self, network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Wrap a network so that it always runs in this machine's precision."""

        def evaluate(*arguments: Any, **named: Any) -> torch.Tensor:
            with self.autocast():
                return network(*arguments, **named)

        return evaluate

    def settled(self, calls: float, processes: Processes, whole: bool = True) -> "Machine":
        """Decide whether to compile; the main process decides for all processes.

        Args:
            calls: approximate number of forward passes of a network.
            processes: the processes of the run.
            whole: whether each process holds the whole network; a sharded one is compiled only with an explicit `--compile`.
        """
        pays = whole and self.precision != "fp32" and calls >= EVALUATIONS_WORTH_COMPILING
        wanted = pays if self.compile is None else self.compile
        if processes.is_main and wanted and (reason := _why_not_compiled(self)):
            note(f"networks are not compiled, because torch.compile fails on this machine: {reason}")
            wanted = False
        replays = self.compile is True and self.device.type != "cpu"
        return replace(self, compile=processes.from_main(wanted), replays=replays)

    def describe(self) -> str:
        """Describe the device, precision and compilation in one line."""
        way = "compiled (takes about a minute at the start)" if self.compile else "not compiled"
        return f"{self.describe_device()}, {self.precision}, {way}"

    def describe_device(self) -> str:
        """The device, with the number of threads of a CPU or the name of a GPU."""
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' if count > 1 else ''}" if self.device.type == "cpu" else ""
        card = f", {torch.cuda.get_device_name(self.device)}" if self.device.type == "cuda" else ""
        return f"{self.device}{card}{threads}"

    def compiled(self, network: nn.Module, always_alike: bool = False) -> nn.Module:
        """Swap CPU kernels into a network in place, and compile it if this machine compiles.

        Compilation does not change the random numbers that the network draws.

        Args:
            network: the network, which may be wrapped for several processes.
            always_alike: whether all calls have the same shapes and no output or gradient outlives the next call, so that
                GPUs may replay the network as CUDA graphs.
        """
        network = with_cpu_kernels(network)
        if not self.compile:
            return network
        options = self.compiler_options | {"triton.cudagraphs": self.replays and always_alike}
        return torch.compile(network, options=options)  # type: ignore[return-value]


def choose_device(options: DeviceOptions, processes: Processes = Processes()) -> torch.device:  # noqa: B008
    """Find the device, and set the number of threads: each process on a machine gets its share of the cores.

    Call this once, because each call divides the cores again. On a CPU, the process keeps the memory that it frees
    (`keep_freed_memory`), and its threads yield to other processes (`yield_to_others`).

    Raises:
        UsageError: as `find_device` does.
    """
    device = find_device(options, processes)
    own, wanted = torch.get_num_threads(), options.num_threads
    if not wanted and "OMP_NUM_THREADS" not in os.environ:
        quota = cpu_quota()  # a container's, which OpenMP does not know
        wanted = max(1, (own if quota is None else min(own, int(quota))) // processes.local_count)
    if wanted not in (0, own):
        torch.set_num_threads(wanted)
    if device.type == "cpu":
        keep_freed_memory()
        yield_to_others()
    return device


def find_device(options: DeviceOptions, processes: Processes = Processes()) -> torch.device:  # noqa: B008
    """Resolve "auto" and make the device the current one; each process on a machine gets its own GPU.

    Raises:
        UsageError: torch does not know the device or cannot use it here, or there are more processes than GPUs.
    """
    name = options.device
    if name in ("auto", "cuda") and torch.cuda.is_available():
        bound = each_process_has_its_gpu()
        name = "cuda:0" if bound else f"cuda:{processes.local_rank}"
        if processes.local_count > torch.cuda.device_count() and not bound:
            raise UsageError(
                f"{processes.local_count} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "start one per GPU, or use --device cpu"
            )
    elif name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a missing GPU or driver
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        detail = "" if "device string" in reason else f" ({reason})"  # torch lists all types of devices that it knows
        raise UsageError(
            f"--device {name} is not available: expected auto, cpu, cuda or cuda:N on this machine{detail}"
        ) from error
    # Without TF32, float32 means float32. The switches are global, so a thread that changed them would change others' results.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's current device, whose properties torch and Triton look up. New threads start with GPU 0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_machine(
    options: PrecisionOptions,
    processes: Processes = Processes(),  # noqa: B008
    precise: bool = False,
) -> Machine:
    """Choose the device and the precision; "auto" becomes float32 if `precise`. Raises the errors of `choose_device`."""
    device, precision = choose_device(options, processes), options.precision
    if precision == "auto":
        precision = "bf16" if not precise and _multiplies_bfloat16(device) else "fp32"
        if device.type == "cuda" and precision == "fp32" and not precise and isinstance(options, MachineOptions):
            note("this GPU has no fast bfloat16, so matrix products are float32: --precision fp16 is faster")
    return Machine(device, precision, options.compile if isinstance(options, MachineOptions) else False)


def keep_freed_memory(keep: bool = True) -> None:
    """Make glibc's allocator keep freed memory, which the next training step needs again.

    By default, glibc returns large blocks to the system at once. The next tensor then waits for new pages to be cleared one
    by one, which takes up to a fifth of a step. `keep=False` restores the thresholds that glibc reaches by default. Other C
    libraries are not affected.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0 if keep else 65536)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(TRIM_THRESHOLD, -1 if keep else 64 << 20)


@cache
def _why_not_compiled(machine: Machine) -> str:
    """Try torch.compile, which takes a few seconds; returns the reason if it fails, else an empty string."""
    try:
        torch.compile(torch.neg, options=machine.compiler_options)(torch.zeros(2, device=machine.device))
    except Exception as error:  # torch raises various errors if the compiler or its headers are missing
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or _is_amd_with_bfloat16())


def _is_amd_with_bfloat16() -> bool:
    """Whether this is an AMD processor with AVX512_BF16; Xeons with AVX512_BF16 but without AMX are slower in bfloat16."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
    return bool(capabilities.get("avx512_bf16")) and str(capabilities.get("cpu_name")).startswith("AMD")
