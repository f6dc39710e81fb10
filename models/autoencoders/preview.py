"""A small twin of an autoencoder, such as TAESD, which draws previews of the same latents at a fraction of the cost."""

from dataclasses import replace

import torch

from models.autoencoders.loading import AutoencoderOptions, load_autoencoder
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import Autoencoder, AutoencoderFacts
from options import UsageError

__all__ = ["fit_twin", "load_twin"]


def load_twin(name: str, autoencoder: Autoencoder, channels: int) -> Autoencoder:
    """Load the twin `name` of an autoencoder; `channels` is the number of image channels.

    Raises:
        UsageError: it cannot be loaded, its latents have another shape, or the autoencoder has no scale of its own.
    """
    twin = load_autoencoder(AutoencoderOptions(name), channels)
    shapes = [(each.latent_channels, each.factor) for each in (twin, autoencoder)]
    if shapes[0] != shapes[1] or twin.is_pixel_space:
        raise UsageError(
            f"--preview_autoencoder {name} decodes {shapes[0][0]} channels by the factor {shapes[0][1]}, but this run's "
            f"latents have {shapes[1][0]} channels and the factor {shapes[1][1]}: choose a twin of the run's autoencoder"
        )
    if isinstance(autoencoder, PretrainedAutoencoder) and autoencoder.own_scale() is None:
        raise UsageError(
            f"--preview_autoencoder {name} needs latents in the own scale of the run's autoencoder {autoencoder.identity}, "
            "but its files record none: omit --preview_autoencoder, or use the autoencoder in diffusers format, whose "
            "config.json has a scaling_factor"
        )
    return twin


def fit_twin(twin: Autoencoder, autoencoder: Autoencoder) -> None:
    """Scale the twin's latents so that it decodes the run's latents, whatever their scale.

    Twins are trained on latents in the autoencoder's own scale: (z - m) / s decodes to the same image in the twin, whose own
    scale is m', s', as z does in the autoencoder. The run's latents are x = (z - mean) / std, so the twin decodes

        (x std + mean - m) / s s' + m' = x (std s' / s) + (mean - m) s' / s + m'.
    """
    mean, std = own_mean, own_std = _numbers(autoencoder.describe())
    if isinstance(autoencoder, PretrainedAutoencoder) and (own := autoencoder.own_scale()):
        own_mean, own_std = torch.tensor(own.mean), torch.tensor(own.std)
    facts = twin.describe()
    twin_mean, twin_std = _numbers(facts)
    fitted_mean, fitted_std = (mean - own_mean) * twin_std / own_std + twin_mean, std * twin_std / own_std
    twin.restore_scale(
        replace(
            facts, latents_mean=tuple(fitted_mean.tolist()), latents_std=tuple(fitted_std.tolist()), statistics="twin"
        )
    )


def _numbers(facts: AutoencoderFacts) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per channel; 0 and 1 without a scale."""
    return torch.tensor(facts.latents_mean or (0.0,)), torch.tensor(facts.latents_std or (1.0,))
