"""Inpainting of held-out images with a network trained to inpaint or, through RePaint, with one trained for generation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints.tasks import GENERATE, INPAINT
from datasets_prep.conditions import ConditionSource, MaskedImages
from datasets_prep.datasets import DatasetOptions, ImageDataset, Split, open_dataset
from datasets_prep.folders import list_files, state_of_files
from datasets_prep.image_dataset import shown_side
from datasets_prep.images import IMAGE_SUFFIXES
from datasets_prep.masks import MaskOptions, MaskSetOptions, draw_mask, hole_ratio, mask_set
from evaluation.features.protocol import FeatureNetwork
from flow.grids import time_grid
from models.autoencoders.protocol import Autoencoder
from models.conditions import ConditionOptions
from options import as_json, option
from runtime.distributed import Processes
from runtime.messages import note
from runtime.precision import Machine
from sampling.loading import LoadedSampler, load_sampler
from sampling.request import note_unused
from tasks.conditioned_images import ConditionedImages
from tasks.conditioned_request import ConditionedRequest, open_held_out, set_labels
from tasks.conditioned_sampling import SamplingPlan, sample_for_images
from tasks.hole_scores import HoleErrors, paste_known
from tasks.pair_scores import recognition
from tasks.task import TrainingTask
from tasks.training_free_inpainting import training_free_draw, with_euler_steps

__all__ = ["INPAINTING", "InpaintingOptions", "inpaint"]


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

    paste_known: bool = option(True, "paste the image's known pixels into every sample")
    feather: int = option(
        0, "width in pixels of the seam outside the hole, where samples fade into the known pixels", minimum=0
    )
    resamplings: int = option(
        5, "for a network trained for generation: how many times each Euler step is taken (RePaint)", minimum=1
    )


def inpaint(
    request: ConditionedRequest,
    masking: MaskSetOptions,
    inpainting: InpaintingOptions,
    processes: Processes = Processes(),  # noqa: B008
) -> dict[str, Any]:
    """Complete masked held-out images.

    Args:
        request: network, images and scores.
        masking: the masks.
        inpainting: how samples are combined with the known pixels.
        processes: the batches are sharded over them.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: the checkpoint is missing or cannot inpaint, or the folder holds samples with other settings.
    """
    loaded = load_sampler(request.sampler, processes, (INPAINT, GENERATE))
    _note_unused_flags(request.sampler.given, loaded, masking, inpainting)
    whole = open_held_out(request, loaded, INPAINTING)
    dataset = whole.head(request.conditioned.n_sample)
    set_labels(dataset, loaded, request.conditioned.use_labels)
    if loaded.task is GENERATE:
        loaded = with_euler_steps(loaded)
        note(
            f"{loaded.path} was trained for generation, so inpainting uses RePaint: "
            f"{len(time_grid(loaded.sampler.solver)) - 1} Euler steps, {inpainting.resamplings} times each (--resamplings)"
        )
    identity = {"images": whole.fingerprint, "masks": _masks_identity(masking)}

    def make_plan(features: FeatureNetwork | None) -> SamplingPlan:
        return _plan(loaded, dataset, features, identity, masking, inpainting)

    return sample_for_images(request, loaded, make_plan, processes)


def _note_unused_flags(
    given: Mapping[str, Any], loaded: LoadedSampler, masking: MaskSetOptions, inpainting: InpaintingOptions
) -> None:
    if masking.mask_dir:
        note_unused(given, ("mask_kind", "mask_seed"), "with --mask_dir")
    if not inpainting.paste_known:
        note_unused(given, ("feather",), "without --paste_known")
    if loaded.task is INPAINT:
        note_unused(given, ("resamplings",), "with a network trained to inpaint")


def _masks_identity(masking: MaskSetOptions) -> dict[str, Any]:
    """The entry of samples.json that identifies the masks."""
    if not masking.mask_dir:
        return {"kind": masking.mask_kind, "seed": masking.mask_seed}
    folder = Path(masking.mask_dir)
    files = list_files(folder, IMAGE_SUFFIXES, "mask images")
    return {"folder": folder.name, "files": state_of_files(files, folder, times=True)}


def _plan(
    loaded: LoadedSampler,
    dataset: ImageDataset,
    features: FeatureNetwork | None,
    identity: Mapping[str, Any],
    masking: MaskSetOptions,
    inpainting: InpaintingOptions,
) -> SamplingPlan:
    masks = mask_set(masking, shown_side(dataset.facts))
    condition = MaskedImages(dataset, loaded.sampler.autoencoder, masks, loaded.sampler.machine.for_encoding)
    conditioned = ConditionedImages(dataset, condition)

    def holes(image_indices: torch.Tensor) -> torch.Tensor:
        return torch.stack([masks(index) for index in image_indices.tolist()])[:, None]

    def finish(samples: torch.Tensor, image_indices: torch.Tensor) -> torch.Tensor:
        if not inpainting.paste_known:
            return samples
        return paste_known(samples, conditioned.originals(image_indices), holes(image_indices), inpainting.feather)

    training_free = loaded.task is GENERATE
    ratios = [hole_ratio(masks(index)).item() for index in range(len(dataset))]
    effective = replace(inpainting, resamplings=inpainting.resamplings if training_free else 1)
    return SamplingPlan(
        conditioned=conditioned,
        name=Path(masking.mask_dir).name or f"{masking.mask_kind}{masking.mask_seed}",
        settings={**identity, "inpainting": as_json(effective)},
        output="completions",
        inputs={
            "masks": lambda image_indices: 255 * holes(image_indices).to(torch.uint8),
            "masked": conditioned.shown,
        },
        finish=finish,
        pair_scores=[HoleErrors(holes), *recognition(features, dataset)],
        draw=training_free_draw(loaded, conditioned, inpainting.resamplings) if training_free else None,
        facts={"hole_ratio": sum(ratios) / len(ratios)},
    )
