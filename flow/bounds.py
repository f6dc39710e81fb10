"""Bounds of the Wasserstein-2 distance between data and the samples of a latent flow, after section 4 of LFM (Dao et al. 2023).

Let z and z' start from the same noise at t = 1 and follow the exact velocity v* and the network's velocity v. The root mean
square distance of their ends is at least the latents' distance W2. By Gronwall's and Minkowski's inequalities,

    W2 <= integral from 0 to 1 of exp(integral from 0 to t of m(s) ds) e(t) dt,

where e(t)^2 = E |v*(z_t, t) - v(z_t, t)|^2 and m(t) is the largest logarithmic norm of -v (flow/lipschitz.py) on the segments
between z and z'. A decoder with Lipschitz constant L adds
W2(images, samples) <= sqrt(E |image - reconstruction|^2) + L W2. docs/theory.md derives both.

Functions take values at the midpoints t_1 < ... < t_T of intervals that divide [0, 1].
"""

import math

import torch

__all__ = ["decoded_bound", "flow_bound", "lfm_bound", "young_bound"]


def flow_bound(errors: torch.Tensor, rates: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """integral of exp(integral from 0 to t of rate) error dt.

    Args:
        errors: root mean square errors of the velocity [T], or the errors along each of P paths [T, P].
        rates: logarithmic norms, like `errors`.
        widths: widths of the intervals [T].

    Returns:
        [], or [P] for P paths.
    """
    weights = widths.view(-1, *[1] * (errors.ndim - 1))
    return (_growth(rates, weights) * errors * weights).sum(0)


def young_bound(errors: torch.Tensor, rates: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """sqrt(integral of exp(integral from 0 to t of (1 + 2 rate)) error^2 dt), by Young's instead of Minkowski's inequality.

    This is LFM's argument with logarithmic norms in place of a Lipschitz constant. By the Cauchy-Schwarz inequality,
    `flow_bound` is at most sqrt(1 - 1/e) = 0.80 times as large. It takes and returns the same as `flow_bound`.
    """
    weights = widths.view(-1, *[1] * (errors.ndim - 1))
    return (_growth(1 + 2 * rates, weights) * errors.square() * weights).sum(0).sqrt()


def lfm_bound(
    reconstruction: float, decoder: float, errors: torch.Tensor, lipschitz: float, widths: torch.Tensor
) -> float:
    """The bound as LFM states it: sqrt(reconstruction^2 + decoder^2 exp(1 + 2 lipschitz) integral of error^2 dt).

    It adds squares of distances, where the triangle inequality adds distances. Its second term, on the other hand, is at least
    sqrt(e) times as large as `flow_bound`, if no rate exceeds `lipschitz`. So it can be too small, but at most by the factor
    sqrt(1 + 1/e) = 1.17, which a shift of data by autoencoder and flow in the same direction attains.

    Args:
        reconstruction: root mean square distance of images and reconstructions.
        decoder: Lipschitz constant of the decoder.
        errors: root mean square errors of the velocity [T].
        lipschitz: Lipschitz constant of the velocity in x; infinity where exp overflows.
        widths: widths of the intervals [T].
    """
    exponent = 1 + 2 * lipschitz
    growth = math.exp(exponent) if exponent < 700 else math.inf
    return math.sqrt(reconstruction**2 + decoder**2 * growth * float((errors.square() * widths).sum()))


def decoded_bound(reconstruction: float, decoder: float, latent: float) -> float:
    """Bound of the distance of images from a bound `latent` of the latents' distance, by the triangle inequality."""
    return reconstruction + decoder * latent


def _growth(rates: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """exp(integral from 0 to t of rate) at the midpoints."""
    steps = rates * weights
    return (steps.cumsum(0) - steps / 2).exp()
