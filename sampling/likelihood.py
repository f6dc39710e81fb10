"""Bits per dimension of held-out images' latents under the flow (--compute_nll)."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from datasets_prep.datasets import DatasetOptions
from flow.likelihood import log_likelihood
from flow.solvers import check_method
from options import option
from runtime.finite import require_finite
from runtime.messages import labeled
from runtime.progress import progress_bar
from sampling.loading import LoadedSampler
from sampling.request import SamplingOptions
from sampling.results import write_result

__all__ = ["LikelihoodOptions", "compute_nll"]


@dataclass(frozen=True)
class LikelihoodOptions:
    """Likelihood (--compute_nll)."""

    exact_trace: bool = option(
        False, "compute the divergence exactly, with one backward pass per dimension, instead of estimating it"
    )


def compute_nll(
    loaded: LoadedSampler, sampling: SamplingOptions, data: DatasetOptions, likelihood: LikelihoodOptions
) -> dict[str, Any]:
    """Compute the negative log-likelihood of up to --n_sample held-out images, in bits per latent dimension.

    The density is over scaled latents, drawn from the posterior as in training. Values are comparable only between networks
    for the same autoencoder.

    Returns:
        The result, which is also written as JSON.

    Raises:
        UsageError: the solver cannot integrate from data to noise, the held-out images are missing, or more than a few of
            their likelihoods are not finite. A few cause a warning and are left out of the mean.
    """
    sampler, exact = loaded.sampler, likelihood.exact_trace
    check_method(sampler.solver, backwards=True)
    dataset = loaded.real_images(data, "validation").head(sampling.n_sample)
    bits, evaluations = [], []
    for start in progress_bar(range(0, len(dataset), sampling.batch_size), desc="likelihood", unit="batch"):
        indices = range(start, min(start + sampling.batch_size, len(dataset)))
        images = torch.stack([dataset[index] for index in indices]).to(sampler.machine.device)
        latents = sampler.autoencoder.sample(
            sampler.autoencoder.encode(images), sampler.other_noise(indices, "posterior")
        )
        labels = (
            dataset.labels[list(indices)] if sampler.num_classes > 1 else torch.zeros(len(indices), dtype=torch.long)
        )
        probe = None if exact else sampler.other_noise(indices, "probe").sign()
        measured = log_likelihood(sampler.velocity(labels), latents, sampler.solver, probe)
        bits.append(measured.bits_per_dimension.double().cpu())
        evaluations.append(measured.evaluations.cpu())
    values = torch.cat(bits)
    values = values[require_finite(values[:, None], "likelihoods of images")]
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    result = {
        **loaded.describe(),
        "images": len(values),
        "bits_per_dimension": values.mean().item(),
        "standard_error": error,
        "dimensions": math.prod(sampler.latent_shape),
        "trace": "exact" if exact else "Hutchinson, one probe of signs an image",
        "nfe": torch.cat(evaluations).double().mean().item(),
    }
    result["summary"] = labeled(
        "likelihood",
        f"{result['bits_per_dimension']:.4f} bits per latent dimension (standard error {error or math.nan:.4f}) of "
        f"{len(values)} held-out images, NFE {result['nfe']:g}",
    )
    default = loaded.output_folder(sampling.output_dir) / f"{loaded.stem}_nll.json"
    write_result(sampling.output_json, default, result)
    return result
