"""Scores of image pairs, such as inpainted images and what was there before.

PSNR, SSIM (Wang et al. 2004) and LPIPS (Zhang et al. 2018) compare each image with its partner. P-IDS and U-IDS (Zhao et
al. 2021, arXiv:2103.10428, section 4.3) ask a linear support vector machine, fitted to the Inception features of both sets, to
tell them apart: U-IDS is the share it gets wrong, P-IDS that of fakes which look more real to it than their own originals.
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
from models.autoencoders.pixels import images_to_pixels
from options import UsageError
from runtime.distributed import Processes

__all__ = ["PixelScores", "discriminative_scores", "load_lpips", "pair_by_name"]

NAMED = 10  # files in a message
ROUNDING_ERROR = 1 / 12  # mean square, of rounding to 8 bits: images that are alike have its PSNR, 58.9 dB
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"

Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # pixels [B, 3, H, W], twice, to distances [B, ...]


def pair_by_name(generated: ImageSource, real: ImageSource) -> list[tuple[int, int]]:
    """The places in both folders of the images of one name; the names' suffixes do not count.

    Raises:
        UsageError: an image of one folder has no partner in the other, or shares its name.
    """
    for source in (generated, real):
        _refuse(
            [name for name, count in Counter(source.names).items() if count > 1],
            f"{source.name} has several images named",
        )
    _refuse(sorted(set(generated.names) - set(real.names)), f"{real.name} lacks the partners of")
    _refuse(sorted(set(real.names) - set(generated.names)), f"{generated.name} lacks the partners of")
    place = {name: index for index, name in enumerate(real.names)}
    return [(index, place[name]) for index, name in enumerate(generated.names)]


class PixelScores:
    """Means over image pairs of PSNR in dB, SSIM and, where `perceptual` is given, LPIPS."""

    def __init__(self, perceptual: Perceptual | None = None) -> None:
        self._perceptual = perceptual
        self._values: dict[str, list[float]] = {"psnr": [], "ssim": []}

    def update(self, generated: torch.Tensor, real: torch.Tensor) -> None:
        """Add pairs of images uint8 [B, C, H, W].

        Raises:
            UsageError: partners of different sizes.
        """
        if generated.shape != real.shape:
            raise UsageError(
                f"cannot compare images of different sizes: generated {tuple(generated.shape[2:])}, real "
                f"{tuple(real.shape[2:])} (height, width); bring both to one --image_size"
            )
        for a, b in zip(generated.numpy(), real.numpy(), strict=True):
            error = float(np.square(a.astype(np.float64) - b).mean())
            self._values["psnr"].append(psnr(error or ROUNDING_ERROR, value_range=255))
            self._values["ssim"].append(float(structural_similarity(a, b, channel_axis=0, data_range=255)))
        if self._perceptual is not None:
            distances = self._perceptual(images_to_pixels(generated), images_to_pixels(real))
            self._values.setdefault("lpips", []).extend(distances.flatten().tolist())

    def merge_all(self, processes: Processes) -> None:
        """Let the main process have the scores of all processes."""
        for values in processes.gather(self._values)[1:]:
            for name, column in values.items():
                self._values.setdefault(name, []).extend(column)

    def result(self) -> dict[str, tuple[float, float | None]]:
        """Each score's mean and standard error (None: of one pair)."""
        return {name: _mean(np.array(values)) for name, values in self._values.items()}


def discriminative_scores(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """P-IDS and U-IDS of features [N, D], paired row by row."""
    rows, is_real = np.concatenate([generated, real]), np.repeat([0, 1], [len(generated), len(real)])
    machine = LinearSVC(dual=False).fit(rows, is_real)
    fake, true = machine.decision_function(generated), machine.decision_function(real)
    return {
        "p_ids": float((fake > true).mean()),
        "u_ids": float(((fake > 0).mean() + (true <= 0).mean()) / 2),
    }


def load_lpips(weights_file: str | None, device: torch.device | str) -> Perceptual:
    """LPIPS with AlexNet and the weights of its authors' package; AlexNet's own come from a file or are downloaded.

    Args:
        weights_file: torchvision's state dict of AlexNet.
        device: where the network runs.

    Raises:
        UsageError: the package lpips is not installed, or weights that are missing or foreign.
    """
    try:
        import lpips
    except ImportError as error:
        raise UsageError("--lpips needs the package lpips: pip install lpips") from error
    weights = (
        download_weights(ALEXNET_URL, "AlexNet", check_hash=True)
        if weights_file is None
        else read_weights_file(weights_file)
    )
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    layers = {name.partition(".")[2]: parameter for name, parameter in network.net.named_parameters()}
    try:
        for name, parameter in layers.items():  # "0.weight" of the slices is "features.0.weight" of AlexNet
            parameter.data.copy_(weights[f"features.{name}"])
    except (KeyError, RuntimeError) as error:
        raise UsageError(f"{weights_file} is no state dict of torchvision's AlexNet: {error}") from error
    network = network.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return network(a.to(device), b.to(device))

    return distances


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise UsageError(f"the sets are not paired: {what} {', '.join(names[:NAMED])}{more}")


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
