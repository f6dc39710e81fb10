"""diffusers' AutoencoderKL, which encodes an image to a normal posterior (Kingma & Welling 2013, arXiv:1312.6114).

A posterior sample z becomes the latent (z - mean) / std, per channel, which has about unit scale. Mean and std come from
`--scale_factor` s (mean 0, std 1 / s) or from the autoencoder's configuration (models/autoencoders/scale.py).

Encoding runs in the precision of the surrounding autocast; decoding runs in float32 (see DECODING). Weights and pixels are
in channels-last format, because it makes convolutions faster on CPUs. Compared with channels first, this changes the order
of float32 sums.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers.utils import logging
from torch import nn

from models.autoencoders.hub import check_hub, is_unreachable, unreachable
from models.autoencoders.lipschitz import decoder_bound
from models.autoencoders.pixels import images_to_pixels
from models.autoencoders.protocol import AutoencoderFacts
from models.autoencoders.scale import has_superseded_scale, latent_scale
from models.autoencoders.weight_files import explain_damage, find_weight_files, has_standard_name, load_unwrapped
from options import UsageError
from runtime.messages import note
from runtime.torch_files import weights_hash
from runtime.weights import Mismatch, check_finite

__all__ = ["LOGVAR_RANGE", "KLAutoencoder", "decode_pixels", "encode_moments", "load_kl", "new_autoencoder_kl"]

# The autoencoder processes images in chunks: two images of 256 x 256 pixels on a CPU, where larger chunks gain nothing, and
# eight on other devices, to fill them.
PIXELS_PER_CHUNK = 1 << 17
OFF_CPU_MULTIPLIER = 4
CLASS = "AutoencoderKL"  # in config.json
LOGVAR_RANGE = (-30.0, 20.0)  # the clamping range of diffusers' DiagonalGaussianDistribution


class KLAutoencoder:
    """A diffusers AutoencoderKL and the scale of its latents.

    Args:
        network: the autoencoder; it is frozen and set to evaluation mode.
        identity: hub id or folder, recorded in checkpoints.
        scale_factor: overrides the latent mean and std in the autoencoder's configuration.
    """

    has_posterior = True
    is_pixel_space = False

    def __init__(self, network: nn.Module, identity: str, scale_factor: float | None = None) -> None:
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        config: Any = network.config
        self.identity = identity
        self.scale_factor = scale_factor
        self.image_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.moment_channels = 2 * self.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        mean, std = latent_scale(config, scale_factor, identity)
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)
        self.sha256 = weights_hash(network.state_dict())

    def describe(self) -> AutoencoderFacts:
        """Hub id or folder, hash of the weights, and scale of the latents."""
        return AutoencoderFacts(
            id=self.identity,
            sha256=self.sha256,
            scale_factor=self.scale_factor,
            latents_mean=tuple(self.mean.flatten().tolist()),
            latents_std=tuple(self.std.flatten().tolist()),
        )

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, and the latents' mean and std, to `device`."""
        self.network.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def restore_scale(self, stored: AutoencoderFacts) -> None:
        """Scale latents by the mean and std in `stored`, even if the autoencoder's configuration has changed since."""
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1).to(self.mean) for values in (stored.latents_mean, stored.latents_std)
        )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode uint8 images [B, C, H, W] to posterior moments [B, 2 c, h, w], float32, with clamped log-variance.

        Convolutions run in the precision of the surrounding autocast, or in float32 without one. For an autoencoder of color
        images, a grayscale image is repeated to three channels.

        Raises:
            UsageError: the autoencoder does not support the images' channels or sides.
        """
        if images.shape[1] == 1 and self.image_channels == 3:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != self.image_channels:
            raise UsageError(
                f"the autoencoder {self.identity} expects {self.image_channels}-channel images, "
                f"but the dataset has {images.shape[1]}-channel images"
            )
        if images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UsageError(
                f"the image size must be a multiple of {self.factor} for the autoencoder {self.identity}, "
                f"but the images have {images.shape[3]} x {images.shape[2]} pixels (--image_size)"
            )
        chunks = images.split(_chunk(images.shape[2] * images.shape[3], images.device))
        pixels = (images_to_pixels(chunk).contiguous(memory_format=torch.channels_last) for chunk in chunks)
        moments = torch.cat([encode_moments(self.network, part) for part in pixels])
        mean, logvar = moments.float().contiguous().chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Scaled latents [B, c, h, w] from posterior moments and standard normal noise; without noise, the posterior mean."""
        mean, logvar = moments.float().chunk(2, dim=1)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - self.mean) / self.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents [B, c, h, w] to pixels [B, C, H, W], about in [-1, 1], in chunks to limit memory."""
        chunk = _chunk(latents.shape[2] * latents.shape[3] * self.factor**2, latents.device)
        z = (latents.float() * self.std + self.mean).contiguous(memory_format=torch.channels_last)
        return torch.cat([decode_pixels(self.network, part) for part in z.split(chunk)])

    def lipschitz_bound(self, side: int) -> float | None:
        """A certified Lipschitz constant of `decode` for latents with sides `side`; None if a layer is unknown."""
        return decoder_bound(self.network, side, float(self.std.max()))


def encode_moments(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments [B, 2 c, h, w] from an AutoencoderKL for pixels in [-1, 1]."""
    hidden = network.encoder(pixels)  # type: ignore[operator]
    return network.quant_conv(hidden) if network.quant_conv is not None else hidden  # type: ignore[operator]


