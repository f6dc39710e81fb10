"""Encode a dataset's images into latent caches, which a training finds, or reads as latent_imagenet_256.

    python -m datasets_prep.build_latents --dataset imagenet_256 --datadir DIR --image_size 256 --num_workers 8

Start it with torchrun to share the work between GPUs, and again after an interruption to go on.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets_prep.datasets import DatasetOptions, open_dataset
from datasets_prep.latent_cache import LatentCacheOptions, build_latent_cache, cache_folder
from models.autoencoder import AutoencoderOptions, PixelSpace, load_autoencoder
from options import UsageError, exit_cleanly, option, parse_options
from runtime.distributed import start_processes
from runtime.precision import MachineOptions, choose_machine

__all__ = ["BuildLatentsOptions", "main"]


@dataclass(frozen=True)
class BuildLatentsOptions:
    """Encoding."""

    validation_images: int = option(2048, "the first so many validation images: a training looks at 2048", minimum=1)


def main() -> None:
    """Parse the flags and build the cache of each split."""
    groups = [BuildLatentsOptions, DatasetOptions, LatentCacheOptions, AutoencoderOptions, MachineOptions]
    options = parse_options(str(__doc__).splitlines()[0], groups)
    data, caches = options[DatasetOptions], options[LatentCacheOptions]
    processes = start_processes()
    machine = choose_machine(options[MachineOptions], processes.local_rank)
    with processes.main_first():
        train = open_dataset(data, "train")
        held_out = open_dataset(data, "validation").head(options[BuildLatentsOptions].validation_images)
    autoencoder = load_autoencoder(options[AutoencoderOptions], train.facts.channels)
    if isinstance(autoencoder, PixelSpace):
        raise UsageError("--pretrained_autoencoder_ckpt none makes no latents: name an autoencoder")
    autoencoder = autoencoder.to(machine.device)
    root = Path(caches.latent_cache_dir or Path(data.datadir) / "latent_cache")
    for dataset in (train, held_out):
        folder = cache_folder(root, dataset, autoencoder)
        build_latent_cache(folder, dataset, autoencoder, machine, processes, caches.num_workers)
        if processes.is_main:
            print(f"{folder}: {len(dataset)} {dataset.split} images of {data.dataset}")
    processes.stop()


if __name__ == "__main__":
    exit_cleanly(main)
