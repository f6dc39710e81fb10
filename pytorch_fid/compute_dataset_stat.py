#!/usr/bin/env python
"""Save a dataset's feature statistics as .npz, for fid_score.py or any program that reads the arrays `mu` and `sigma`.

Example: python pytorch_fid/compute_dataset_stat.py --dataset ffhq_256 --datadir data --image_size 256
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from command_line import parse_options
    from datasets_prep.datasets import DatasetOptions, open_dataset
    from datasets_prep.folder_layout.report import show_data
    from evaluation.features.registry import FeatureOptions, choose_features
    from evaluation.reference import summarise
    from evaluation.score import IMAGE_FORMATS
    from evaluation.sources import dataset_source, transformed
    from evaluation.statistics import save_statistics
    from options import option
    from runtime.messages import show
    from runtime.outputs import check_file
    from runtime.precision import DeviceOptions, Machine, choose_device


@dataclass(frozen=True)
class StatisticsOptions:
    """Statistics."""

    output: str | None = option(None, "output file; default: pytorch_fid/<dataset>_<split>_<features>_stat.npz")
    split: str = option("train", "split of the dataset", choices=("train", "validation"))
    image_format: str = option(
        "png",
        "png: use the images as they are; jpg: compress them as JPEG first, at PIL's default quality",
        choices=IMAGE_FORMATS,
    )
    batch_size: int = option(50, "images per batch", minimum=1)


def main() -> None:
    """Compute the statistics and save them."""
    options = parse_options(str(__doc__), [StatisticsOptions, DatasetOptions, FeatureOptions, DeviceOptions])
    settings, data = options[StatisticsOptions], options[DatasetOptions]
    check_file(settings.output or Path(__file__).parent / "statistics.npz", "--output")
    machine = Machine(choose_device(options[DeviceOptions]), "fp32")
    dataset = open_dataset(data, "train" if settings.split == "train" else "validation")
    show_data(dataset)
    features = choose_features(options[FeatureOptions], data.dataset, machine)
    output = settings.output or Path(__file__).parent / f"{data.dataset}_{settings.split}_{features.name}_stat.npz"
    source = transformed(dataset_source(dataset), IMAGE_FORMATS[settings.image_format], settings.image_format)
    statistics = summarise(source, features, ("moments",), None, settings.batch_size).statistics
    assert statistics is not None
    save_statistics(output, statistics)
    show(f"saved the {features.name} statistics of {statistics.count} images to {output}")


if __name__ == "__main__":
    exit_cleanly(main)
