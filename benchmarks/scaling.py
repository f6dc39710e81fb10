"""Counts operations, bytes and GPU-hours of LFM's published experiments. Needs no GPU and no data.

    python -m benchmarks.scaling [--flops 312e12] [--utilisation 0.4]

Builds each network in train_args/ on torch's meta device, without memory, and counts the floating-point operations of a
forward pass. A training step takes three times as many, or four times with gradient checkpointing. LFM's code also encodes
every image at every step, which adds the encoder's forward pass.

GPU-hours are these operations divided by --flops times --utilisation. Both are assumptions: replace them with your own. The
default of --flops is an A100's dense bfloat16 rate.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._latents import new_network
from benchmarks._timing import markdown_table
from command_line import parse_options
from datasets_prep.datasets import DatasetOptions
from models.registry import NETWORKS, NetworkOptions, build_network
from runtime.processes.launch import LaunchOptions
from training.run import TrainingOptions
from training.setup import training_groups

IMAGES = {  # sizes of the training splits
    "celeba_256": 27_000,
    "celeba_512": 27_000,
    "celeba_1024": 27_000,
    "ffhq_256": 63_000,
    "lsun_church": 126_227,
    "lsun_bedroom": 3_033_042,
    "imagenet_256": 1_281_167,
}
FACTOR = 8  # downsampling of Stable Diffusion's autoencoder
BYTES_PER_PARAMETER = 20  # float32 weight, gradient, two AdamW state tensors and EMA
MOMENT_BYTES = 2 * 4 * 2  # per latent pixel: mean and log-variance of four channels in float16


class Cost(NamedTuple):
    """The cost of one experiment.

    Attributes:
        parameters: number of parameters.
        forward: operations per image of the network's forward pass.
        encoding: operations per image of the encoder.
        passes: a training step's operations as a multiple of `forward`.
        seen: images seen in training.
        cache: bytes of the latent cache.
    """

    parameters: int
    forward: int
    encoding: int
    passes: int
    seen: int
    cache: int


def operations(network: nn.Module, *inputs: Any) -> int:
    """Floating-point operations of a forward pass on the meta device. A multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        network.requires_grad_(False)(*inputs)
    return counter.get_total_flops()


def encoder() -> nn.Module:
    """The encoder of Stable Diffusion's autoencoder, on the meta device."""
    with torch.device("meta"):
        return new_network().encoder


def cost_of(file: Path, encode: nn.Module) -> Cost | None:
    """The cost of an experiment in train_args/; None if it is not one of LFM's, or trains another task."""
    if "TASK=" in file.read_text():
        return None
    options = parse_options("", (*training_groups(), LaunchOptions), [f"--args_file={file}"])
    data, training = options[DatasetOptions], options[TrainingOptions]
    if data.dataset not in IMAGES:
        return None
    model_type, side = options[NetworkOptions].resolve(), data.image_size // FACTOR
    family = options[NETWORKS[model_type].options]
    with torch.device("meta"):
        network = build_network(model_type, side, family)
        forward = operations(network, torch.rand(1), torch.rand(1, family.num_in_channels, side, side))
        encoding = operations(encode, torch.rand(1, 3, data.image_size, data.image_size))
    images = IMAGES[data.dataset]
    orientations = 2  # LFM mirrors images in every dataset.
    return Cost(
        sum(parameter.numel() for parameter in network.parameters()),
        forward,
        encoding,
        4 if family.use_grad_checkpointing else 3,
        images * training.num_epoch,
        images * orientations * MOMENT_BYTES * side**2,
    )


def main() -> None:
    """Print a table of all experiments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=312e12, help="peak FLOP/s of the device; default: 312e12")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the peak that training reaches; default: 0.4"
    )
    options = parser.parse_args()
    rate, encode, rows = options.flops * options.utilisation * 3600, encoder(), []
    for file in sorted(Path(__file__).parents[1].glob("train_args/*.txt")):
        cost = cost_of(file, encode)
        if cost is None:
            continue
        ours, published = (cost.seen * (cost.passes * cost.forward + encoded) for encoded in (0, cost.encoding))
        row = [file.stem, f"{cost.parameters / 1e6:.0f} M", f"{cost.forward / 1e9:.0f}", f"{cost.encoding / 1e9:.0f}"]
        row += [
            f"{cost.seen / 1e6:.1f} M",
            f"{ours / rate:,.0f}",
            f"{published / rate:,.0f}",
            f"{published / ours:.2f}",
        ]
        rows.append([*row, f"{cost.parameters * BYTES_PER_PARAMETER / 1e9:.1f}", f"{cost.cache / 1e9:.1f}"])
    header = ["experiment", "parameters", "GFLOP forward", "GFLOP encoding", "images seen", "GPU-hours from the cache"]
    header += ["GPU-hours encoding every image", "ratio", "GB of weights and optimizer state", "GB of cache"]
    peak, share = options.flops / 1e12, 100 * options.utilisation
    print(f"{peak:.0f} TFLOP/s at {share:.0f} % utilization\n\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    main()
