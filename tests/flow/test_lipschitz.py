"""Spectral and logarithmic norms of matrices and of a network with attention agree with dense linear algebra."""

import pytest
import torch

from flow.lipschitz import jacobian_norm, largest_eigenvalue, logarithmic_norm


def linear(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x.flatten(1) @ matrix.T).view_as(x)


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_norms_of_a_linear_map_are_those_of_its_matrix() -> None:
    matrix, x = points(6, 6), points(3, 2, 1, 3, seed=1)
    norm = jacobian_norm(lambda each: linear(matrix, each), x, points(3, 2, 1, 3, seed=2), steps=6)
    torch.testing.assert_close(norm, torch.linalg.matrix_norm(matrix, 2).expand(3))
    rate = logarithmic_norm(lambda each: linear(matrix, each), x, points(3, 2, 1, 3, seed=2), steps=6)
    torch.testing.assert_close(rate, torch.linalg.eigvalsh(-(matrix + matrix.T) / 2)[-1].expand(3))
    assert (rate < norm).all()


def test_the_logarithmic_norm_may_be_negative() -> None:
    x = points(2, 4)
    rate = logarithmic_norm(lambda each: 3 * each, x, points(2, 4, seed=1))
    torch.testing.assert_close(rate, torch.full((2,), -3.0, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_few_steps_estimate_from_below(steps: int) -> None:
    matrix = points(40, 40)
    matrix = matrix + matrix.T
    found = largest_eigenvalue(lambda each: linear(matrix, each), points(5, 40, seed=3), steps)
    assert (found <= torch.linalg.eigvalsh(matrix)[-1] + 1e-9).all()
    assert steps < 8 or (found > 0.8 * torch.linalg.eigvalsh(matrix)[-1]).all()


def test_norms_of_attention_are_those_of_its_dense_jacobian() -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64).requires_grad_(False)

    def attend(x: torch.Tensor) -> torch.Tensor:
        q = x.view(-1, 2, 3, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(q, q * 2, q)
        return attended.view_as(x) @ layer.out_proj.weight

    x = points(2, 3, 4, seed=1)
    found = jacobian_norm(attend, x, points(2, 3, 4, seed=2), steps=12)
    for index in range(2):
        dense = torch.autograd.functional.jacobian(lambda one: attend(one[None])[0], x[index]).reshape(12, 12)
        assert found[index].item() == pytest.approx(torch.linalg.matrix_norm(dense, 2).item(), rel=1e-6)


def test_more_steps_than_the_krylov_space_has_dimensions_change_nothing() -> None:
    # Two distinct eigenvalues: two steps are exact, and rounding must not start another space.
    basis = torch.linalg.qr(points(12, 12)).Q
    matrix = basis @ torch.diag(torch.tensor([-5.0] * 6 + [-2.0] * 6, dtype=torch.float64)) @ basis.T
    found = largest_eigenvalue(lambda each: linear(matrix, each), points(4, 12, seed=1), 12)
    torch.testing.assert_close(found, torch.full((4,), -2.0, dtype=torch.float64))


def test_a_large_gap_in_the_spectrum_does_not_spoil_orthogonality() -> None:
    # In float32, one outlying eigenvalue makes plain Lanczos lose orthogonality and find it several times.
    basis = torch.linalg.qr(points(60, 60)).Q
    values = torch.linspace(0, 1, 60, dtype=torch.float64)
    values[-1] = 1e6
    matrix = basis @ torch.diag(values) @ basis.T
    found = largest_eigenvalue(lambda each: linear(matrix, each), points(3, 60, seed=1), 40)
    torch.testing.assert_close(found, torch.full((3,), 1e6, dtype=torch.float64))
