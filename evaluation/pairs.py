"""Metrics for image pairs, such as inpainted images and their originals.

PSNR, SSIM (Wang et al. 2004) and LPIPS (Zhang et al. 2018) compare each image with its partner. P-IDS and U-IDS (Zhao et al.
2021, arXiv:2103.10428, section 4.3) fit a linear support vector machine that separates the Inception features of generated and
real images. U-IDS is its error rate. P-IDS is the fraction of generated images that it rates more real than their originals.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from skimage.metrics import structural_similarity
from sklearn.svm import LinearSVC

from evaluation.features.weights import download_weights, read_weights_file
from evaluation.metrics import psnr
from evaluation.sources import ImageSource
from models.autoencoders.losses.perceptual import BACKBONES, build_lpips
from models.autoencoders.pixels import images_to_pixels
from options import UsageError
from runtime.distributed import Processes

__all__ = ["SMALLEST_FOR_LPIPS", "SSIM_WINDOW", "PixelScores", "discriminative_scores", "load_lpips", "pair_by_name"]

MAX_LISTED_NAMES = 10  # in an error message
SSIM_WINDOW = 7  # pixels; scikit-image's default
SMALLEST_FOR_LPIPS = BACKBONES["alex"].smallest
ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to 8 bits; gives identical images a finite PSNR, 58.9 dB

# Maps two batches of pixels [B, 3, H, W] to distances [B, ...].
Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pair_by_name(generated: ImageSource, real: ImageSource) -> list[tuple[int, int]]:
    """Pair the images of two folders by file name, ignoring suffixes.

    Returns:
        The indices (generated, real) of each pair.

    Raises:
        UsageError: an image has no partner, or a folder has several images with the same name.
    """
    for source in (generated, real):
        _require_none(
            [name for name, count in Counter(source.names).items() if count > 1],
            f"{source.name} has several images named",
        )
    _require_none(sorted(set(generated.names) - set(real.names)), f"{real.name} has no image named")
    _require_none(sorted(set(real.names) - set(generated.names)), f"{generated.name} has no image named")
    real_index = {name: index for index, name in enumerate(real.names)}
    return [(index, real_index[name]) for index, name in enumerate(generated.names)]


class PixelScores:
    """Accumulates the mean PSNR in dB, the mean SSIM and, with `perceptual`, the mean LPIPS of image pairs."""

    def __init__(self, perceptual: Perceptual | None = None) -> None:
        self._perceptual = perceptual
        self._values: dict[str, list[float]] = {"psnr": [], "ssim": []}

    def update(self, generated: torch.Tensor, real: torch.Tensor) -> None:
        """Add pairs of images uint8 [B, C, H, W].

        Raises:
            UsageError: the partners differ in size, or are smaller than SSIM's window.
        """
        if generated.shape != real.shape:
            raise UsageError(
                f"cannot compare images of different sizes: (height, width) is {tuple(generated.shape[2:])} for generated and "
                f"{tuple(real.shape[2:])} for real images; use --image_size to resize both to the same size"
            )
        if min(generated.shape[2:]) < SSIM_WINDOW:
            height, width = generated.shape[2:]
            raise UsageError(
                f"SSIM needs at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels, but the images are {width} x {height}"
            )
        for a, b in zip(generated.numpy(), real.numpy(), strict=True):
            error = float(np.square(a.astype(np.float64) - b).mean())
            self._values["psnr"].append(psnr(error or ROUNDING_ERROR, value_range=255))
            self._values["ssim"].append(float(structural_similarity(a, b, channel_axis=0, data_range=255)))
        if self._perceptual is not None:
            distances = self._perceptual(images_to_pixels(generated), images_to_pixels(real))
            self._values.setdefault("lpips", []).extend(distances.flatten().tolist())

    def merge_all(self, processes: Processes) -> None:
        """Collect the scores of all processes in the main process."""
        for values in processes.gather(self._values)[1:]:
            for name, column in values.items():
                self._values.setdefault(name, []).extend(column)

    def result(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard error of each score. The standard error of a single pair is None."""
        return {name: _mean_and_error(np.array(values)) for name, values in self._values.items()}


def discriminative_scores(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Compute P-IDS and U-IDS from features [N, D] whose rows are paired."""
    rows, is_real = np.concatenate([generated, real]), np.repeat([0, 1], [len(generated), len(real)])
    machine = LinearSVC(dual=False).fit(rows, is_real)
    fake, true = machine.decision_function(generated), machine.decision_function(real)
    return {
        "p_ids": float((fake > true).mean()),
        "u_ids": float(((fake > 0).mean() + (true <= 0).mean()) / 2),
    }


def load_lpips(weights_file: str | None, device: torch.device | str) -> Perceptual:
    """Load LPIPS with AlexNet. The linear layers' weights come with the package lpips.

    Args:
        weights_file: torchvision's state dict of AlexNet. None: downloaded once.
        device: where the network runs.

    Raises:
        UsageError: the package lpips is not installed, or the weights are missing, invalid or cannot be downloaded.
    """

    def read_weights() -> dict[str, torch.Tensor]:
        if weights_file is not None:
            return read_weights_file(weights_file)
        return download_weights(BACKBONES["alex"].url, "AlexNet", "--lpips_weights", check_hash=True)

    network = build_lpips(
        "alex", "--lpips" if weights_file is None else f"--lpips_weights {weights_file}", read_weights
    )
    network = network.to(device)

    @torch.inference_mode()
    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return network(a.to(device), b.to(device))

    return distances


def _require_none(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
        raise UsageError(f"cannot pair the images by name: {what} {', '.join(names[:MAX_LISTED_NAMES])}{more}")


def _mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
