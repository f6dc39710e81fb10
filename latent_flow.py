"""The Python interface: load a checkpoint and sample, encode, decode and invert with it.

    import latent_flow

    flow = latent_flow.load("saved_info/latent_flow/fashion_mnist/fashion_mnist_dit/best.safetensors")
    images = flow.sample(labels=[3, 4], seed=0, steps=8)  # uint8 [2, 1, 28, 28]

Time t runs from 0 (data) to 1 (noise), and the velocity is d x_t / dt. Samples match the test script's for the same seed,
labels, solver and precision. See docs/python.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from checkpoints.files import LoadedModel, describes_network, load_model
from checkpoints.header import Header
from checkpoints.lfm_request import described_by
from checkpoints.projects.opening import open_published
from diffusers_export.hub import find_exported
from flow.guidance import GuidanceOptions, VelocityNetwork
from flow.objectives import OBJECTIVES
from flow.solvers import SolverOptions, check_method, needs_float32, solve
from models.autoencoders.loading import AutoencoderOptions
from models.autoencoders.protocol import Autoencoder
from options import UsageError, make_options
from runtime.cpu.kernels import with_cpu_kernels
from runtime.distributed import Processes
from runtime.finite import require_finite
from runtime.inference import compile_for_batches
from runtime.precision import Machine, MachineOptions, choose_machine
from sampling.checks import check_guidance, check_network, warn_of_untrained
from sampling.sampler import Sampler, balanced_labels
from sampling.settings import class_ids, split_settings

__all__ = ["Flow", "load"]


def load(
    file: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    autoencoder: str | None = None,
    **flags: Any,
) -> "Flow":
    """Load a checkpoint.

    Args:
        file: a `model_<epoch>.safetensors` or `best.safetensors`, or a file of LFM's published code or another project's
            (docs/published.md); or a folder of `python -m checkpoints.export`, or its id on the
                hub (docs/export.md).
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        precision: precision of the network's matrix products: "fp32", "bf16", "fp16" or "auto" (bf16 where it is faster).
        compile: compile the network at its first use; this takes a minute and pays off for thousands of samples.
        autoencoder: folder or hub id of the autoencoder, if it has moved since training.
        flags: the test script's flags for another project's checkpoint, which does not describe its network, such as
            `dataset="celeba_256", image_size=256, model_type="DiT-L/2"`.

    Raises:
        UsageError: the file is unreadable, the autoencoder has other weights, the flags do not fit an LFM checkpoint, or flags
            were given for a checkpoint of this project.
    """
    machine = choose_machine(make_options(MachineOptions, {"device": device, "precision": precision}))
    if (exported := find_exported(file)) is not None:
        file, vae = exported
        autoencoder = autoencoder or (None if vae is None else str(vae))
    moved = {} if autoencoder is None else {"pretrained_autoencoder_ckpt": autoencoder}
    if not describes_network(file):
        if unknown := sorted(set(flags) - described_by()):
            raise UsageError(
                f"unknown keyword {', '.join(unknown)}: expected any of {', '.join(sorted(described_by()))}"
            )
        model = open_published(Path(file), {**flags, **moved}, machine.device)
    elif flags:
        raise UsageError(f"{file} describes its own network: omit {', '.join(sorted(flags))}")
    else:
        model = load_model(file, machine.device, AutoencoderOptions(autoencoder) if autoencoder else None)
    machine = replace(machine, compile=compile).settled(calls=0, processes=Processes())
    return Flow(model, machine, automatic=precision == "auto")


class Flow:
    """A trained latent flow: a velocity network, its autoencoder, and the header of its checkpoint.

    Args:
        model: network, autoencoder and header.
        machine: device, precision, and whether to compile the network.
        automatic: whether the network runs in float32 for adaptive solvers with tight tolerances.
    """

    def __init__(self, model: LoadedModel, machine: Machine, *, automatic: bool = True) -> None:
        self.network: nn.Module = with_cpu_kernels(model.network)
        self.autoencoder: Autoencoder = model.autoencoder
        self.header: Header = model.header
        self._machine = machine
        self._automatic = automatic
        objective = OBJECTIVES[self.header.objective].build(self.header.path)
        compiled = compile_for_batches(self.network, machine) if machine.compile else self.network
        self._evaluate = VelocityNetwork(compiled, objective.velocity)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self._machine.device

    def sample(
        self,
        labels: Sequence[int | str] | torch.Tensor | None = None,
        *,
        count: int | None = None,
        seed: int = 42,
        steps: int = 20,
        method: str = "dpm",
        noise: torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Sample images, uint8 [N, C, H, W] on the CPU. Sample i depends only on `seed`, i and its label.

        Args:
            labels: class ids [N], where K (the number of classes) is the null class, or names of classes; None cycles through
                the classes.
            count: number of samples N; None: the number of labels, noise latents or maps given, else 8.
            seed: seed of the noise.
            steps: number of intervals of fixed-step solvers, also called num_steps.
            method: solver; see docs/sampling.md.
            noise: latents [N, c, h, w] at t = 1 to start from, instead of the seed's noise.
            dense: dense condition maps [N, K, h, w] for a network trained for inpainting or semantic synthesis.
            options: further fields of SolverOptions and GuidanceOptions, such as `cfg_scale=2.5, cfg_interval=(0.2, 0.7)`.

        Raises:
            UsageError: an option or method is unknown, the network lacks what the method or guidance needs, labels are out of
                range, the number or shape of labels, noise or maps does not fit, or more than a few samples are not finite. A
                few cause a warning.
        """
        solver, guidance = split_settings(
            {"method": method, "num_steps": steps, **options}, SolverOptions, GuidanceOptions
        )
        check_method(solver)
        given = {
            name: len(item)
            for name, item in (("labels", labels), ("noise", noise), ("dense", dense))
            if item is not None
        }
        number = count if count is not None else next(iter(given.values()), 8)
        if number < 1 or any(length != number for length in given.values()):
            raise UsageError(
                f"expected at least one sample, and as many labels, noise latents or maps if given, but got {number} samples "
                f"and {given or 'nothing else'}"
            )
        sampler = self.sampler(solver, guidance, seed)
        warn_of_untrained(self.header, solver, guidance)
        indices = range(number)
        ids = balanced_labels(indices, sampler.num_classes) if labels is None else class_ids(labels, self.header)
        start = sampler.noise(indices) if noise is None else self._latents("noise", noise)
        velocity = sampler.velocity(ids, self._map(dense))
        return sampler.decode(solve(velocity, start, solver, draw=sampler.draw(indices)).x)

    def invert(
        self,
        images: torch.Tensor,
        labels: Sequence[int | str] | torch.Tensor | None = None,
        *,
        steps: int = 40,
        method: str = "heun",
        **options: Any,
    ) -> torch.Tensor:
        """Invert images, uint8 [N, C, H, W], to the noise [N, c, h, w] at t = 1; `sample(noise=...)` maps it back.

        Without labels, all images get the null class, or class 0 if the network is unconditional.

        Raises:
            UsageError: the method cannot run from data to noise, labels are missing for a network without a null class, or
                the noise of more than a few images is not finite.
        """
        solver, guidance = split_settings(
            {"method": method, "num_steps": steps, **options}, SolverOptions, GuidanceOptions
        )
        check_method(solver, backwards=True)
        latents = self.encode(images)
        sampler = self.sampler(solver, guidance, seed=0)
        warn_of_untrained(self.header, solver, guidance)
        ids = self._null(len(latents)) if labels is None else class_ids(labels, self.header)
        noise = solve(sampler.velocity(ids), latents, solver, backwards=True).x
        require_finite(noise, "inverted images")
        return noise

    @torch.no_grad()
    def velocity(
        self,
        t: torch.Tensor,
        x: torch.Tensor,
        labels: Sequence[int | str] | torch.Tensor | None = None,
        dense: torch.Tensor | None = None,
        *,
        until: torch.Tensor | None = None,
        **guidance: Any,
    ) -> torch.Tensor:
        """Velocity d x_t / dt, float32 [N, c, h, w], at times t ([] or [N], in [0, 1]) and latents x [N, c, h, w].

        With `until` ([] or [N], at most t), the result is the average velocity over [until, t].

        Args:
            t: time, where 0 is data and 1 is noise.
            x: latents x_t.
            labels: class ids [N]; None for the null class, or for class 0 if the network is unconditional.
            dense: dense condition maps [N, K, h, w] for a network that takes them.
            until: end of the interval, for the average velocity.
            guidance: fields of GuidanceOptions.

        Raises:
            UsageError: an option is unknown, x has the wrong shape, labels are missing for a network without a null class, or
                the network has no average velocity.
        """
        (options,) = split_settings(guidance, GuidanceOptions)
        sampler, end = self.sampler(SolverOptions(), options, seed=0), {}
        if until is not None:
            check_network(self.header.network, SolverOptions("flow_map"), options)
            end = {"until": until.to(self.device)}
        ids = self._null(len(x)) if labels is None else class_ids(labels, self.header)
        return sampler.velocity(ids, self._map(dense))(t.to(self.device), self._latents("x", x), **end)

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Encode images, uint8 [N, C, H, W], to latents, float32 [N, c, h, w] of about unit scale.

        Images without the padding that the dataset adds (28 x 28 for Fashion-MNIST) are padded with black. The latents are
        the posterior's means, or samples from it if standard normal `noise` [N, c, h, w] is given.

        Raises:
            UsageError: the images are not uint8 [N, C, H, W], or the autoencoder does not support their channels or sides.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UsageError(f"expected images uint8 [N, C, H, W], but got {images.dtype} {tuple(images.shape)}")
        facts = self.header.dataset
        if facts.crop is not None and images.shape[-1] == facts.crop:
            images = functional.pad(images, [(facts.image_size - facts.crop) // 2] * 4)
        with self._machine.for_encoding.autocast():
            moments = self.autoencoder.encode(images.to(self.device))
        return self.autoencoder.sample(moments, None if noise is None else noise.to(self.device))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [N, c, h, w] to images, uint8 [N, C, H, W] on the CPU, without the padding that the dataset adds."""
        return self.sampler(SolverOptions(), GuidanceOptions(), seed=0).decode(latents.to(self.device))

    def sampler(self, solver: SolverOptions, guidance: GuidanceOptions, seed: int) -> Sampler:
        """The network with a solver, guidance and a seed, which draws noise, integrates and decodes step by step.

        Raises:
            UsageError: the network lacks what the solver or guidance needs.
        """
        header = self.header
        check_guidance(header.network.label_dropout, header.dense, guidance.cfg_scale)
        check_network(header.network, solver, guidance)
        exact = self._automatic and needs_float32(solver)
        return Sampler(
            network=self._evaluate,
            autoencoder=self.autoencoder,
            facts=header.dataset,
            latent_shape=header.latent_shape,
            num_classes=header.num_classes,
            solver=solver,
            machine=replace(self._machine, precision="fp32") if exact else self._machine,
            seed=seed,
            guidance=guidance,
            correction=header.correction(self.device),
            drops_labels=header.drops_labels,
            drops_dense=header.drops_dense,
        )

    def _null(self, count: int) -> torch.Tensor:
        classes = self.header.num_classes
        if classes > 1 and not self.header.drops_labels:
            raise UsageError(f"this network has {classes} classes and no null class: pass labels [{count}]")
        return torch.full((count,), classes if self.header.drops_labels else 0)

    def _latents(self, name: str, latents: torch.Tensor) -> torch.Tensor:
        if tuple(latents.shape[1:]) != self.header.latent_shape:
            raise UsageError(
                f"{name}: expected latents [N, c, h, w] with (c, h, w) = {self.header.latent_shape}, "
                f"but got {tuple(latents.shape)}"
            )
        return latents.to(self.device)

    def _map(self, dense: torch.Tensor | None) -> torch.Tensor | None:
        if (dense is None) != (self.header.dense is None):
            needed = "needs" if dense is None else "does not take"
            raise UsageError(f"this network {needed} dense maps [N, K, h, w]")
        return None if dense is None else dense.to(self.device)
