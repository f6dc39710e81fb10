"""Augmentation of the training images: checks of the options, and the source of data with variants of the images."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from datasets_prep.augmentation.variants import AugmentedMoments, VariantRecipe, WithVariants, variants_of
from datasets_prep.datasets import FlipOptions, ImageDataset
from datasets_prep.latents import LatentDataset
from datasets_prep.moments import MomentSource
from models.autoencoders.protocol import Encoder
from models.conditions import AugmentationEmbedding
from models.family import FamilyOptions
from options import UsageError
from runtime.messages import fact
from training.run import TrainingOptions

__all__ = ["check_augmentation", "check_network_takes_augmentation", "open_variants", "settle_flips"]

FLIP_ALONE = ("flip",)


def settle_flips(network: FamilyOptions, flips: FlipOptions) -> FlipOptions:
    """The decision on mirror images: with --augment flip, they do not belong to the distribution.

    Raises:
        UsageError: --flip on says that they do.
    """
    if "flip" not in network.augment:
        return flips
    if flips.flip == "on":
        raise UsageError(
            "--augment flip and --flip on contradict each other: with the first, samples show no mirror images; with the "
            "second, half of them do. Leave one out"
        )
    return FlipOptions("off")


def check_augmentation(
    network: FamilyOptions, given: Mapping[str, Any], dataset: ImageDataset, *, dense: bool, pairs: bool
) -> None:
    """Check that the run can augment its images, if it is asked to.

    Args:
        network: the family's options.
        given: values of the options that the user gave, by name.
        dataset: the training images.
        dense: whether the network takes masked images or label maps.
        pairs: whether the run trains on pairs of noise and samples.

    Raises:
        UsageError: it cannot.
    """
    if not network.augment:
        if unused := sorted({"augment_copies", "augment_probability"} & given.keys()):
            raise UsageError(f"--{unused[0]} has no effect without --augment, for example --augment flip crop color")
        return
    asked = f"--augment {' '.join(network.augmentations)}"
    if network.augmentations == FLIP_ALONE and "augment_copies" in given:
        raise UsageError(
            f"--augment_copies has no effect on {asked}, because an image has one mirror image: leave it out"
        )
    if dense:
        raise UsageError(
            f"{asked} works for generation only, because masks and label maps would have to change with the images: leave it "
            "out (--flip on mirrors both)"
        )
    if pairs:
        raise UsageError(f"{asked}: pairs of noise and samples have no images to change: leave it out")
    if isinstance(dataset, LatentDataset):
        raise UsageError(
            f"{asked} changes images before they are encoded, but {dataset.facts.name} holds latents: give the folder of the "
            "images as --datadir, with --dataset folder"
        )


def check_network_takes_augmentation(model_type: str, options: FamilyOptions, network: nn.Module) -> None:
    """Check that a network has the input for the parameters of augmentation, which another project's network may lack.

    Raises:
        UsageError: it lacks it.
    """
    if options.augment and not any(isinstance(module, AugmentationEmbedding) for module in network.modules()):
        raise UsageError(
            f"{model_type} takes no parameters of augmentation, so its samples would look augmented: leave out --augment, or "
            "add models.conditions.new_augmentation_embedding to the network"
        )


def open_variants(
    network: FamilyOptions,
    training: TrainingOptions,
    dataset: ImageDataset,
    images: MomentSource,
    autoencoder: Encoder,
    features: MomentSource | None,
    encoder: Encoder | None,
    encoded: Callable[..., MomentSource],
) -> tuple[MomentSource, MomentSource | None]:
    """Add the images' variants to the source of training data and, if there are any, to an image encoder's features.

    Without --augment, both are returned unchanged. Variants have caches of their own, next to the images'.

    Args:
        network: the family's options.
        training: number and probability of variants.
        dataset: the training images.
        images: their moments.
        autoencoder: encodes the variants.
        features: an image encoder's features of the images.
        encoder: that encoder.
        encoded: `datasets_prep.moments.open_encoded`, called as encoded(dataset, encoder, subfolder=name).
    """
    kinds = network.augmentations
    if not kinds:
        return images, features
    copies = 1 if kinds == FLIP_ALONE else training.augment_copies
    recipe = VariantRecipe(kinds, copies, mirrored=dataset.facts.flips)
    variants = variants_of(dataset, recipe)
    fact(
        "augment",
        f"{' '.join(kinds)}; variants of each image: {copies}, drawn with probability {training.augment_probability:g}",
    )
    moments = encoded(variants, autoencoder, subfolder=recipe.name)
    source = AugmentedMoments(images, moments, recipe, training.augment_probability)
    if features is None or encoder is None:
        return source, features
    return source, WithVariants(features, encoded(variants, encoder, subfolder=f"features/{recipe.name}"), copies)
