"""The network of an exported folder, and its sampling: labels and settings in, latents or images out.

This module, and every module of this project that it imports, is copied into the folder. It imports nothing that sampling does
not need.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from checkpoints.header import Header
from datasets_prep.image_dataset import crop_padding
from flow.guidance import GuidanceOptions, VelocityNetwork
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions, check_method, solve
from models.autoencoders.pixels import PixelSpace
from models.autoencoders.pretrained import PretrainedAutoencoder
from models.autoencoders.protocol import Autoencoder
from models.conditions import Condition
from models.registry import build_network
from models.taps import weights_for_sampling
from options import UsageError
from runtime.cpu.kernels import with_cpu_kernels
from runtime.finite import finite_rows, require_finite
from runtime.precision import Machine
from runtime.weights import weights_hash
from sampling.checks import check_guidance, check_network
from sampling.sampler import Sampler, balanced_labels
from sampling.settings import class_ids, split_settings

__all__ = ["ALIASES", "OUTPUTS", "PRECISIONS", "WEIGHTS", "ExportedNetwork", "SampleRequest", "load_exported"]

WEIGHTS = "diffusion_pytorch_model.safetensors"  # a checkpoint of this project, with its header
ALIASES = {"num_inference_steps": "num_steps", "guidance_scale": "cfg_scale"}  # diffusers' names of settings
PRECISIONS = ("fp32", "bf16", "fp16")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's modes by the number of channels


@dataclass(frozen=True)
class SampleRequest:
    """Samples to draw. Sample i depends only on the seed, i, its label and the settings.

    Args:
        labels: ids or names of classes [N], where id K (the number of classes) is the null class; None: label i is i mod K.
        count: number of samples N; None: the number of labels, or 1.
        seed: seed of the noise.
        first: index i of the first sample.
        batch_size: samples at a time.
        precision: precision of the network's matrix products, one of PRECISIONS. Latents and the decoder stay in float32.
        output_type: a key of OUTPUTS.
        settings: fields of SolverOptions and GuidanceOptions, or names in ALIASES.
    """

    labels: Sequence[int | str] | torch.Tensor | None
    count: int | None
    seed: int
    first: int
    batch_size: int
    precision: str
    output_type: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        given = None if self.labels is None else len(self.labels)
        if self.number < 1 or given not in (None, self.number) or self.first < 0 or self.batch_size < 1:
            raise UsageError(
                "expected num_images and batch_size of at least 1, first_index of at least 0, and as many labels as images, "
                f"but got num_images {self.number}, batch_size {self.batch_size}, first_index {self.first} and {given} labels"
            )
        for name, value, known in (
            ("output_type", self.output_type, tuple(OUTPUTS)),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}: expected one of {', '.join(known)}")

    @property
    def number(self) -> int:
        """Number of samples."""
        return self.count if self.count is not None else 1 if self.labels is None else len(self.labels)

    def options(self) -> tuple[SolverOptions, GuidanceOptions]:
        """The solver and the guidance.

        Raises:
            UsageError: a setting is unknown or invalid.
        """
        settings = {ALIASES.get(name, name): value for name, value in self.settings.items()}
        solver, guidance = split_settings(settings, SolverOptions, GuidanceOptions)
        check_method(solver)
        return solver, guidance


class ExportedNetwork(nn.Module):
    """A velocity network in evaluation mode and the header of its checkpoint.

    Args:
        network: the network.
        header: the checkpoint's header.
    """

    def __init__(self, network: nn.Module, header: Header) -> None:
        super().__init__()
        self.network = with_cpu_kernels(network.eval().requires_grad_(False))
        self.header = header

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    def forward(self, t: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        """What the network predicts (the velocity, unless the header names another prediction), [B, c, h, w].

        Args:
            t: times [B], where 0 is data and 1 is noise.
            x: latents [B, c, h, w].
            labels: class ids [B].
            others: `until` [B], for a network that predicts average velocities.
        """
        return self.network(t, x, Condition(labels), **others)

    def sample(
        self, vae: Any, request: SampleRequest, progress: Callable[[Iterable[range]], Iterable[range]] = iter
    ) -> Any:
        """Draw samples in the request's output type.

        Args:
            vae: an autoencoder of diffusers, or None for pixel space.
            request: the samples.
            progress: wraps the batches, to show progress.

        Raises:
            UsageError: a setting or label is invalid, the network lacks what the settings need, or more than a few samples are
                not finite.
        """
        ids = None if request.labels is None else class_ids(request.labels, self.header)
        sampler, output = self._sampler(vae, request), OUTPUTS[request.output_type]
        batches = [
            range(request.number)[i : i + request.batch_size] for i in range(0, request.number, request.batch_size)
        ]
        parts = []
        for rows in progress(batches):
            indices = [request.first + row for row in rows]
            labels = balanced_labels(indices, sampler.num_classes) if ids is None else ids[list(rows)]
            noise, draw = sampler.noise(indices), sampler.draw(indices)
            latents = solve(sampler.velocity(labels), noise, sampler.solver, draw=draw).x
            parts.append(output.convert(sampler, latents))
        return output.collect(torch.cat(parts))

    def _sampler(self, vae: Any, request: SampleRequest) -> Sampler:
        header, (solver, guidance) = self.header, request.options()
        check_guidance(header.network.label_dropout, header.dense, guidance.cfg_scale)
        check_network(header.network, solver, guidance)
        if self.dtype != torch.float32:
            raise UsageError(
                f"the network's weights are {self.dtype}, but sampling needs float32: load the pipeline without torch_dtype, "
                'and pass precision="bf16" instead'
            )
        objective = OBJECTIVES[header.objective].build(header.path)
        return Sampler(
            network=VelocityNetwork(self.network, objective.velocity),
            autoencoder=self._autoencoder(vae),
            facts=header.dataset,
            latent_shape=header.latent_shape,
            num_classes=header.num_classes,
            solver=solver,
            machine=Machine(self.device, request.precision),
            seed=request.seed,
            guidance=guidance,
            correction=header.correction(self.device),
            drops_labels=header.drops_labels,
        )

    def _autoencoder(self, vae: Any) -> Autoencoder:
        """The autoencoder with the checkpoint's scale of latents, in float32 on the network's device."""
        if vae is None:
            return PixelSpace(self.header.dataset.channels)
        autoencoder = PretrainedAutoencoder(vae.float(), self.header.autoencoder.id).to(self.device)
        autoencoder.restore_scale(self.header.autoencoder)
        return autoencoder


def load_exported(folder: str | Path) -> ExportedNetwork:
    """Load the network in a folder that holds `WEIGHTS`.

    Raises:
        UsageError: the weights do not match the checksum in their header.
    """
    path = Path(folder) / WEIGHTS
    with safe_open(path, framework="pt") as file:
        header = Header.from_json(json.loads(file.metadata()["header"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if weights_hash(weights) != header.weights_sha256:
        raise UsageError(
            f"{path} is damaged: its weights do not match the checksum in its header; copy or download it again"
        )
    network = build_network(*header.architecture.for_sampling())
    network.load_state_dict(weights_for_sampling(weights))
    return ExportedNetwork(network, header)


class Output(NamedTuple):
    """How latents are returned: convert(sampler, latents) per batch on the CPU, and collect(all batches)."""

    convert: Callable[[Sampler, torch.Tensor], torch.Tensor]
    collect: Callable[[torch.Tensor], Any]


def _decode_unrounded(sampler: Sampler, latents: torch.Tensor) -> torch.Tensor:
    """Images float32 [B, C, H, W] in [0, 1] before rounding, in the size and channels of the dataset."""
    with torch.no_grad():
        pixels = crop_padding(sampler.autoencoder.decode(latents), sampler.facts).float()
    require_finite(finite_rows(pixels), "samples")
    if pixels.shape[1] > sampler.facts.channels == 1:
        pixels = pixels.mean(1, keepdim=True)
    return (pixels / 2 + 0.5).clamp(0, 1).cpu()


def _as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images uint8 [N, C, H, W] as a list of PIL's."""
    mode = PIL_MODES.get(images.shape[1])
    if mode is None:
        raise UsageError(f'images of {images.shape[1]} channels are no pictures: choose output_type "np" or "pt"')
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array[:, :, 0] if mode == "L" else array) for array in arrays]


def _as_given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


OUTPUTS: dict[str, Output] = {
    "pil": Output(Sampler.decode, _as_pictures),  # the rounded images that the test script writes
    "np": Output(
        _decode_unrounded, lambda images: images.permute(0, 2, 3, 1).numpy()
    ),  # float32 [N, H, W, C] in [0, 1]
    "pt": Output(_decode_unrounded, _as_given),  # float32 [N, C, H, W] in [0, 1]
    "latent": Output(lambda sampler, latents: latents.cpu(), _as_given),
}