def decode_pixels(network: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """Pixels, about in [-1, 1], that an AutoencoderKL decodes from unscaled latents z."""
    hidden = network.post_quant_conv(z) if network.post_quant_conv is not None else z  # type: ignore[operator]
    return network.decoder(hidden)  # type: ignore[operator]


def new_autoencoder_kl(
    channels: int, widths: tuple[int, ...], latent_channels: int, image_size: int, statistics: Mapping[str, Any]
) -> Any:
    """Build an untrained AutoencoderKL that halves the image len(widths) - 1 times.

    Args:
        channels: channels of the image, 1 or 3.
        widths: channels of each level; multiples of 8.
        latent_channels: c.
        image_size: recorded in the configuration.
        statistics: further configuration entries. With latents_mean and latents_std, scaling_factor is 1 by default.
    """
    if "latents_std" in statistics:
        statistics = {"scaling_factor": 1.0, **statistics}
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
        **statistics,
    )


def load_kl(folder: Path | None, name: str, scale_factor: float | None) -> KLAutoencoder:
    """Load an AutoencoderKL from a local `folder` in diffusers format or, if that is None, from the hub by `name`.

    On the hub, the weights must be in safetensors format. In a local folder, they may also have another file name, be in
    torch.save format, and their names may carry the prefixes of wrappers.

    Raises:
        UsageError: the hub cannot be reached, diffusers cannot load the autoencoder, it has another class, or its weights are
            incomplete, do not fit or are not finite.
    """
    local = folder is not None
    if not local:
        check_hub(name)
    try:
        with _quiet(local):
            config = diffusers.AutoencoderKL.load_config(folder or name, local_files_only=local)
        _check_class(str(config.get("_class_name", CLASS)), name)
        network, mismatch = _load_network(config, folder, name)
    except UsageError:
        raise
    except Exception as error:  # diffusers raises many types of error when loading fails
        if not local and is_unreachable(error):
            raise unreachable(name, error) from error
        if folder is not None and not (folder / "config.json").exists():
            reason = "it has no config.json, so it is not a folder in diffusers format"
        else:
            reason = (explain_damage(folder) if folder is not None else "") or _reason(error)
        raise UsageError(f"cannot load the autoencoder {name}: {reason}{_advise(folder)}") from error
    if any(mismatch):
        raise UsageError(
            f"the weights of the autoencoder {name} do not fit the AutoencoderKL in its config.json; "
            f"{mismatch}{_explain(mismatch)}"
        )
    check_finite(network.state_dict(), f"the autoencoder {name}")
    loaded = KLAutoencoder(network, name, scale_factor)
    if scale_factor is None and has_superseded_scale(network.config):
        note(
            f"{name} was written by an earlier version of train_autoencoder.py: its latents are normalized with latents_mean "
            "and latents_std only; set scaling_factor to 1.0 in its config.json, so that diffusers does the same"
        )
    return loaded


