"""Looking at the flow itself: images back to noise, the way between two seeds, and how a sample comes to be."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_prep.datasets import DatasetOptions, crop_padding
from evaluation.metrics import psnr
from flow.ode import Velocity, select_rows
from flow.solvers import check_method, solve
from models.autoencoders.pixels import images_to_pixels
from options import Options, UsageError, option
from runtime.files import atomic_path, write_json
from runtime.pictures import save_animation, save_sheet
from sampling.sample_and_score import SamplingOptions, labels_of, output_folder
from sampling.sampler import balanced_labels
from sampling.setup import Opened, open_sampler

__all__ = ["PictureOptions", "Recorder", "interpolate", "invert", "spherical", "trajectory"]


@dataclass(frozen=True)
class PictureOptions:
    """Pictures of the flow (--mode invert, interpolate, trajectory)."""

    pictured: int = option(8, "images or samples shown", minimum=1)
    frames: int = option(9, "places between two seeds, or times of a trajectory", minimum=2)
    seeds: tuple[int, ...] = option((), "interpolate: the two seeds; default: --seed and the next", minimum=0)
    gif: bool = option(False, "trajectory: a GIF as well")


def invert(options: Options) -> dict[str, Any]:
    """Lead held-out images to their noise and back; writes a sheet (images above what came back) and the noise as npz."""
    sampling, opened = options[SamplingOptions], open_sampler(options)
    sampler = opened.sampler
    check_method(sampler.solver, backwards=True)
    dataset = opened.real_images(options[DatasetOptions], "validation")
    count = min(options[PictureOptions].pictured, len(dataset))
    images = torch.stack([dataset[index] for index in range(count)]).to(sampler.machine.device)
    latents = sampler.autoencoder.sample(sampler.autoencoder.encode(images))
    labels = dataset.labels[:count] if sampler.num_classes > 1 else torch.zeros(count, dtype=torch.long)
    velocity = sampler.velocity(labels)
    noise = solve(velocity, latents, sampler.solver, backwards=True).x
    returned = solve(velocity, noise, sampler.solver).x
    original, back = sampler.decode(latents), sampler.decode(returned)
    real = crop_padding(images, sampler.facts).cpu()
    folder, stem = output_folder(sampling, opened), f"{opened.stem}_inverted"
    save_sheet(torch.cat([real, original, back]), folder / f"{stem}.png", count)
    with atomic_path(folder / f"{stem}.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, noise=noise.cpu().numpy(), labels=labels.numpy())
    error = (images_to_pixels(original) - images_to_pixels(back)).double().square().mean().item()
    result = {
        **opened.result(),
        "images": count,
        "noise_mean": noise.mean().item(),
        "noise_std": noise.std().item(),
        "latent_rms_error": (returned - latents).square().mean().sqrt().item(),
        "psnr_db": psnr(error) if error else None,
        "picture": str(folder / f"{stem}.png"),
    }
    result["summary"] = (
        f"{count} held-out images to noise (mean {result['noise_mean']:.3f}, standard deviation "
        f"{result['noise_std']:.3f}) and back, with an error of {result['latent_rms_error']:.2g} in the latents; "
        f"images, their reconstructions and what came back: {result['picture']}"
    )
    write_json(sampling.output_json or folder / f"{stem}.json", result)
    return result


def interpolate(options: Options) -> dict[str, Any]:
    """Samples on the great circle between the noises of two seeds; one sample index a row."""
    sampling, pictures, opened = options[SamplingOptions], options[PictureOptions], open_sampler(options)
    sampler = opened.sampler
    seeds = pictures.seeds or (sampler.seed, sampler.seed + 1)
    if len(seeds) != 2:
        raise UsageError(f"--seeds: expected two seeds, but {len(seeds)} were given")
    indices = range(pictures.pictured)
    first, last = (replace(sampler, seed=seed).noise(indices) for seed in seeds)
    shares = torch.linspace(0, 1, pictures.frames).tolist()
    noise = torch.stack([spherical(first, last, share) for share in shares], dim=1)  # [N, F, c, h, w]
    labels = balanced_labels(indices, sampler.num_classes).repeat_interleave(pictures.frames)
    places = [index for index in indices for _ in shares]  # a row's samples share the noise of a stochastic solver
    solution = solve(sampler.velocity(labels), noise.flatten(0, 1), sampler.solver, draw=sampler.draw(places))
    path = output_folder(sampling, opened) / f"{opened.stem}_from_{seeds[0]}_to_{seeds[1]}.png"
    save_sheet(sampler.decode(solution.x), path, pictures.frames)
    return _shown(
        opened, sampling, path, f"{len(indices)} ways of {len(shares)} samples from seed {seeds[0]} to {seeds[1]}"
    )


def trajectory(options: Options) -> dict[str, Any]:
    """How samples come to be: a row of points x_t from noise to data, and below it the data that the velocity points at."""
    sampling, pictures, opened = options[SamplingOptions], options[PictureOptions], open_sampler(options)
    sampler, indices = opened.sampler, range(pictures.pictured)
    labels, _ = labels_of(replace(sampling, n_sample=len(indices)), sampler)
    recorder = Recorder(sampler.velocity(labels(indices, sampler.num_classes)), len(indices))
    solution = solve(recorder, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices))
    times = torch.linspace(1, 0, pictures.frames).tolist()[:-1]
    shown = [[*recorder.nearest(row, times), (solution.x[row], solution.x[row])] for row in indices]
    latents = torch.stack([torch.stack([torch.stack(pair) for pair in frames], dim=1) for frames in shown])
    images = sampler.decode(latents.flatten(0, 2))  # latents: [N, 2, F, c, h, w]
    path = output_folder(sampling, opened) / f"{opened.stem}_trajectory.png"
    save_sheet(images, path, pictures.frames)
    if pictures.gif:
        by_frame = images.unflatten(0, (len(indices), 2, pictures.frames)).permute(2, 1, 0, 3, 4, 5).flatten(1, 2)
        save_animation(list(by_frame), path.with_suffix(".gif"), len(indices))
    return _shown(opened, sampling, path, f"{len(indices)} samples at {pictures.frames} times")


def spherical(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Noise [B, ...] on the way from `first` (share 0) to `last` (share 1), sample by sample (Shoemake 1985).

    The angle is that between the two; the lengths go over linearly, so that both ends are exact.
    """
    lengths = [noise.flatten(1).norm(dim=1) for noise in (first, last)]
    cosine = (first * last).flatten(1).sum(1) / (lengths[0] * lengths[1])
    angle = torch.arccos(cosine.clamp(-1, 1)).clamp(1e-6, math.pi - 1e-6)
    length = (1 - share) * lengths[0] + share * lengths[1]
    a = torch.sin((1 - share) * angle) / torch.sin(angle) * length / lengths[0]
    b = torch.sin(share * angle) / torch.sin(angle) * length / lengths[1]
    spread = (-1, *[1] * (first.ndim - 1))
    return a.view(spread) * first + b.view(spread) * last


