"""Scoring of image pairs: streamed, or read from two folders and paired by file name (cal_inpainting.py)."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.comparison import ComparisonOptions
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, load_features
from evaluation.metrics import error_bars
from evaluation.pairs import PixelScores, discriminative_scores, load_lpips, pair_by_name
from evaluation.score import FEWEST_FOR_ERROR_BAR, IMAGE_FORMATS, ScoreOptions, needs_of, score_summaries
from evaluation.sources import ImageSource, image_batches, open_source
from evaluation.summary import Gatherer
from options import UsageError, option
from runtime.distributed import Processes

__all__ = ["Pair", "PairOptions", "compare_pairs", "score_pairs"]

TITLES = {"p_ids": "P-IDS", "u_ids": "U-IDS", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}


@dataclass(frozen=True)
class PairOptions:
    """Pairs."""

    lpips: bool = option(False, "also compute LPIPS; needs the package lpips and AlexNet's weights")
    lpips_weights: str | None = option(None, "file with torchvision's AlexNet weights; default: downloaded once")


def compare_pairs(
    generated: str,
    real: str,
    comparison: ComparisonOptions,
    scoring: ScoreOptions,
    pairing: PairOptions,
    features: FeatureOptions,
    device: torch.device,
) -> dict[str, Any]:
    """Score the images in one folder against the images with the same names in another.

    Args:
        generated: the folder to score.
        real: the folder with the partners of these images.
        comparison: image size and batch size.
        scoring: metrics, error bars and image format.
        pairing: whether LPIPS is computed, and its weights.
        features: the feature network; default: Inception.
        device: where the networks run.

    Returns:
        The entries of `evaluation.score.score_summaries`. "scores" also holds the paired metrics.

    Raises:
        UsageError: an image has no partner, or partners differ in size.
    """
    fake, true = _open_pairs(generated, real, comparison.image_size)
    network = load_features(features.features or "inception", features, device)
    batches = (image_batches(source, comparison.batch_size) for source in (fake, true))
    pairs = (Pair(images, originals, indices) for (images, indices), (originals, _) in zip(*batches, strict=True))
    return score_pairs(pairs, true.meta, network, scoring, pairing, device)


class Pair(NamedTuple):
    """A batch of images uint8 [B, C, H, W], their partners, and the indices that both share."""

    images: torch.Tensor
    originals: torch.Tensor
    indices: Sequence[int]


def score_pairs(
    pairs: Iterable[Pair],
    meta_of_originals: dict[str, Any],
    features: FeatureNetwork,
    scoring: ScoreOptions,
    pairing: PairOptions,
    device: torch.device,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Consume `pairs` and score the images against their partners.

    Args:
        pairs: batches of pairs, iterated once. Each process passes its own share.
        meta_of_originals: JSON-serializable description of the partners.
        features: the feature network.
        scoring: metrics, error bars and image format.
        pairing: whether LPIPS is computed, and its weights.
        device: where LPIPS runs.
        processes: processes that share the pairs. All return the same result.

    Returns:
        The entries that `compare_pairs` returns.
    """
    pixels = PixelScores(load_lpips(pairing.lpips_weights, device) if pairing.lpips else None)
    needs = needs_of(scoring.metrics, reference=False) | {"rows"}
    fakes, reals = (Gatherer(features, needs, grouped=scoring.error_bar) for _ in range(2))
    for pair in pairs:
        images = IMAGE_FORMATS[scoring.image_format](pair.images)
        pixels.update(images, pair.originals)
        fakes.update(images, pair.indices)
        reals.update(pair.originals, pair.indices)
    for gathered in (fakes, reals, pixels):
        gathered.merge_all(processes)
    scored = _scored(fakes, reals, pixels, meta_of_originals, scoring) if processes.is_main else {}
    return processes.from_main(scored)


def _scored(
    fakes: Gatherer, reals: Gatherer, pixels: PixelScores, meta_of_originals: dict[str, Any], scoring: ScoreOptions
) -> dict[str, Any]:
    meta = {"image_format": scoring.image_format}
    samples, reference = fakes.summary(meta), reals.summary(meta_of_originals)
    error_bar = scoring.error_bar and fakes.count >= FEWEST_FOR_ERROR_BAR
    errors = error_bars(scoring.metrics, lambda groups: fakes.summary(meta, groups), reference) if error_bar else {}
    result = score_summaries(scoring.metrics, samples, reference, errors)
    assert samples.rows is not None
    assert reference.rows is not None
    discriminative = discriminative_scores(samples.rows.numpy(), reference.rows.numpy())
    paired = {name: (value, None) for name, value in discriminative.items()} | pixels.result()
    result["scores"] |= {
        name: {"metric": TITLES[name], "value": value, "error": error} for name, (value, error) in paired.items()
    }
    return result


def _open_pairs(generated: str, real: str, image_size: int | None) -> tuple[ImageSource, ImageSource]:
    """Open both folders; the second source follows the order of the first."""
    for path in (generated, real):
        if not Path(path).is_dir():
            raise UsageError(
                f"{path}: expected a folder of images, to be paired by name with the images of the other folder"
            )
    fake, true = (open_source(path, image_size) for path in (generated, real))
    partner = dict(pair_by_name(fake, true))
    return fake, dataclasses.replace(true, read=lambda index: true.read(partner[index]))
