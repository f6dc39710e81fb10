"""How well an autoencoder reconstructs a dataset's held-out images: PSNR, and the distance of its images to real ones.

    python -m evaluation.reconstruction --dataset fashion_mnist --datadir data --pretrained_autoencoder_ckpt FOLDER

Every image is decoded from its posterior mean and rounded to 8 bits, as samples are, and measured so, without the
padding that the dataset added (rounding alone would leave 59 dB). The distance is measured to the training images: that
of the reconstructions is the floor of any latent model, that of the real held-out images the zero mark.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from datasets_prep.datasets import DatasetOptions, ImageDataset, crop_padding, open_dataset
from evaluation.features import FeatureNetwork, FeatureOptions, choose_features
from evaluation.metrics import frechet_distance, psnr
from evaluation.statistics import RunningMoments, Statistics, dataset_statistics, describe_features, image_batches
from models.autoencoder import Autoencoder, AutoencoderOptions, PixelSpace, images_to_pixels, load_autoencoder
from options import exit_cleanly, option, parse_options
from runtime.files import atomic_path, write_json
from runtime.precision import DeviceOptions, Machine, choose_device

__all__ = ["ReconstructionOptions", "measure_reconstruction", "reconstruct"]

PICTURED = 16  # images in the picture


@dataclass(frozen=True)
class ReconstructionOptions:
    """Measuring reconstructions."""

    batch_size: int = option(200, "images at a time", minimum=1)
    output_json: str | None = option(None, "file to write the result to")
    picture: str | None = option(None, "PNG file to draw to: originals above reconstructions")


def reconstruct(autoencoder: Autoencoder | PixelSpace, images: torch.Tensor) -> torch.Tensor:
    """Images uint8 [B, C, H, W], decoded from their posterior means, as uint8 [B, C, H, W] on the same device."""
    return autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))


def measure_reconstruction(
    autoencoder: Autoencoder | PixelSpace,
    dataset: ImageDataset,
    features: FeatureNetwork,
    device: torch.device | str,
    batch_size: int,
) -> tuple[float, Statistics]:
    """PSNR in dB over all pixels of all images of a split, and the statistics of the reconstructions' features."""
    moments, error, count = RunningMoments(features.dims), 0.0, 0
    for batch in image_batches(dataset, batch_size):
        images = batch.to(device)
        decoded = crop_padding(_channels_like(reconstruct(autoencoder, images), images), dataset.facts)
        original = crop_padding(images, dataset.facts)
        error += (images_to_pixels(decoded) - images_to_pixels(original)).double().square().sum().item()
        count += original.numel()
        moments.update(features(decoded))
    return psnr(error / count), moments.statistics({"features": describe_features(features)})


def main() -> None:
    """Parse the flags, measure, print a line, write what was asked for."""
    groups = [ReconstructionOptions, DatasetOptions, AutoencoderOptions, FeatureOptions, DeviceOptions]
    options = parse_options(str(__doc__).splitlines()[0], groups)
    settings, data = options[ReconstructionOptions], options[DatasetOptions]
    device = choose_device(options[DeviceOptions])
    train, held_out = open_dataset(data, "train"), open_dataset(data, "validation")
    autoencoder = load_autoencoder(options[AutoencoderOptions], held_out.facts.channels).to(device)
    features = choose_features(options[FeatureOptions], data.dataset, Machine(device, "fp32"))

    if settings.picture:
        _draw(autoencoder, held_out, device, settings.picture)
    cache = Path(data.datadir) / "statistics"
    reference, real = (dataset_statistics(split, features, cache, settings.batch_size) for split in (train, held_out))
    ratio, decoded = measure_reconstruction(autoencoder, held_out, features, device, settings.batch_size)
    result = {
        "dataset": data.dataset,
        "images": len(held_out),
        "reference_images": len(train),
        "autoencoder": autoencoder.describe(),
        "psnr_db": ratio,
        "features": describe_features(features),
        "frechet_distance": frechet_distance(decoded, reference),
        "frechet_distance_real": frechet_distance(real, reference),
    }
    if settings.output_json:
        write_json(settings.output_json, result)
    print(
        f"{result['images']} images of {data.dataset}: PSNR {ratio:.2f} dB, {features.label} to the training images "
        f"{result['frechet_distance']:.3f} (real images: {result['frechet_distance_real']:.3f}), "
        f"features {features.name} {features.sha256[:8]}"
    )


def _channels_like(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Grey again, where a grey dataset went through an autoencoder of colour images."""
    if decoded.shape[1] == images.shape[1]:
        return decoded
    return decoded.float().mean(1, keepdim=True).round().to(torch.uint8)


def _draw(autoencoder: Autoencoder | PixelSpace, dataset: ImageDataset, device: torch.device, path: str | Path) -> None:
    images = torch.stack([dataset[i] for i in range(min(PICTURED, len(dataset)))]).to(device)
    decoded = _channels_like(reconstruct(autoencoder, images), images)
    rows = [torch.cat(list(crop_padding(part, dataset.facts)), dim=2) for part in (images, decoded)]  # [C, H, N W]
    picture = torch.cat(rows, dim=1).permute(1, 2, 0).squeeze(2).cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


if __name__ == "__main__":
    exit_cleanly(main)
