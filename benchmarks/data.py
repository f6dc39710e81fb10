"""Claim: the latent cache supplies images 20 times as fast as DiT-S/2 trains on them, and is built at the encoder's speed.

    python -m benchmarks.data [--gigabytes 8] [--images 20] [--folder saved_info/benchmarks/data] [--keep]

Reading: shuffled batches of 16 are read from a cache of random moments, first with the shards dropped from the page cache
(posix_fadvise after fsync; bytes read from the disk are counted), then with all shards in the page cache. For comparison, the
same run times a step of `TrainingState.advance` with --precision bf16 --compile.

Building: `build_latent_cache` encodes photographs from scikit-image and scikit-learn, cropped to 256 x 256 pixels and saved
as PNG files. The encoder has Stable Diffusion's architecture and random weights. Builds alternate with the encoder alone on
as many images in memory, in bfloat16, with the same chunks and allocator settings.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks._latents import new_autoencoder, open_random_cache, write_random_cache
from benchmarks._timing import compare, markdown_table
from benchmarks.training_step import CASES, OurStep, peak
from datasets_prep.cached_moments import LatentCache
from datasets_prep.datasets import DatasetOptions, ImageDataset, open_dataset
from datasets_prep.latent_cache import build_latent_cache
from models.autoencoders.coding import encode_pixels
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.pretrained import PIXELS_PER_CHUNK
from models.autoencoders.protocol import Autoencoder
from runtime.precision import Machine, keep_freed_memory

STEP = "DiT-S/2"
BATCH = CASES[STEP].batch_size
COLD, WARM = 4096, 1 << 16  # images read per round
SIDE = 256
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
MACHINE = Machine(torch.device("cpu"), "bf16")


def drop_from_page_cache(folder: Path) -> None:
    """Write the files in `folder` back to the disk and drop them from the page cache. They must not be memory-mapped."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_page_cache(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def bytes_from_disk() -> int:
    """Bytes that this process has read from the disk since it started."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def reading_rate(cache: LatentCache, count: int, seed: int) -> float:
    """Images per second when reading shuffled batches; half of the images are mirrored."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(cache), generator=generator)[:count]
    mirrored = torch.rand(count, generator=generator) < 0.5
    started = time.perf_counter()
    for chosen, flips in zip(order.split(BATCH), mirrored.split(BATCH), strict=True):
        cache.moments(chosen, flips)
    return count / (time.perf_counter() - started)


def measure_reading(folder: Path, size: int, rounds: int) -> tuple[dict[str, float], float]:
    """Images per second with a cold and a warm page cache, and bytes read from the disk per image when cold."""
    count = write_random_cache(folder, size)
    print(f"wrote {count} images, {size / 1e9:.1f} GB", flush=True)
    rates: dict[str, list[float]] = {"cold": [], "warm": []}
    read = 0
    for seed in range(rounds):
        drop_from_page_cache(folder)
        before = bytes_from_disk()
        rates["cold"].append(reading_rate(open_random_cache(folder, count), COLD, seed))
        read += bytes_from_disk() - before
    read_into_page_cache(folder)
    for seed in range(rounds):
        rates["warm"].append(reading_rate(open_random_cache(folder, count), WARM, seed))
    return {state: statistics.median(values) for state, values in rates.items()}, read / (rounds * COLD)


def consumption(rounds: int) -> float:
    """Images per second that training consumes."""
    case = CASES[STEP]
    step = OurStep(case)
    return case.batch_size / compare({"step": step}, rounds)["step"]


