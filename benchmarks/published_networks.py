"""Claim: the largest published networks load, convert, sample and decode an image within four times the weights' memory.

    python -m benchmarks.published_networks [--networks SiT-XL/2 LightningDiT-XL/1 DiTDH-XL] [--num_steps 2]

Each network has random weights in its full size. Four processes per network write a file as its project does, convert it to
this project's format, draw one image of 256 x 256 pixels from it, and convert it back, which must give the same file. The
autoencoder has random weights too, and latents of the right shape. Peaks are resident memory minus the memory in use after
imports. Needs 7 GB of disk, and 12 GB of memory for the largest.

Linux only, where ru_maxrss counts KiB.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import latent_flow
from benchmarks._timing import markdown_table
from checkpoints.conversion import from_published, to_published
from checkpoints.projects.registry import PROJECTS
from models.autoencoders.kl import new_autoencoder_kl
from models.dit import DiTOptions
from models.registry import NetworkOptions, build_network, published_options

IMAGE_SIZE, CLASSES, SEED = 256, 1000, 0
BYTES = 4  # of a weight
MAX_RATIO = 4.0


class Latents(NamedTuple):
    """Channels and side of a network's latents, and the widths of an autoencoder for them."""

    channels: int
    side: int
    widths: tuple[int, ...]


LATENTS = {
    "SiT": Latents(4, 32, (128, 256, 512, 512)),  # sd-vae-ft's
    "REPA": Latents(4, 32, (128, 256, 512, 512)),
    "MeanFlow": Latents(4, 32, (128, 256, 512, 512)),
    "LightningDiT": Latents(32, 16, (128, 128, 256, 256, 512)),  # VA-VAE's
    "DiTDH": Latents(768, 16, (64, 64, 128, 128, 256)),
}


def digest_of(path: Path) -> str:
    """Hash of a file's entry, and of the names, order and values of its weights."""
    content, digest = torch.load(path, weights_only=True, mmap=True), hashlib.sha256()
    for name, value in content.get("ema", content).items():
        digest.update(f"{'ema' in content} {name} {tuple(value.shape)}".encode())
        digest.update(value.numpy())
    return digest.hexdigest()


def write_file(folder: Path, name: str, steps: int) -> float:
    """Write the network's file and its autoencoder. Returns the number of weights, in millions."""
    project, latents = name.partition("-")[0], LATENTS[name.partition("-")[0]]
    channels = {"num_in_channels": latents.channels, "num_out_channels": latents.channels, "num_classes": CLASSES}
    torch.manual_seed(SEED)
    with torch.device("meta"):
        network = build_network(
            NetworkOptions(name).resolve(), latents.side, DiTOptions(**channels, **published_options(name))
        )
    own = network.to_empty(device="cpu").requires_grad_(False).state_dict()
    for value in own.values():
        value.normal_(std=0.02)
    weights = {theirs: own[ours] for theirs, ours in PROJECTS[project].names(own).items()}
    torch.save({"ema": weights} if PROJECTS[project].entry else weights, folder / "file.pt")
    (folder / "digest").write_text(digest_of(folder / "file.pt"))
    new_autoencoder_kl(3, latents.widths, latents.channels, IMAGE_SIZE, {}).save_pretrained(folder / "autoencoder")
    return sum(value.numel() for value in own.values()) / 1e6


def convert(folder: Path, name: str, steps: int) -> float:
    """Convert to this project's format, and remove the file."""
    from_published(
        folder / "file.pt", folder / "model.safetensors", {"pretrained_autoencoder_ckpt": str(folder / "autoencoder")}
    )
    (folder / "file.pt").unlink()
    return 0.0


def sample(folder: Path, name: str, steps: int) -> float:
    """Draw and decode one image. Returns the seconds that this took after loading."""
    flow = latent_flow.load(folder / "model.safetensors", precision="fp32")
    started = time.perf_counter()
    images = flow.sample(labels=[1], steps=steps, method="euler")
    assert images.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return time.perf_counter() - started


def convert_back(folder: Path, name: str, steps: int) -> float:
    """Convert back, and compare with the file."""
    to_published(folder / "model.safetensors", folder / "back.pt")
    assert digest_of(folder / "back.pt") == (folder / "digest").read_text()
    return 0.0


STAGES: dict[str, Callable[[Path, str, int], float]] = {
    "write": write_file,
    "convert": convert,
    "sample": sample,
    "convert back": convert_back,
}


def peak_memory() -> float:
    """Peak resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_stage(stage: str, folder: Path, name: str, steps: int) -> dict[str, float]:
    """Run a stage in this process. Returns its result, seconds and peak memory in bytes."""
    before, started = peak_memory(), time.perf_counter()
    result = STAGES[stage](folder, name, steps)
    return {"result": result, "seconds": time.perf_counter() - started, "peak": peak_memory() - before}


def in_process(stage: str, folder: Path, name: str, steps: int) -> dict[str, float]:
    """Run a stage in a separate process, and parse the result it prints."""
    flags = ["--networks", name, "--num_steps", str(steps), "--stage", stage, "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.published_networks", *flags]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Print the table. Exit with code 1 if a stage uses more than four times the weights' memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["SiT-XL/2", "LightningDiT-XL/1", "DiTDH-XL"])
    parser.add_argument("--num_steps", type=int, default=2, help="steps of Euler's method; default: 2")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(run_stage(options.stage, options.folder, options.networks[0], options.num_steps)))
        return
    rows, exceeds = [], False
    for name in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            millions = in_process("write", Path(folder), name, options.num_steps)["result"]
            for stage in list(STAGES)[1:]:
                found = in_process(stage, Path(folder), name, options.num_steps)
                exceeds |= found["peak"] > MAX_RATIO * millions * 1e6 * BYTES
                loaded = f" ({found['result']:.0f} s after loading)" if found["result"] else ""
                seconds = f"{found['seconds']:.0f} s{loaded}"
                rows.append([name, f"{millions:.0f} M", stage, seconds, f"{found['peak'] / 1e9:.1f} GB"])
                print(rows[-1], flush=True)
    print(f"\n{markdown_table(['network', 'weights', 'stage', 'time', 'peak memory'], rows)}")
    sys.exit(exceeds)


if __name__ == "__main__":
    main()
