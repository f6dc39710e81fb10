"""Measure how well an autoencoder reconstructs a dataset's held-out images, by PSNR and by scores such as the FID.

    python -m evaluation.reconstruction --dataset fashion_mnist --datadir data --pretrained_autoencoder_ckpt FOLDER

Images are decoded from their posterior means and rounded to 8 bits, as samples are. Rounding alone limits the PSNR to 59 dB.
Padding that the dataset added is cropped before measuring. The reconstructions and the original held-out images are both scored
against the training images. The reconstructions' score is the floor for any latent model. The originals' score is the best
score to expect from perfect samples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from command_line import parse_options
from datasets_prep.datasets import (
    DatasetFacts,
    DatasetOptions,
    ImageDataset,
    crop_padding,
    like_originals,
    open_dataset,
)
from evaluation.features.protocol import FeatureNetwork, describe_features
from evaluation.features.registry import FeatureOptions, choose_features
from evaluation.metrics import check_counts, psnr
from evaluation.reference import summarise
from evaluation.score import MetricOptions, needs_of, reference_statistics, result_line, score_summaries
from evaluation.sources import ImageSource, dataset_source, image_batches
from evaluation.summary import Gatherer, Summary
from exits import exit_cleanly
from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pixels import decode_images, images_to_pixels
from models.autoencoders.protocol import Autoencoder
from options import option
from runtime.files import write_json
from runtime.finite import require_finite
from runtime.messages import labeled, show_result
from runtime.outputs import check_file
from runtime.pictures import save_sheet
from runtime.precision import DeviceOptions, Machine, choose_device

__all__ = [
    "PICTURED",
    "Compared",
    "ReconstructionOptions",
    "compare_images",
    "draw_reconstructions",
    "measure_reconstruction",
    "reconstruct",
]

PICTURED = 16  # images


@dataclass(frozen=True)
class ReconstructionOptions:
    """Reconstruction."""

    batch_size: int = option(200, "images per batch", minimum=1)
    output_json: str | None = option(None, "JSON file for the result")
    picture: str | None = option(None, "PNG file for a picture of originals above their reconstructions")


def reconstruct(autoencoder: Autoencoder, images: torch.Tensor) -> torch.Tensor:
    """Encode images uint8 [B, C, H, W] and decode their posterior means to uint8 [B, C, H, W] on the same device.

    Raises:
        UsageError: more than a few are not finite. A few cause a warning.
    """
    decoded, finite = decode_images(autoencoder, autoencoder.sample(autoencoder.encode(images)))
    require_finite(finite, "reconstructions of a batch")
    return decoded


class Compared(NamedTuple):
    """Images and their reconstructions uint8 [B, C, H, W] without padding, and the sum of squared errors of the pixels."""

    original: torch.Tensor
    decoded: torch.Tensor
    squared_error: float


def compare_images(autoencoder: Autoencoder, images: torch.Tensor, facts: DatasetFacts) -> Compared:
    """Reconstruct images uint8 [B, C, H, W] of a dataset with these facts, and compare them without padding."""
    original, decoded = crop_padding(images, facts), like_originals(reconstruct(autoencoder, images), facts)
    return Compared(original, decoded, _squared_error(decoded, original))


def measure_reconstruction(
    autoencoder: Autoencoder,
    dataset: ImageDataset,
    features: FeatureNetwork,
    device: torch.device | str,
    batch_size: int,
    needs: Iterable[str] = ("moments",),
) -> tuple[float, Summary]:
    """Reconstruct all images of a split.

    Args:
        autoencoder: the autoencoder to measure.
        dataset: the split.
        features: the feature network.
        device: where the autoencoder runs.
        batch_size: images per batch.
        needs: keys of evaluation.summary.NEEDS.

    Returns:
        The PSNR in dB over all pixels of all images, and the summary of the reconstructions.
    """
    gatherer, error, count = Gatherer(features, needs), 0.0, 0
    padded = ImageSource(dataset.facts.name, len(dataset), dataset.__getitem__, {})
    for batch, _ in image_batches(padded, batch_size):
        compared = compare_images(autoencoder, batch.to(device), dataset.facts)
        error += compared.squared_error
        count += compared.original.numel()
        gatherer.update(compared.decoded)
    return psnr(error / count), gatherer.summary()


def draw_reconstructions(
    autoencoder: Autoencoder, dataset: ImageDataset, device: torch.device | str, path: str | Path
) -> float:
    """Write a PNG of PICTURED images, evenly spaced in the split, above their reconstructions.

    Returns:
        The PSNR of the drawn images in dB.
    """
    count = min(PICTURED, len(dataset))
    images = torch.stack([dataset[number * len(dataset) // count] for number in range(count)]).to(device)
    compared = compare_images(autoencoder, images, dataset.facts)
    save_sheet(torch.cat([compared.original, compared.decoded]).cpu(), path, count)
    return psnr(compared.squared_error / compared.original.numel())


def main() -> None:
    """Measure the reconstructions, print the result, and write the requested files."""
    groups = [ReconstructionOptions, DatasetOptions, AutoencoderOptions, MetricOptions, FeatureOptions, DeviceOptions]
    options = parse_options(str(__doc__).splitlines()[0], groups)
    settings, data = options[ReconstructionOptions], options[DatasetOptions]
    check_file(settings.output_json, "--output_json")
    check_file(settings.picture, "--picture")
    device = choose_device(options[DeviceOptions])
    train, held_out = open_dataset(data, "train"), open_dataset(data, "validation")
    metrics = options[MetricOptions].metrics
    check_counts(metrics, len(held_out), len(train))
    autoencoder = load_autoencoder(options[AutoencoderOptions], held_out.facts.channels).to(device)
    features = choose_features(options[FeatureOptions], data.dataset, Machine(device, "fp32"))

    if settings.picture:
        draw_reconstructions(autoencoder, held_out, device, settings.picture)
    cache = data.derived / "statistics"
    reference = reference_statistics(train, features, data.derived, metrics)
    needs = needs_of(metrics, reference=False)
    real = summarise(dataset_source(held_out), features, needs, cache, settings.batch_size)
    ratio, decoded = measure_reconstruction(autoencoder, held_out, features, device, settings.batch_size, needs)
    scores, scores_real = (score_summaries(metrics, images, reference) for images in (decoded, real))
    result = {
        "dataset": data.dataset,
        "images": len(held_out),
        "reference_images": len(train),
        "autoencoder": autoencoder.describe(),
        "psnr_db": ratio,
        "features": describe_features(features),
        "reconstructions": scores,
        "real": scores_real,
    }
    lines = [
        labeled("PSNR", f"{ratio:.2f} dB on {result['images']:,} held-out images of {data.dataset}"),
        labeled("decoded", f"{result_line(scores)} against the training images"),
        labeled("originals", f"{result_line(scores_real)} against the training images"),
    ]
    show_result("\n".join(lines), scores["warnings"])
    if settings.output_json:
        write_json(settings.output_json, result)


def _squared_error(decoded: torch.Tensor, original: torch.Tensor) -> float:
    return (images_to_pixels(decoded) - images_to_pixels(original)).double().square().sum().item()


if __name__ == "__main__":
    exit_cleanly(main)