def write_photographs(folder: Path, count: int) -> None:
    """Save random square crops of photographs, resized to SIDE x SIDE pixels, as PNG files."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(image) for image in load_sample_images().images]
    pictures += [Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS]
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(generator.integers(SIDE, min(picture.size) + 1))
        left, top = (int(generator.integers(length - side + 1)) for length in picture.size)
        square = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        square.save(folder / f"{number:05d}.png")


def measure_building(folder: Path, count: int, rounds: int) -> tuple[dict[str, float], int]:
    """Seconds per variant, and the number of images encoded: `count` images and their mirror images."""
    write_photographs(folder / "train", count)
    dataset = open_dataset(DatasetOptions("folder", str(folder), SIDE), "train")
    autoencoder = new_autoencoder()
    images = torch.stack([dataset[index] for index in range(len(dataset))])
    pixels = images_to_pixels(images).contiguous(memory_format=torch.channels_last)

    def build() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        build_latent_cache(folder / "cache", dataset, autoencoder, MACHINE)

    keep_freed_memory()  # the scripts' setting
    seconds = compare({"building": build, "encoder alone": lambda: encode(autoencoder, pixels)}, rounds)
    return seconds | {"reading": _seconds_of_reading(dataset)}, 2 * len(dataset)


@torch.no_grad()
def encode(autoencoder: Autoencoder, pixels: torch.Tensor) -> None:
    """Encode every image twice, once for each orientation in the cache."""
    with MACHINE.autocast():
        for chunk in pixels.split(PIXELS_PER_CHUNK // SIDE**2):
            for _ in range(2):
                encode_pixels(autoencoder.network, chunk)


def _seconds_of_reading(dataset: ImageDataset) -> float:
    started = time.perf_counter()
    for index in range(len(dataset)):
        dataset[index]
    return time.perf_counter() - started


def draw_picture(reading: dict[str, float], building: dict[str, float], path: Path) -> None:
    """Plot images per second: reading next to training, and building next to the encoder alone."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, rates, title in zip(axes, (reading, building), ("from the cache", "into the cache"), strict=True):
        bars = axis.bar(list(rates), list(rates.values()), 0.6)
        axis.bar_label(bars, fmt=lambda rate: f"{rate:.3g}" if rate < 100 else f"{rate:,.0f}")
        axis.margins(y=0.12)
        axis.set_ylabel("images per second")
        axis.set_title(title)
    axes[0].set_yscale("log")
    axes[0].axhline(20 * reading[STEP], color="grey", linewidth=1, linestyle="--")
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print a table each for reading and building, and plot both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8, help="size of the random moments; default: 8")
    parser.add_argument("--images", type=int, default=20, help="images to encode, each twice; default: 20")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per measurement; default: 5")
    parser.add_argument(
        "--folder", type=Path, default=Path("saved_info/benchmarks/data"), help="folder for the moments"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the moments afterwards")
    parser.add_argument("--output", type=Path, default=Path("docs/data.png"), help="picture to write")
    options = parser.parse_args()
    print(f"bfloat16 peak {peak() / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads", flush=True)
    try:
        rates, from_disk = measure_reading(options.folder, int(options.gigabytes * 1e9), options.rounds)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    taken = consumption(options.rounds)
    rows = [[state, f"{rate:,.0f}", f"{rate / taken:,.0f}"] for state, rate in rates.items()]
    print(
        f"\n{STEP} trains at {taken:.0f} images/s; a cold read takes {from_disk / 1e3:.0f} kB per image from the disk\n"
    )
    print(markdown_table(["page cache", "images/s", f"relative to {STEP} training"], rows), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        seconds, encoded = measure_building(Path(folder), options.images, options.rounds)
    alone, building = (encoded / seconds[side] for side in ("encoder alone", "building"))
    print(f"\nencoded {encoded} images; reading the image files alone takes {seconds['reading']:.2f} s\n")
    row = [f"{alone:.2f}", f"{building:.2f}", f"{100 * building / alone:.0f} %"]
    print(
        markdown_table(
            ["encoder alone, images/s", "building the cache, images/s", "share of the encoder's speed"], [row]
        )
    )
    draw_picture({STEP: taken, **rates}, {"encoder alone": alone, "building": building}, options.output)


if __name__ == "__main__":
    main()