class Recorder:
    """A velocity that remembers the points where each sample was evaluated, and the data x - t v it pointed at."""

    def __init__(self, velocity: Velocity, samples: int) -> None:
        self._whole = self._velocity = velocity
        self._rows = list(range(samples))
        self._seen: list[list[tuple[float, torch.Tensor, torch.Tensor]]] = [[] for _ in range(samples)]

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The velocity."""
        v = self._velocity(t, x)
        data = x - t.view(-1, *[1] * (x.ndim - 1)) * v
        for row, time, point, guess in zip(self._rows, t.expand(len(x)).tolist(), x, data, strict=True):
            self._seen[row].append((time, point, guess))
        return v

    def select_rows(self, rows: torch.Tensor) -> "Recorder":
        """The same for some samples of the batch."""
        part = Recorder(select_rows(self._whole, rows), 0)
        part._rows, part._seen = [self._rows[row] for row in rows.tolist()], self._seen
        return part

    def nearest(self, row: int, times: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of one sample, the point and the data evaluated nearest to each of `times`."""
        seen = self._seen[row]
        return [min(seen, key=_distance_to(time))[1:] for time in times]


def _distance_to(time: float) -> Callable[[tuple[float, torch.Tensor, torch.Tensor]], float]:
    return lambda seen: abs(seen[0] - time)


def _shown(opened: Opened, sampling: SamplingOptions, path: Path, what: str) -> dict[str, Any]:
    result = {**opened.result(), "picture": str(path), "summary": f"{what}: {path}"}
    write_json(sampling.output_json or path.with_suffix(".json"), result)
    return result
