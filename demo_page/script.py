"""The demo script: options, loading, and serving until Ctrl-C."""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from checkpoints.experiments import experiment_folder
from checkpoints.lfm_request import described_by
from command_line import parse_options
from datasets_prep.datasets import DatasetOptions
from demo_page.drawing import DemoModel
from demo_page.settings import Limits
from latent_flow import load
from options import UsageError, option
from runtime.messages import fact, note
from runtime.precision import MachineOptions
from sampling.request import checkpoint_groups

__all__ = ["DemoOptions", "default_checkpoint", "load_demo", "run_demo"]

INSTALL = 'pip install -e ".[demo]" -c constraints-demo.txt'
AUTOENCODER = "pretrained_autoencoder_ckpt"


@dataclass(frozen=True)
class DemoOptions:
    """Page."""

    host: str = option("127.0.0.1", "address to serve on; 0.0.0.0: all of this machine's addresses", common=True)
    port: int = option(7860, "port to serve on", minimum=1, maximum=65535, common=True)
    max_samples: int = option(16, "samples per request, at most", minimum=2, common=True)
    max_steps: int = option(100, "steps per request, at most", minimum=1, common=True)
    max_seconds: float = option(120.0, "seconds per request, at most", minimum=0, common=True)
    max_waiting: int = option(16, "requests that wait, at most; others are told to try again", minimum=1, common=True)


def run_demo(description: str, words: Sequence[str]) -> None:
    """Load a checkpoint and serve its page until Ctrl-C.

    Args:
        description: first paragraph of `--help`.
        words: the command line, without the program's name.

    Raises:
        UsageError: the checkpoint is missing or unreadable, Gradio is not installed, or the port is in use.
    """
    file, flags = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    groups = (DemoOptions, MachineOptions, DatasetOptions, *checkpoint_groups())
    options = parse_options(description, groups, flags, positional="[CHECKPOINT]", rare=groups[2:])
    if importlib.util.find_spec("gradio") is None:
        raise UsageError(f"the demo needs Gradio, which is not installed: {INSTALL}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    settings = options[DemoOptions]
    path = Path(file) if file else default_checkpoint()
    model = load_demo(path, settings, options[MachineOptions], options.given)
    from demo_page.page import build_page, serve

    blocks = build_page(model)
    address = serve(blocks, settings.host, settings.port, settings.max_waiting)
    fact("page", f"{address} (Ctrl-C ends it)")
    if not _is_local(settings.host):
        note("everyone who can reach this machine can use the page; --host 127.0.0.1 keeps it to this machine")
    blocks.block_thread()


def default_checkpoint() -> Path:
    """The default experiment's best checkpoint.

    Raises:
        UsageError: it does not exist.
    """
    path = experiment_folder("saved_info", "fashion_mnist", "fashion_mnist_dit") / "best.safetensors"
    if not path.is_file():
        raise UsageError(
            f"{path} does not exist: train it with `bash run.sh` (ten minutes on two cores), or name another checkpoint: "
            "python demo.py CHECKPOINT"
        )
    return path


def load_demo(path: Path, page: DemoOptions, machine: MachineOptions, given: Mapping[str, Any]) -> DemoModel:
    """Load a checkpoint for the page.

    Args:
        path: the checkpoint.
        page: the limits.
        machine: the device and the precision.
        given: the flags that the user gave, by name. The ones that describe a network, its data and its autoencoder matter.

    Raises:
        UsageError: see `latent_flow.load`.
    """
    described = described_by() - {AUTOENCODER}
    flow = load(
        path,
        device=machine.device,
        precision=machine.precision,
        compile=bool(machine.compile),
        autoencoder=given.get(AUTOENCODER),
        **{name: value for name, value in given.items() if name in described},
    )
    limits = Limits(page.max_samples, page.max_steps, page.max_seconds)
    model = DemoModel(flow, path, limits, ThreadPoolExecutor(1))
    fact("network", model.abilities.describe())
    return model


def _is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
