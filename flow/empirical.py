"""The velocity that minimizes the flow matching loss exactly, for data with a known distribution.

On LFM's path x_t = (1 - t) data + a noise with a = s + (1 - s) t, the loss is least for the conditional expectation
v*(x, t) = E[(1 - s) noise - data | x_t = x] (Lipman et al. 2023, arXiv:2210.02747, theorem 2). For a mixture of N normal
distributions N(m_i, diag(d_i^2)) with equal weights, it has a closed form. Given component i, x_t is normal with mean
(1 - t) m_i and variance V_i = (1 - t)^2 d_i^2 + a^2, and the expectations of data and noise are linear in x_t. Therefore

    E[data | x_t = x] = sum_i w_i (m_i + (1 - t) d_i^2 (x - (1 - t) m_i) / V_i),
    w_i proportional to exp(-1/2 sum_k ((x - (1 - t) m_i)_k^2 / V_ik + log V_ik)), with sum 1,

and E[noise | x_t = x] = (x - (1 - t) E[data | x_t = x]) / a. With (1 - t)^2 d_i^2 = V_i - a^2, both depend on the components
only through the averages of 1 / V_i and m_i / V_i.

The latents of a training set are such a mixture, because every training step samples the posterior of an image afresh:
component i is the posterior of image i. Where d = 0, data are points, and v* generates training data only.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Components", "EmpiricalVelocity"]

LOWEST = -1e300  # finite, and below all log-weights
LEAST_SIGNAL = 1e-8  # of data in x_t; below it, dividing by it would magnify rounding
NUMBERS_PER_BLOCK = 1 << 18  # 2 MiB in float64, which a processor's cache holds


class Components(NamedTuple):
    """Components of a mixture of normal distributions.

    Args:
        mean: [N, C, h, w].
        std: standard deviations [N, C, h, w]; 0 for points.
        labels: class ids [N].
    """

    mean: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class EmpiricalVelocity:
    """v* of a mixture as a network(t, x, condition), for solvers, guidance and likelihoods. It computes in float64.

    Each call reads all components once, part by part, so memory does not limit their number. B points at T times take 8 B N D
    operations in matrix products and about 8 T N D others, where D = C h w: points that share a time are cheaper.

    Args:
        components: returns the parts of the mixture, on the device of the points.
        classes: number of classes K; label K (the null class) means all components. With 1, labels are ignored.
        sigma_min: s, the share of noise at the data end of the path.
        bandwidth: standard deviation of normal noise added to the mixture, which makes it a kernel density estimate.
    """

    components: Callable[[], Iterable[Components]]
    classes: int = 1
    sigma_min: float = 1e-5
    bandwidth: float = 0.0

    def __call__(self, t: torch.Tensor, x: torch.Tensor, condition: Any = None) -> torch.Tensor:
        """Velocity [B, C, h, w] at times t ([] or [B]) and points x [B, C, h, w]. It is differentiable in x.

        Args:
            t: times. At t = 0, the velocity is undefined for a mixture of points with sigma_min 0.
            x: points.
            condition: has the attribute `labels`, class ids [B]; None: all components.

        Raises:
            ValueError: no component has a label that is asked for.
        """
        groups = self._visit(t, x, condition)
        velocity = torch.cat([group.velocity() for group in groups])
        order = torch.cat([group.rows for group in groups]).argsort()
        return velocity[order].view_as(x).to(x.dtype)

    def log_density(self, t: torch.Tensor, x: torch.Tensor, condition: Any = None) -> torch.Tensor:
        """Log-density of x_t at the points x in nats, float64 [B].

        It takes the same arguments as a call, and raises the same errors.
        """
        groups = self._visit(t, x, condition)
        order = torch.cat([group.rows for group in groups]).argsort()
        return torch.cat([group.log_density() for group in groups])[order]

    def _visit(self, t: torch.Tensor, x: torch.Tensor, condition: Any) -> list["_PointsAtOneTime"]:
        labels = None if condition is None or self.classes == 1 else condition.labels
        times, number_of = t.detach().expand(len(x)).double().unique(return_inverse=True)
        groups = []
        for number, time in enumerate(times.tolist()):
            rows = (number_of == number).nonzero()[:, 0]
            points = x[rows].flatten(1).double()
            groups.append(_PointsAtOneTime(self, time, rows, points, None if labels is None else labels[rows]))
        for part in self.components():
            variance = part.std.flatten(1).double().square() + self.bandwidth**2
            rows = max(1, NUMBERS_PER_BLOCK // variance.shape[1])
            blocks = (each.split(rows) for each in (part.mean.flatten(1).double(), variance, part.labels))
            for block in zip(*blocks, strict=True):
                for group in groups:
                    group.add(*block)
        return groups


class _PointsAtOneTime:
    """Averages over the components for some points x [P, D] at one time, kept with the largest log-weight so far."""

    def __init__(
        self,
        flow: EmpiricalVelocity,
        time: float,
        rows: torch.Tensor,
        points: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> None:
        self.rows, self._points, self._labels, self._classes = rows, points, labels, flow.classes
        self._signal, self._slope = 1 - time, 1 - flow.sigma_min  # of data in x_t, and of noise in the velocity
        self._noise = flow.sigma_min + self._slope * time
        self._top = points.new_full((len(points), 1), LOWEST)
        self._weight = self._count = points.new_zeros(len(points), 1)
        self._precision = self._center = torch.zeros_like(points)

    def add(self, mean: torch.Tensor, variance: torch.Tensor, labels: torch.Tensor) -> None:
        """Add components with means and variances [n, D] and labels [n]."""
        total = torch.add(self._noise**2, variance, alpha=self._signal**2)
        precision = total.reciprocal()
        center = mean * precision
        rest = self._signal**2 * torch.linalg.vecdot(center, mean) + _sum_of_logs(total)
        logits = self._signal * (self._points @ center.T) - 0.5 * (self._points.square() @ precision.T + rest)  # [P, n]
        belongs = self._belonging(labels).to(logits)
        logits = logits.masked_fill(belongs == 0, -math.inf)

        top = torch.maximum(self._top, logits.detach().amax(1, keepdim=True))
        kept, weights = (self._top - top).exp(), (logits - top).exp()
        self._precision = kept * self._precision + weights @ precision
        self._center = kept * self._center + weights @ center
        self._weight = kept * self._weight + weights.sum(1, keepdim=True)
        self._count = self._count + belongs.sum(1, keepdim=True)
        self._top = top

    def velocity(self) -> torch.Tensor:
        """v* [P, D]."""
        self._check()
        center, precision = self._center / self._weight, self._precision / self._weight
        if not self._has_signal:
            return self._slope / self._noise * self._points - center
        noise = self._noise * (precision * self._points - self._signal * center)
        return self._slope * noise - (self._points - self._noise * noise) / self._signal

    @property
    def _has_signal(self) -> bool:
        """Whether x_t depends on the data. Otherwise V_i = 1, and averaging the centers averages the means."""
        return self._signal > LEAST_SIGNAL

    def log_density(self) -> torch.Tensor:
        """Log-density of x_t, [P]."""
        self._check()
        constant = 0.5 * self._points.shape[1] * math.log(2 * math.pi)
        return (self._top + (self._weight / self._count).log())[:, 0] - constant

    def _belonging(self, labels: torch.Tensor) -> torch.Tensor:
        """Whether each component has each point's label, or the point has the null class, [P, n]."""
        if self._labels is None:
            return labels.new_ones(len(self._points), len(labels))
        return (self._labels[:, None] == labels) | (self._labels[:, None] == self._classes)

    def _check(self) -> None:
        if self._labels is not None and not bool(self._count.all()):
            missing = self._labels[self._count[:, 0] == 0].unique().tolist()
            raise ValueError(f"no component has the label {', '.join(map(str, missing))}")


def _sum_of_logs(values: torch.Tensor) -> torch.Tensor:
    """The sum of logarithms over the last dimension of [n, D], [n]. Products of up to 8 values save logarithms."""
    group = math.gcd(values.shape[1], 8)
    return values.unflatten(1, (-1, group)).prod(2).log().sum(1)