def _load_network(config: Mapping[str, Any], folder: Path | None, name: str) -> tuple[Any, Mismatch]:
    """Load the weights with diffusers, or by name if it finds no file or they do not fit; returns what does not fit."""
    files = find_weight_files(folder) if folder is not None else []
    if folder is not None and files and not has_standard_name(folder):
        network = diffusers.AutoencoderKL.from_config(config)
        try:
            mismatch = load_unwrapped(network, folder, files)
        except UsageError as error:
            raise UsageError(f"cannot load the autoencoder {name}: {error}") from error
        note(f"the weights of the autoencoder {name} are read from {files[0].name}")
        return network, mismatch
    local = folder is not None
    with _quiet(local):
        network, found = diffusers.AutoencoderKL.from_pretrained(
            folder or name,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            local_files_only=local,
            ignore_mismatched_sizes=True,  # the caller lists them
            output_loading_info=True,
        )
    mismatch = _mismatch(found)
    if any(mismatch) and folder is not None:
        mismatch = min(mismatch, load_unwrapped(network, folder, files), key=lambda each: sum(map(len, each)))
    return network.float(), mismatch  # diffusers leaves files of several precisions as they are


def _check_class(found: str, name: str) -> None:
    """Refuse diffusers' other classes. A class that diffusers does not know may have the same layers."""
    if found == CLASS:
        return
    if hasattr(diffusers, found):
        raise UsageError(f"cannot load the autoencoder {name}: its config.json names {found}, but expected {CLASS}")
    note(f"the config.json of {name} names {found}, which is unknown: its weights are loaded as an {CLASS}'s")


def _mismatch(found: Mapping[str, Any]) -> Mismatch:
    """The mismatch that diffusers has found while loading."""
    shapes = [
        f"{name} ({'x'.join(map(str, stored))} in the file, {'x'.join(map(str, own))} in the network)"
        for name, stored, own in sorted(found["mismatched_keys"])
    ]
    return Mismatch(sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), shapes)


@contextlib.contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Silence diffusers' warnings about weights, which become an error here, and progress bars of local files."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext():
            yield
    finally:
        logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    """The first line of an error's message, with the next one if it announces it by a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def _advise(folder: Path | None) -> str:
    """Where the files of an autoencoder are, for a folder that holds them in a subfolder."""
    if folder is not None and (folder / "model_index.json").exists() and (folder / "vae").is_dir():
        return f"; this is the folder of a whole pipeline: pass {folder / 'vae'}"
    if folder is not None and not (folder / "config.json").exists() and (found := sorted(folder.glob("*/config.json"))):
        return f"; did you mean {found[0].parent}?"
    return ""


def _explain(mismatch: Mismatch) -> str:
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in mismatch.unexpected):
        return "; the file has the names of the original latent diffusion code: convert it with AutoencoderKL.from_single_file"
    if not any((mismatch.unexpected, mismatch.misshapen)) and all("quant_conv." in name for name in mismatch.missing):
        return "; if the autoencoder has no such layers, set use_quant_conv and use_post_quant_conv to false in config.json"
    return "; pass the complete folder of one autoencoder"


def _chunk(pixels: int, device: torch.device) -> int:
    """Number of images in a chunk, for images with `pixels` pixels each."""
    return max(1, PIXELS_PER_CHUNK * (1 if device.type == "cpu" else OFF_CPU_MULTIPLIER) // pixels)
