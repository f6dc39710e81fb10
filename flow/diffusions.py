"""Diffusion coefficients w(t) of the reverse SDE, by name (Ma et al. 2024, arXiv:2401.08740, section 2.4).

Any w >= 0 preserves the marginals. `kl` minimizes a bound on the KL divergence; on the straight path it is 2 t / (1 - t).
`linear` equals `sigma` on this path. As in the paper, the SDE adds the noise sqrt(w) dW. SiT's published code adds
sqrt(2 w) dW, except for `kl`, so its norm 1 corresponds to norm 2 here.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["DIFFUSIONS"]

DIFFUSIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.ones_like,
    "sigma": lambda t: t,
    "linear": lambda t: t,
    "decreasing": lambda t: (1 - np.cos(np.pi * t)) ** 2 / 4,  # decreases from noise to data
    "increasing_decreasing": lambda t: np.sin(np.pi * t) ** 2,
    "kl": lambda t: 2 * t / (1 - t),
}
