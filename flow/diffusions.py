"""Diffusion coefficients w(t) of the reverse SDE, by name (Ma et al. 2024, arXiv:2401.08740, section 2.4).

Any w >= 0 preserves the marginals. `kl` minimizes a bound on the KL divergence; on the straight path it is 2 t / (1 - t).
`linear` equals `sigma` on this path. The SDE adds noise sqrt(w) dW as in the paper. SiT's published code defines its forms,
except `kl`, with sqrt(2 w) dW, so its norm 1 is our norm 2.
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
