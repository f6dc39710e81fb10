"""Inpainting of held-out images: by a network trained for it, or by one of generation into which the known is put back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from checkpoints.tasks import GENERATE, INPAINT
from datasets_prep.conditions import ConditionSource, MaskedImages
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from datasets_prep.folders import list_files, state_of_files
from datasets_prep.image_dataset import shown_side
from datasets_prep.images import IMAGE_SUFFIXES
from datasets_prep.masks import MaskOptions, MaskSetOptions, draw_mask, hole_ratio, mask_set
from evaluation.features.protocol import FeatureNetwork
from evaluation.metrics import psnr
from flow.grids import time_grid
from flow.repaint import replace_known
from models.autoencoders.protocol import Autoencoder
from models.conditions import ConditionOptions
from options import Options, as_json, option
from runtime.distributed import Processes
from runtime.precision import Machine
from sampling.sampler import GeneratedBatch, Sampler
from sampling.setup import Opened, open_sampler
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_sampling import Setting, sample_for_images
from tasks.conditioned_setup import ConditionedOptions, images_to_sample_for, note_unused, set_labels
from tasks.pair_scores import recognition
from tasks.task import TrainingTask

__all__ = ["INPAINTING", "HoleErrors", "InpaintingOptions", "inpaint", "paste_known"]


def _open_images(options: DatasetOptions, split: Split) -> ImageDataset:
    dataset = open_dataset(options, split)
    dataset.check_images("inpainting")
    return dataset


def _masked_images(
    dataset: ImageDataset, autoencoder: Autoencoder, machine: Machine, masks: MaskOptions, seed: int
) -> ConditionSource:
    draw = partial(draw_mask, masks.mask_kind, shown_side(dataset.facts), seed)
    return MaskedImages(dataset, autoencoder, draw, machine)


INPAINTING = TrainingTask(INPAINT, _open_images, _masked_images, MaskOptions, (MaskOptions, ConditionOptions))


@dataclass(frozen=True)
class InpaintingOptions:
    """Inpainting."""

    paste_known: bool = option(True, "put the image's known pixels back into every sample")
    feather: int = option(
        0, "width in pixels of the seam outside the hole, over which samples fade into known pixels", minimum=0
    )
    resamplings: int = option(
        5, "network of generation: how often each of --num_steps Euler steps is taken (RePaint)", minimum=1
    )


def inpaint(options: Options, processes: Processes = Processes()) -> dict[str, Any]:  # noqa: B008
    """Complete the held-out images behind masks; returns the result that is also written as JSON.

    Raises:
        UsageError: no such checkpoint, one that cannot inpaint, or a folder with other samples.
    """
    opened = open_sampler(options, processes, (INPAINT, GENERATE))
    _note_unused_flags(opened, options)
    whole = images_to_sample_for(opened, INPAINTING, options)
    dataset = whole.head(options[ConditionedOptions].n_sample)
    set_labels(dataset, opened, options)
    if opened.task is GENERATE:
        opened = _by_euler_steps(opened)
        print(
            f"note: {opened.path} is a network of generation: {len(time_grid(opened.sampler.solver)) - 1} Euler steps with the "
            f"known part put back, {options[InpaintingOptions].resamplings} times each (--resamplings)"
        )
    made_of = {"images": whole.fingerprint, "masks": _masks_identity(options[MaskSetOptions])}
    return sample_for_images(
        opened, lambda features: _setting(opened, dataset, features, made_of, options), options, processes
    )


def _note_unused_flags(opened: Opened, options: Options) -> None:
    if options[MaskSetOptions].mask_dir:
        note_unused(options, ("mask_kind", "mask_seed"), "with --mask_dir")
    if not options[InpaintingOptions].paste_known:
        note_unused(options, ("feather",), "without --paste_known")
    if opened.task is INPAINT:
        note_unused(options, ("resamplings",), "on a network that was trained to inpaint")


def _masks_identity(masking: MaskSetOptions) -> dict[str, Any]:
    """What the masks are, for a folder that may hold samples behind others."""
    if not masking.mask_dir:
        return {"kind": masking.mask_kind, "seed": masking.mask_seed}
    folder = Path(masking.mask_dir)
    files = list_files(folder, IMAGE_SUFFIXES, "mask images")
    return {"folder": folder.name, "files": state_of_files(files, folder, times=True)}


def paste_known(samples: torch.Tensor, originals: torch.Tensor, holes: torch.Tensor, feather: int = 0) -> torch.Tensor:
    """Samples uint8 [B, C, H, W] in the holes, bool [B, 1, H, W], and the originals outside.

    Over `feather` pixels outside the hole the sample fades out linearly, so that no seam is seen; further away every pixel
    is the original's.
    """
    weight = reached = holes.float()
    for distance in range(1, feather + 1):
        reached = functional.max_pool2d(reached, 3, stride=1, padding=1)
        weight = torch.maximum(weight, reached * (1 - distance / (feather + 1)))
    return (weight * samples + (1 - weight) * originals).round().to(torch.uint8)


def mean_colour(images: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """The mean [B, C, 1, 1] of the known pixels of images [B, C, H, W] with holes, bool [B, 1, H, W]."""
    known = (~holes).double()
    return (images * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)


class HoleErrors:
    """PSNR inside the holes, of samples and of the mean colour of the known pixels, over all pixels of all holes."""

    def __init__(self, holes: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._holes = holes
        self._totals = torch.zeros(3, dtype=torch.float64)  # squared errors of both, values

    def update(self, samples: torch.Tensor, originals: torch.Tensor, places: torch.Tensor) -> None:
        """See `PairScore`."""
        holes, images = self._holes(places), originals.double()
        guesses = samples.double(), mean_colour(images, holes)
        errors = [((guess - images).square() * holes).sum() for guess in guesses]
        self._totals += torch.stack([*errors, holes.sum() * images.shape[1]])

    def totals(self) -> torch.Tensor:
        """See `PairScore`."""
        return self._totals

    def result(self, totals: torch.Tensor) -> dict[str, Any]:
        """`psnr_hole` and `psnr_hole_mean_colour` in dB."""
        samples, mean, values = totals.tolist()
        if not values:
            return {}  # no image has a hole
        return {
            "psnr_hole": psnr(samples / values, value_range=255),
            "psnr_hole_mean_colour": psnr(mean / values, value_range=255),
        }


def _setting(
    opened: Opened,
    dataset: ImageDataset,
    features: FeatureNetwork | None,
    made_of: Mapping[str, Any],
    options: Options,
) -> Setting:
    masking, inpainting = options[MaskSetOptions], options[InpaintingOptions]
    masks = mask_set(masking, shown_side(dataset.facts))
    condition = MaskedImages(dataset, opened.sampler.autoencoder, masks, opened.sampler.machine.for_encoding)
    conditioned = ConditionedImages(dataset, condition)

    def holes(places: torch.Tensor) -> torch.Tensor:
        return torch.stack([masks(place) for place in places.tolist()])[:, None]

    def finish(samples: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if not inpainting.paste_known:
            return samples
        return paste_known(samples, conditioned.originals(places), holes(places), inpainting.feather)

    training_free = opened.task is GENERATE
    ratios = [hole_ratio(masks(place)).item() for place in range(len(dataset))]
    return Setting(
        conditioned,
        Path(masking.mask_dir).name or f"{masking.mask_kind}{masking.mask_seed}",
        {
            **made_of,
            "inpainting": as_json(replace(inpainting, resamplings=inpainting.resamplings if training_free else 1)),
        },
        "completions",
        {"masks": lambda places: 255 * holes(places).to(torch.uint8), "masked": conditioned.shown},
        finish,
        [HoleErrors(holes), *recognition(features, dataset)],
        _training_free(opened, conditioned, inpainting.resamplings) if training_free else None,
        {"hole_ratio": sum(ratios) / len(ratios)},
    )


def _by_euler_steps(opened: Opened) -> Opened:
    """The same with the solver that the known part is put back into, whatever --method says."""
    solver = replace(opened.sampler.solver, method="euler", churn=0.0)
    sampler = replace(opened.sampler, solver=solver)
    return opened._replace(sampler=sampler, settings={**opened.settings, "solver": as_json(solver)})


def _training_free(
    opened: Opened, conditioned: ConditionedImages, resamplings: int
) -> Callable[[Sampler, Sequence[int]], Iterator[GeneratedBatch]]:
    """A way to draw completions with a network of generation.

    A latent pixel is known where no pixel that it stands for is in the hole, which has the known pixels' mean colour for
    the encoder.
    """
    times = time_grid(opened.sampler.solver)
    sigma_min = opened.header.path.sigma_min
    autoencoder = opened.sampler.autoencoder

    def draw(sampler: Sampler, indices: Sequence[int]) -> Iterator[GeneratedBatch]:
        places = conditioned.places(indices)
        raw = conditioned.raw(places).to(sampler.machine.device)
        images, holes = raw[:, :-1], raw[:, -1:] > 0
        filled = torch.where(holes, mean_colour(images, holes).round().to(torch.uint8), images)
        with sampler.machine.for_encoding.autocast():
            known = autoencoder.sample(autoencoder.encode(filled))
        hole = functional.max_pool2d(holes.float(), autoencoder.factor) > 0
        labels = conditioned.labels()(indices, sampler.num_classes)
        velocity = sampler.velocity(labels)
        solution = replace_known(
            velocity,
            sampler.noise(indices),
            times,
            known,
            hole,
            sampler.draw(indices),
            resamplings=resamplings,
            sigma_min=sigma_min,
        )
        counts = solution.evaluations.cpu(), velocity.evaluations(len(indices))
        yield GeneratedBatch(indices, sampler.decode(solution.x), labels, *counts)

    return draw
