"""How fast a map or a flow spreads nearby points: spectral norms of Jacobians and logarithmic norms of velocities.

All quantities are estimated at given points by the Lanczos method (Golub & Van Loan, Matrix Computations, section 10.1) with
Jacobian-vector and vector-Jacobian products. A Lanczos estimate never exceeds the true eigenvalue, and other points may have
larger ones. So the largest estimate approaches a Lipschitz constant from below, and certifies nothing.
"""

import warnings
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["jacobian_norm", "largest_eigenvalue", "logarithmic_norm"]

Map = Callable[[torch.Tensor], torch.Tensor]
# The first product makes torch compile its own functions by a way that it deprecates.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
EXHAUSTED = 1e-6  # a Krylov space ends where the next direction is shorter than this share of the largest number


def jacobian_norm(function: Map, x: torch.Tensor, start: torch.Tensor, steps: int = 12) -> torch.Tensor:
    """Largest singular value [B] of the Jacobian of `function` at each of the points x [B, ...].

    Args:
        function: maps [B, ...] to [B, ...] and treats the points independently.
        x: the points.
        start: random directions like x.
        steps: Lanczos steps; each takes one product with the Jacobian and one with its transpose.
    """

    def squared(direction: torch.Tensor) -> torch.Tensor:
        return _transposed_product(function, x, _product(function, x, direction))

    return largest_eigenvalue(squared, start, steps).clamp(min=0).sqrt()


def logarithmic_norm(velocity: Map, x: torch.Tensor, start: torch.Tensor, steps: int = 12) -> torch.Tensor:
    """Largest eigenvalue [B] of the symmetric part of -dv/dx at each of the points x [B, ...].

    It is the largest rate at which two nearby solutions of dx/dt = v(x) move apart as t decreases. It may be negative, and it
    never exceeds the Jacobian's norm.

    Args:
        velocity: v at one time; it maps [B, ...] to [B, ...] and treats the points independently.
        x: the points.
        start: random directions like x.
        steps: Lanczos steps; each takes one product with the Jacobian and one with its transpose.
    """

    def symmetric_part(direction: torch.Tensor) -> torch.Tensor:
        return -(_product(velocity, x, direction) + _transposed_product(velocity, x, direction)) / 2

    return largest_eigenvalue(symmetric_part, start, steps)


def largest_eigenvalue(operator: Map, start: torch.Tensor, steps: int) -> torch.Tensor:
    """Largest eigenvalue [B] of a batch of symmetric operators, estimated from below by Lanczos steps.

    Args:
        operator: maps directions [B, ...] to [B, ...]; linear and symmetric in each.
        start: directions that are not orthogonal to the wanted eigenvector, such as random ones.
        steps: number of steps; as many as dimensions give the exact value.
    """
    shape, steps = start.shape, min(steps, start[0].numel())
    direction = torch.nn.functional.normalize(start.flatten(1).double(), dim=1)
    basis: list[torch.Tensor] = []
    tridiagonal = direction.new_zeros(len(start), steps, steps)
    alive = direction.new_ones(len(start))
    for step in range(steps):
        basis.append(direction)
        image = operator(direction.view(shape).to(start.dtype)).flatten(1).double()
        own = (image * direction).sum(1)
        # Where the Krylov space is exhausted, the direction is 0. The first Rayleigh quotient never exceeds the eigenvalue.
        tridiagonal[:, step, step] = torch.where(alive > 0, own, tridiagonal[:, 0, 0])
        for known in basis * 2:  # orthogonalize twice, because rounding spoils the first time
            image = image - (image * known).sum(1, keepdim=True) * known
        length = image.norm(dim=1)
        alive = alive * (length > EXHAUSTED * tridiagonal.abs().amax((1, 2)))
        if step + 1 < steps:
            tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = length * alive
        direction = image / length.clamp(min=1e-300)[:, None] * alive[:, None]
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]


def _product(function: Map, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        product: torch.Tensor = torch.func.jvp(function, (x,), (direction,))[1]
    return product


def _transposed_product(function: Map, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        product: torch.Tensor = torch.func.vjp(function, x)[1](direction)[0]
    return product
