"""Pictures of the flow: inversion of images to noise, interpolation between two seeds, and trajectories of samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets_prep.datasets import DatasetOptions, crop_padding
from evaluation.metrics import psnr
from flow.ode import Velocity, breakpoints_of, restrict, select_rows
from flow.solvers import check_method, solve
from models.autoencoders.pixels import images_to_pixels
from options import UsageError, option
from runtime.files import atomic_path
from runtime.finite import require_finite
from runtime.messages import labeled
from runtime.outputs import record_failure
from runtime.pictures import save_animation, save_sheet
from sampling.labels import choose_labels
from sampling.loading import LoadedSampler
from sampling.request import SamplingOptions
from sampling.results import write_result
from sampling.sampler import balanced_labels

__all__ = ["PictureOptions", "Recorder", "interpolate", "invert", "spherical", "trajectory"]


@dataclass(frozen=True)
class PictureOptions:
    """Pictures of the flow (--mode invert, interpolate, trajectory)."""

    pictured: int = option(8, "images or samples shown", minimum=1)
    frames: int = option(9, "samples per interpolation, or times per trajectory", minimum=2)
    seeds: tuple[int, ...] = option((), "interpolate: the two seeds; default: --seed and --seed plus 1", minimum=0)
    gif: bool = option(False, "trajectory: also save a GIF")


def invert(
    loaded: LoadedSampler, sampling: SamplingOptions, data: DatasetOptions, pictures: PictureOptions
) -> dict[str, Any]:
    """Integrate held-out images to noise and back.

    Saves a sheet with three rows: the images, their reconstructions by the autoencoder, and the images after integration to
    noise and back. Saves the noise as npz.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: the solver cannot integrate from data to noise, the held-out images are missing, or more than a few of
            the latents are not finite. A few cause a warning and are left out of the statistics.
    """
    sampler = loaded.sampler
    check_method(sampler.solver, backwards=True)
    dataset = loaded.real_images(data, "validation")
    count = min(pictures.pictured, len(dataset))
    images = torch.stack([dataset[index] for index in range(count)]).to(sampler.machine.device)
    latents = sampler.autoencoder.sample(sampler.autoencoder.encode(images))
    labels = dataset.labels[:count] if sampler.num_classes > 1 else torch.zeros(count, dtype=torch.long)
    velocity = sampler.velocity(labels)
    noise = solve(velocity, latents, sampler.solver, backwards=True).x
    fine = require_finite(noise, "inverted images")
    returned = solve(velocity, noise, sampler.solver).x
    original, back = sampler.decode(latents), sampler.decode(returned)
    real = crop_padding(images, sampler.facts).cpu()
    folder, stem = loaded.output_folder(sampling.output_dir), f"{loaded.stem}_inverted"
    error = (images_to_pixels(original) - images_to_pixels(back)).double().square().mean().item()
    result = {
        **loaded.describe(),
        "images": count,
        "noise_mean": noise[fine].mean().item(),
        "noise_std": noise[fine].std().item(),
        "latent_rms_error": (returned - latents)[fine].square().mean().sqrt().item(),
        "psnr_db": psnr(error) if error else None,
        "picture": str(folder / f"{stem}.png"),
    }
    facts = (
        f"{count} held-out images to noise (mean {result['noise_mean']:.3f}, standard deviation "
        f"{result['noise_std']:.3f}) and back, with an RMS error of {result['latent_rms_error']:.2g} in the latents"
    )
    picture = f"{result['picture']} (rows: images, their reconstructions, the images after integration)"
    lines = {"inversion": facts, "picture": picture, "noise": f"{folder / stem}.npz"}
    result["summary"] = "\n".join(labeled(*line) for line in lines.items())
    with record_failure(result):
        save_sheet(torch.cat([real, original, back]), folder / f"{stem}.png", count)
        with atomic_path(folder / f"{stem}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, noise=noise.cpu().numpy(), labels=labels.numpy())
    write_result(sampling.output_json, folder / f"{stem}.json", result)
    return result


def interpolate(loaded: LoadedSampler, sampling: SamplingOptions, pictures: PictureOptions) -> dict[str, Any]:
    """Sample from noise on the great circle between two seeds' noise. Saves a sheet with one sample index per row.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: --seeds does not have two seeds.
    """
    sampler = loaded.sampler
    seeds = pictures.seeds or (sampler.seed, sampler.seed + 1)
    if len(seeds) != 2:
        raise UsageError(f"--seeds: expected two seeds, but found {len(seeds)}")
    indices = range(pictures.pictured)
    first, last = (replace(sampler, seed=seed).noise(indices) for seed in seeds)
    shares = torch.linspace(0, 1, pictures.frames).tolist()
    noise = torch.stack([spherical(first, last, share) for share in shares], dim=1)  # [N, F, c, h, w]
    labels = balanced_labels(indices, sampler.num_classes).repeat_interleave(pictures.frames)
    repeated = [index for index in indices for _ in shares]  # the samples of a row share a stochastic solver's noise
    solution = solve(sampler.velocity(labels), noise.flatten(0, 1), sampler.solver, draw=sampler.draw(repeated))
    path = loaded.output_folder(sampling.output_dir) / f"{loaded.stem}_from_{seeds[0]}_to_{seeds[1]}.png"
    save_sheet(sampler.decode(solution.x), path, pictures.frames)
    summary = f"{len(indices)} interpolations of {len(shares)} samples from seed {seeds[0]} to seed {seeds[1]}"
    return _result_of(loaded, sampling, path, {"samples": summary, "picture": str(path)})


def trajectory(loaded: LoadedSampler, sampling: SamplingOptions, pictures: PictureOptions) -> dict[str, Any]:
    """Save a sheet of trajectories: a row of points x_t from noise to data, above a row of the data predicted from each.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: more than a few samples are not finite.
    """
    sampler, indices = loaded.sampler, range(pictures.pictured)
    labels = choose_labels(sampling.labels, sampler.seed, sampler.num_classes, len(indices))
    recorder = Recorder(sampler.velocity(labels(indices, sampler.num_classes)), len(indices))
    solution = solve(recorder, sampler.noise(indices), sampler.solver, draw=sampler.draw(indices))
    times = torch.linspace(1, 0, pictures.frames).tolist()[:-1]
    shown = [[*recorder.nearest(row, times), (solution.x[row], solution.x[row])] for row in indices]
    latents = torch.stack([torch.stack([torch.stack(pair) for pair in frames], dim=1) for frames in shown])
    latents = latents.flatten(0, 2)  # of [N, 2, F, c, h, w]
    images, bad = sampler.decode_batch(latents, range(len(latents)))
    broken = {number // (2 * pictures.frames) for number in bad}
    require_finite(torch.tensor([index not in broken for index in indices]), "samples")
    path = loaded.output_folder(sampling.output_dir) / f"{loaded.stem}_trajectory.png"
    save_sheet(images, path, pictures.frames)
    lines = {"samples": f"{len(indices)} trajectories at {pictures.frames} times", "picture": str(path)}
    if pictures.gif:
        lines["animation"] = str(path.with_suffix(".gif"))
        by_frame = images.unflatten(0, (len(indices), 2, pictures.frames)).permute(2, 1, 0, 3, 4, 5).flatten(1, 2)
        save_animation(list(by_frame), path.with_suffix(".gif"), len(indices))
    return _result_of(loaded, sampling, path, lines)


def spherical(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Interpolate noise [B, ...] from `first` (share 0) to `last` (share 1) on a great circle (slerp, Shoemake 1985).

    Lengths are interpolated linearly, so both ends are exact.
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
    """A velocity that records each sample's points x_t where it was evaluated, and the data x_t - t v predicted there.

    If v is the average velocity over a step, the prediction extends the step in a straight line.

    Args:
        velocity: the velocity to record.
        samples: size of the batch.
    """

    def __init__(self, velocity: Velocity, samples: int) -> None:
        self._whole = self._velocity = velocity
        self._rows = list(range(samples))
        self._seen: list[list[tuple[float, torch.Tensor, torch.Tensor]]] = [[] for _ in range(samples)]

    def __call__(self, t: torch.Tensor, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        """The velocity [B, C, h, w] at times t, [] or [B], and points x [B, C, h, w]."""
        v = self._velocity(t, x, **others)
        data = x - t.view(-1, *[1] * (x.ndim - 1)) * v
        for row, time, point, guess in zip(self._rows, t.expand(len(x)).tolist(), x, data, strict=True):
            self._seen[row].append((time, point, guess))
        return v

    def select_rows(self, rows: torch.Tensor) -> "Recorder":
        """The velocity of the samples `rows` of the batch. It records to the same lists."""
        part = Recorder(select_rows(self._whole, rows), 0)
        part._rows, part._seen = [self._rows[row] for row in rows.tolist()], self._seen
        return part

    @property
    def breakpoints(self) -> list[float]:
        """The recorded velocity's breakpoints."""
        return breakpoints_of(self._whole)

    def restrict(self, start: float, end: float) -> "Recorder":
        """The velocity between two times. It records to the same lists."""
        part = Recorder(restrict(self._whole, start, end), 0)
        part._rows, part._seen = self._rows, self._seen
        return part

    @property
    def evaluations(self) -> int:
        """The number of evaluations recorded for every sample."""
        return min(map(len, self._seen))

    def nearest(self, row: int, times: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One sample's recorded point and predicted data at the evaluation nearest to each of `times`."""
        seen = self._seen[row]
        return [min(seen, key=_distance_to(time))[1:] for time in times]


def _distance_to(time: float) -> Callable[[tuple[float, torch.Tensor, torch.Tensor]], float]:
    return lambda seen: abs(seen[0] - time)


def _result_of(loaded: LoadedSampler, sampling: SamplingOptions, path: Path, lines: dict[str, str]) -> dict[str, Any]:
    """The result for the picture at `path`, with labeled lines as its summary. It is also written as JSON."""
    summary = "\n".join(labeled(*line) for line in lines.items())
    result = {**loaded.describe(), "picture": str(path), "summary": summary}
    write_result(sampling.output_json, path.with_suffix(".json"), result)
    return result
