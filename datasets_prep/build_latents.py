"""Encode a dataset's images into latent caches, for training on that dataset or on latent_imagenet_256.

    python -m datasets_prep.build_latents --dataset imagenet_256 --datadir DIR --image_size 256 --num_workers 8

With --num_process_per_node N, the GPUs share the work. After an interruption, repeat the command to resume. With
--format lightningdit, the caches are also written as LightningDiT's latent shards.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets_prep.datasets import HELD_OUT_IMAGES, DatasetOptions, FlipOptions, choose_flips, open_dataset
from datasets_prep.folder_layout.report import show_data
from datasets_prep.formats.latent_shards import write_latent_shards
from datasets_prep.latent_cache import LatentCacheOptions, build_latent_cache, open_latent_cache
from datasets_prep.latents import LatentDataset
from datasets_prep.moments import choose_cache_folder, measure_scale
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED
from models.autoencoders.statistics import LatentStatistics
from options import Options, UsageError, option
from runtime.distributed import Processes
from runtime.messages import show
from runtime.precision import PrecisionOptions, choose_machine
from runtime.processes.launch import run_script

__all__ = ["GROUPS", "main"]


@dataclass(frozen=True)
class FormatOptions:
    """Format."""

    format: str = option(
        "cache",
        "lightningdit: also write latents_rank<r>_shard<s>.safetensors and latents_stats.pt",
        choices=("cache", "lightningdit"),
    )
    latent_shards_dir: str = option("", "folder of these files; default: lightningdit below --datadir")


GROUPS = (DatasetOptions, FlipOptions, LatentCacheOptions, FormatOptions, AutoencoderOptions, PrecisionOptions)


def main(options: Options, processes: Processes) -> None:
    """Build the latent caches of the training split and of the first HELD_OUT_IMAGES validation images."""
    data, caches, written = options[DatasetOptions], options[LatentCacheOptions], options[FormatOptions]
    machine = choose_machine(options[PrecisionOptions], processes)
    with processes.main_first():
        train, held_out = (
            choose_flips(open_dataset(data, split), options[FlipOptions]) for split in ("train", "validation")
        )
        show_data(train, held_out)
        if isinstance(train, LatentDataset):
            raise UsageError(f"{data.datadir} holds latents already: name a dataset of images")
        held_out = held_out.head(HELD_OUT_IMAGES)
        autoencoder = load_autoencoder(options[AutoencoderOptions], train.facts.channels)
    if autoencoder.is_pixel_space:
        raise UsageError("--pretrained_autoencoder_ckpt none means pixel space, without latents: name an autoencoder")
    autoencoder = autoencoder.to(machine.device)
    statistics: LatentStatistics | None = None  # of the training latents
    for dataset in (train, held_out):
        folder = processes.from_main(
            choose_cache_folder(dataset, autoencoder, data, caches) if processes.is_main else Path()
        )
        build_latent_cache(folder, dataset, autoencoder, machine, processes, caches.num_workers)
        if dataset is train and autoencoder.describe().statistics == UNMEASURED:
            measure_scale(open_latent_cache(folder, dataset, autoencoder), autoencoder, dataset.facts.flips, processes)
        show(f"{folder}: {len(dataset)} {dataset.split} images of {data.dataset}")
        if written.format == "lightningdit" and processes.is_main:
            shards = Path(written.latent_shards_dir or data.derived / "lightningdit") / dataset.split
            source = open_latent_cache(folder, dataset, autoencoder)
            flips = dataset.facts.flips
            statistics = write_latent_shards(shards, source, autoencoder, dataset.split, flips, statistics)
            show(f"{shards}: LightningDiT's latents of {len(dataset)} {dataset.split} images")


if __name__ == "__main__":
    run_script(main, str(__doc__).splitlines()[0], GROUPS)
