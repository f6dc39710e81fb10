"""Encode a dataset's images into latent caches, for training on that dataset or on latent_imagenet_256.

    python -m datasets_prep.build_latents --dataset imagenet_256 --datadir DIR --image_size 256 --num_workers 8

With --num_process_per_node N, the GPUs share the work. After an interruption, repeat the command to resume.
"""

from pathlib import Path

from datasets_prep.datasets import HELD_OUT_IMAGES, DatasetOptions, FlipOptions, choose_flips, open_dataset
from datasets_prep.folder_layout.report import show_data
from datasets_prep.latent_cache import LatentCacheOptions, build_latent_cache, open_latent_cache
from datasets_prep.moments import choose_cache_folder, measure_scale
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.protocol import UNMEASURED
from options import Options, UsageError
from runtime.distributed import Processes
from runtime.messages import show
from runtime.precision import PrecisionOptions, choose_machine
from runtime.processes.launch import run_script

__all__ = ["GROUPS", "main"]


GROUPS = (DatasetOptions, FlipOptions, LatentCacheOptions, AutoencoderOptions, PrecisionOptions)


def main(options: Options, processes: Processes) -> None:
    """Build the latent caches of the training split and of the first HELD_OUT_IMAGES validation images."""
    data, caches = options[DatasetOptions], options[LatentCacheOptions]
    machine = choose_machine(options[PrecisionOptions], processes)
    with processes.main_first():
        train, held_out = (
            choose_flips(open_dataset(data, split), options[FlipOptions]) for split in ("train", "validation")
        )
        show_data(train, held_out)
        held_out = held_out.head(HELD_OUT_IMAGES)
        autoencoder = load_autoencoder(options[AutoencoderOptions], train.facts.channels)
    if autoencoder.is_pixel_space:
        raise UsageError("--pretrained_autoencoder_ckpt none means pixel space, without latents: name an autoencoder")
    autoencoder = autoencoder.to(machine.device)
    for dataset in (train, held_out):
        folder = processes.from_main(
            choose_cache_folder(dataset, autoencoder, data, caches) if processes.is_main else Path()
        )
        build_latent_cache(folder, dataset, autoencoder, machine, processes, caches.num_workers)
        if dataset is train and autoencoder.describe().statistics == UNMEASURED:
            measure_scale(open_latent_cache(folder, dataset, autoencoder), autoencoder, dataset.facts.flips, processes)
        show(f"{folder}: {len(dataset)} {dataset.split} images of {data.dataset}")


if __name__ == "__main__":
    run_script(main, str(__doc__).splitlines()[0], GROUPS)
