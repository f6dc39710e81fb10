"""Question: how fast does each architecture train an autoencoder, and how good is it after the same time?

    python -m benchmarks.autoencoder_speed --datadir /path/to/images [--image_size 64] [--seconds 300] [--num_threads N]

Trains the variants in alternating turns, on the same images, and measures the PSNR of the same held-out images after each turn.
Speeds and times are processor time. The printed table has images per second, PSNR after all turns, and the time to each of
--targets dB. Without --datadir, the images are scikit-learn's two photographs, cut into tiles.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks._timing import markdown_table, processor_seconds
from datasets_prep.datasets import DatasetOptions, ImageDataset, open_dataset
from datasets_prep.tiles.__main__ import cut_tiles
from exits import exit_cleanly
from runtime.distributed import Processes
from runtime.precision import Machine
from training.autoencoder.data import pixel_batches
from training.autoencoder.run import autoencoder_options
from training.autoencoder.setup import AutoencoderRun, initial_state, prepare

STEPS = 10**6  # more than any benchmark takes
# Flags of train_autoencoder.py. The learning rate is constant after the warmup, so all turns are alike.
VARIANTS: dict[str, dict[str, Any]] = {
    "kl, AdamW": {"architecture": "kl", "widths": (32, 64, 128)},
    "kl, Muon": {"architecture": "kl", "widths": (32, 64, 128), "optimizer": "muon", "batch_size": 16},
    "dc, AdamW": {"architecture": "dc", "widths": (32, 64), "depths": (1, 2), "optimizer": "adamw", "batch_size": 32},
    "dc, Muon": {"architecture": "dc", "widths": (32, 64), "depths": (1, 2)},
}


class Contestant:
    """A variant in training."""

    def __init__(self, name: str, train: ImageDataset, held_out: ImageDataset, folder: str) -> None:
        options = autoencoder_options(
            **VARIANTS[name], output=f"{folder}/{len(name)}", max_steps=STEPS, lr_schedule="constant", ema_decay=0.99
        )
        self.name = name
        self.run: AutoencoderRun = prepare(train, held_out, options, Machine(torch.device("cpu")), Processes())
        self.state = initial_state(self.run, resume=False)
        self.seconds = 0.0
        self.history: list[tuple[float, float]] = []  # processor seconds, PSNR in dB
        self._batches: Iterator[Any] = pixel_batches(
            self.run.images,
            channels=train.facts.channels,
            augmentations=(),
            batch_size=options.batch_size,
            first_step=0,
            last_step=STEPS,
            seed=0,
            device=self.run.machine.device,
            processes=Processes(),
        )

    def step(self) -> None:
        """Take a training step."""
        rate = self.run.training.rate_at(self.state.step, STEPS)
        self.state.advance(self.run.loss_step, next(self._batches), rate)

    def turn(self, seconds: float) -> None:
        """Train for some processor time, and measure."""
        used = 0.0
        while used < seconds:
            used += processor_seconds(self.step)
        self.seconds += used
        found = self.run.held_out.measure(self.state.ema.network, self.state.step)
        self.history.append((self.seconds, found["psnr_db"]))

    def row(self, targets: list[float]) -> list[str]:
        """The table's row."""
        speed = self.state.step * self.run.training.batch_size / self.seconds
        reached = [next((s for s, psnr in self.history if psnr >= target), None) for target in targets]
        times = ["not reached" if s is None else f"{s:.0f} s" for s in reached]
        return [self.name, f"{speed:.0f}", f"{self.history[-1][1]:.1f}", *times]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datadir", default="", help="folder of images; default: tiles of two photographs")
    parser.add_argument("--image_size", type=int, default=64, help="side in pixels; default: 64")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of each variant; default: 300")
    parser.add_argument("--turns", type=int, default=12, help="turns of each variant; default: 12")
    parser.add_argument("--targets", type=float, nargs="+", default=[20, 22, 24, 26], help="PSNR in dB")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="default: all")
    parser.add_argument("--num_threads", type=int, default=1, help="threads; default: 1")
    own = parser.parse_args()
    torch.set_num_threads(own.num_threads)
    with tempfile.TemporaryDirectory() as folder:
        source = own.datadir or _photographs(Path(folder) / "tiles", own.image_size)
        data = DatasetOptions(dataset="folder", datadir=str(source), image_size=own.image_size)
        train, held_out = open_dataset(data, "train"), open_dataset(data, "validation")
        contestants = [Contestant(name, train, held_out, folder) for name in own.variants]
        for _ in range(own.turns):
            for contestant in contestants:
                contestant.turn(own.seconds / own.turns)
    header = ["variant", "images/s", "PSNR, dB", *(f"time to {target:g} dB" for target in own.targets)]
    print(f"\n{len(train):,} images of {own.image_size} x {own.image_size}; {own.num_threads} threads\n")
    print(markdown_table(header, [contestant.row(own.targets) for contestant in contestants]))


def _photographs(folder: Path, size: int) -> Path:
    """Cut scikit-learn's photographs into tiles."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    for number, image in enumerate(load_sample_images().images):
        for index, tile in enumerate(cut_tiles(Image.fromarray(image), size, (size, 2 * size, 4 * size))):
            tile.save(folder / f"{number}_{index}.png")
    return folder


if __name__ == "__main__":
    exit_cleanly(main)
