"""Claim: a training step on 256-pixel images takes a fraction of the time of LFM's published step, which encodes every image.

    python -m benchmarks.published_step [NETWORK ...] [--batch_size 8] [--rounds 3]

The published step encodes its images with Stable Diffusion's autoencoder (random weights), samples from the posterior, and
then takes the plain step of benchmarks/training_step.py. Everything runs eagerly in float32, with the EMA in one vector of
concatenated parameters. Its images are already in memory, so that reading them costs nothing here.

Our step is training/state.py's step in bfloat16 and compiled. Its batches come from training/data.py and a latent cache of
random moments. The two steps alternate.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks._latents import new_autoencoder, open_random_cache, write_random_cache
from benchmarks._timing import compare, markdown_table
from benchmarks.training_step import CASES, OBJECTIVE, Case, OurStep, PlainStep, peak
from datasets_prep.latent_cache import SHARD_BYTES
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.protocol import Autoencoder
from runtime.distributed import Processes
from runtime.precision import keep_freed_memory
from training.data import Batch, batches

NETWORKS = ("DiT-S/2", "DiT-B/2")
SIDE = 256


class PublishedStep:
    """A callable that encodes the images, then takes the plain step."""

    def __init__(self, step: PlainStep, autoencoder: Autoencoder, images: torch.Tensor) -> None:
        self.step, self.autoencoder, self.images = step, autoencoder, images
        self.batch = step.batch
        self.encoding: list[float] = []  # seconds per step

    def encode(self) -> torch.Tensor:
        """Encode the whole batch at once in float32 and sample normalized latents from the posterior."""
        with torch.no_grad():
            posterior = self.autoencoder.network.encode(images_to_pixels(self.images)).latent_dist
            return (posterior.sample() - self.autoencoder.mean) / self.autoencoder.std

    def __call__(self) -> None:
        """Take a training step."""
        keep_freed_memory(self.step.keeps_memory)
        started = time.perf_counter()
        self.step.batch = self.batch._replace(data=self.encode())
        self.encoding.append(time.perf_counter() - started)
        self.step()


class CachedStep:
    """A callable that takes the next batch from the cache, then our step."""

    def __init__(self, step: OurStep, upcoming: Iterator[Batch]) -> None:
        self.step, self.upcoming = step, upcoming

    def __call__(self) -> None:
        """Take a training step."""
        self.step.batch = next(self.upcoming)
        self.step()


def batches_from_cache(folder: Path, autoencoder: Autoencoder, batch_size: int) -> Iterator[Batch]:
    return batches(
        open_random_cache(folder, write_random_cache(folder, SHARD_BYTES)),
        autoencoder,
        OBJECTIVE,
        batch_size=batch_size,
        first_step=0,
        last_step=1 << 20,
        seed=0,
        flips=True,
        num_classes=10,
        label_dropout=0.0,
        device=torch.device("cpu"),
        processes=Processes(),
    )


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Seconds per step of both variants, and the published step's seconds for encoding."""
    torch.manual_seed(2)
    images = torch.randint(256, (case.batch_size, 3, SIDE, SIDE), dtype=torch.uint8)
    plain = new_autoencoder()
    plain.network.to(memory_format=torch.contiguous_format)
    published = PublishedStep(PlainStep(case), plain, images)
    with tempfile.TemporaryDirectory() as folder:
        upcoming = batches_from_cache(Path(folder), plain, case.batch_size)
        cached = CachedStep(OurStep(case), upcoming)
        seconds = compare({"published": published, "ours": cached}, rounds, settled=True)
    return seconds | {"encoding": statistics.median(published.encoding)}


def main() -> None:
    """Print a table and plot it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"{', '.join(NETWORKS)}; default: all")
    parser.add_argument("--batch_size", type=int, default=8, help="default: 8")
    parser.add_argument("--rounds", type=int, default=3, help="turns per step; default: 3")
    parser.add_argument(
        "--output", type=Path, help="picture to write; default: docs/published_step.png if all networks are run"
    )
    options = parser.parse_args()
    if unknown := set(options.networks) - set(NETWORKS):
        parser.error(f"unknown networks: {', '.join(unknown)}; choose from {', '.join(NETWORKS)}")
    print(f"bfloat16 peak {peak() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads\n")
    results, rows = {}, []
    for name in options.networks or NETWORKS:
        seconds = results[name] = measure(CASES[name]._replace(batch_size=options.batch_size), options.rounds)
        published, encoding, ours = (seconds[side] for side in ("published", "encoding", "ours"))
        times = [f"{published:.2f} s", f"{encoding:.2f} s", f"{1e3 * ours:.0f} ms"]
        rows.append(
            [name, str(options.batch_size), *times, f"{published / ours:.1f}", f"{(published - encoding) / ours:.1f}"]
        )
        print(rows[-1], flush=True)
    header = [
        "network",
        "batch",
        "LFM's step",
        "encoding alone",
        "ours, from the cache",
        "speedup",
        "speedup without encoding",
    ]
    print(f"\n{markdown_table(header, rows)}")
    if options.output or not options.networks:
        draw_picture(results, options.output or Path("docs/published_step.png"))


def draw_picture(results: dict[str, dict[str, float]], path: Path) -> None:
    """Plot seconds per step, with the published step's two parts stacked."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for number, (name, seconds) in enumerate(results.items()):
        first = number == 0
        step, encoding = seconds["published"] - seconds["encoding"], seconds["encoding"]
        axis.barh(f"{name}, LFM", encoding, color="C0", label="encoding" if first else None)
        axis.barh(f"{name}, LFM", step, left=encoding, color="C1", label="the step itself" if first else None)
        axis.barh(f"{name}, ours", seconds["ours"], color="C2", label="ours, from the cache" if first else None)
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
