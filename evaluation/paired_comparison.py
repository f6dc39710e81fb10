"""The work of cal_inpainting.py: two folders of images, paired by name."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison import ComparisonOptions
from evaluation.features import FeatureOptions, load_features
from evaluation.metrics import error_bars
from evaluation.paired import PixelScores, discriminative_scores, load_lpips, pair_by_name
from evaluation.score import FEWEST_FOR_ERROR_BAR, IMAGE_FORMATS, ScoreOptions, needs_of, score_summaries
from evaluation.sources import ImageSource, image_batches, open_source
from evaluation.summary import Gatherer
from options import Options, UsageError, option
from runtime.precision import DeviceOptions, choose_device

__all__ = ["PairOptions", "compare_pairs"]

TITLES = {"p_ids": "P-IDS", "u_ids": "U-IDS", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS (AlexNet)"}


@dataclass(frozen=True)
class PairOptions:
    """Pairs."""

    lpips: bool = option(False, "also LPIPS, which needs the package lpips and AlexNet's weights")
    lpips_weights: str | None = option(None, "file of AlexNet's weights (torchvision's); default: downloaded once")


def compare_pairs(generated: str, real: str, options: Options) -> dict[str, Any]:
    """Score the images of a folder against those of the same names in another.

    Returns:
        What `evaluation.score.score_summaries` says, with the paired metrics among "scores".

    Raises:
        UsageError: the folders are not paired, or their images differ in size.
    """
    scoring, settings, pairing = options[ScoreOptions], options[ComparisonOptions], options[PairOptions]
    fake, true = _open_pairs(generated, real, settings.image_size)
    device = choose_device(options[DeviceOptions])
    pixels = PixelScores(load_lpips(pairing.lpips_weights, device) if pairing.lpips else None)
    features = load_features(options[FeatureOptions].features or "inception", options[FeatureOptions], device)
    needs = needs_of(scoring.metrics, reference=False) | {"rows"}
    fakes, reals = (Gatherer(features, needs, grouped=scoring.error_bar) for _ in range(2))
    batches = (image_batches(source, settings.batch_size) for source in (fake, true))
    for (images, indices), (originals, _) in zip(*batches, strict=True):
        images = IMAGE_FORMATS[scoring.image_format](images)
        pixels.update(images, originals)
        fakes.update(images, indices)
        reals.update(originals, indices)

    meta = {"image_format": scoring.image_format}
    samples, reference = fakes.summary(meta), reals.summary(true.meta)
    error_bar = scoring.error_bar and fakes.count >= FEWEST_FOR_ERROR_BAR
    errors = error_bars(scoring.metrics, lambda groups: fakes.summary(meta, groups), reference) if error_bar else {}
    result = score_summaries(scoring.metrics, samples, reference, errors)
    assert samples.rows is not None
    assert reference.rows is not None
    told_apart = discriminative_scores(samples.rows.numpy(), reference.rows.numpy())
    paired = {name: (value, None) for name, value in told_apart.items()} | pixels.result()
    result["scores"] |= {
        name: {"metric": TITLES[name], "value": value, "error": error} for name, (value, error) in paired.items()
    }
    return result


def _open_pairs(generated: str, real: str, image_size: int | None) -> tuple[ImageSource, ImageSource]:
    """Both folders' images in one order."""
    for path in (generated, real):
        if not Path(path).is_dir():
            raise UsageError(f"{path}: expected a folder, whose images are paired by name with those of the other")
    fake, true = (open_source(path, image_size) for path in (generated, real))
    partner = dict(pair_by_name(fake, true))
    return fake, dataclasses.replace(true, read=lambda index: true.read(partner[index]))
