"""Scoring of image pairs: streamed, or read from two folders and paired by file name (cal_inpainting.py)."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.checks import check_pair_sizes, spread
from evaluation.comparison import ComparisonOptions
from evaluation.features.protocol import FeatureNetwork
from evaluation.features.registry import FeatureOptions, load_features
from evaluation.metrics import check_counts, error_bars
from evaluation.pairs import (
    SMALLEST_FOR_LPIPS,
    SSIM_WINDOW,
    PixelScores,
    discriminative_scores,
    load_lpips,
    pair_by_name,
)
from evaluation.score import FEWEST_FOR_ERROR_BAR, IMAGE_FORMATS, ScoreOptions, needs_of, score_summaries
from evaluation.sources import ImageSource, image_batches, open_source
from evaluation.summary import Gatherer
from options import UsageError, option
from runtime.distributed import Processes

__all__ = ["Pair", "PairOptions", "check_pairs", "compare_pairs", "score_pairs"]

TITLES = {"p_ids": "P-IDS", "u_ids": "U-IDS", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}


@dataclass(frozen=True)
class PairOptions:
    """Pairs."""

    lpips: bool = option(False, "also compute LPIPS; needs the package lpips and AlexNet's weights")
    lpips_weights: str | None = option(None, "file with torchvision's AlexNet weights; default: downloaded once")

    @property
    def smallest(self) -> int:
        """Side of the smallest images that can be scored."""
        return SMALLEST_FOR_LPIPS if self.lpips else SSIM_WINDOW


def check_pairs(pairing: PairOptions, scoring: ScoreOptions, count: int, side: int) -> None:
    """Check that `count` pairs of images of `side` x `side` pixels can be scored.

    Raises:
        UsageError: there are too few pairs for a metric, or the images are too small.
    """
    check_counts(scoring.metrics, count, count)
    if side < pairing.smallest:
        metric = "--lpips" if pairing.lpips else "SSIM"
        raise UsageError(f"{metric} needs images of at least {pairing.smallest} pixels per side, but these have {side}")


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
        UsageError: an image has no partner, partners differ in size, or there are too few images or too small ones.
    """
    fake, true = _open_pairs(generated, real, comparison.image_size)
    check_counts(scoring.metrics, fake.count, true.count)
    check_pair_sizes(fake, true, spread(fake.count), pairing.smallest)
    network = load_features(features.features or "inception", features, device)
    pairs = _read_pairs(fake, true, comparison.batch_size, pairing.smallest)
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


def _read_pairs(fake: ImageSource, true: ImageSource, batch_size: int, smallest: int) -> Iterator[Pair]:
    """Yield all pairs; batches of both sources end where their sizes change."""
    batches = (image_batches(source, batch_size) for source in (fake, true))
    for (images, indices), (originals, others) in zip(*batches, strict=True):
        if images.shape != originals.shape:
            check_pair_sizes(fake, true, range(indices[0], max(indices[-1], others[-1]) + 1), smallest)
        yield Pair(images, originals, indices)


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
    sources = []
    for path in (generated, real):
        source = open_source(path, image_size) if Path(path).is_dir() else None
        if source is None or not source.names:
            raise UsageError(
                f"{path}: expected a folder of images, to be paired by name with the images of the other folder"
            )
        sources.append(source)
    fake, true = sources
    partner = dict(pair_by_name(fake, true))
    ordered = dataclasses.replace(
        true,
        read=lambda index: true.read(partner[index]),
        measure=lambda index: true.extent(partner[index]),
        names=fake.names,
    )
    return fake, ordered
