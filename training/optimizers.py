"""Optimizers by name, which skip a step by themselves: where `found_inf` is 1, weights and moments stay as they are.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) is torch's fused one, which has that switch. Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon) moves a hidden matrix along the orthogonal matrix nearest to its momentum, which
learns more from each image; embeddings, biases, first and last layer are left to AdamW.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from options import UsageError, option
from runtime.parallel import arranged_like

__all__ = ["Muon", "OptimizerOptions", "load_optimizer_state", "make_optimizers", "orthogonalise"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose iteration drives singular values to about 1
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer: str = option(
        "adamw",
        "adamw, or muon, which leaves the matrices of DiT's blocks to Muon",
        choices=("adamw", "muon"),
        common=True,
    )
    lr: float = option(5e-4, "learning rate", minimum=0, on_resume="on_request", common=True)
    muon_lr: float = option(
        0.02, "learning rate of Muon's matrices, on the same course as lr", minimum=0, on_resume="on_request"
    )
    adam_betas: tuple[float, ...] = option((0.9, 0.999), "AdamW's two decay rates", minimum=0)
    weight_decay: float = option(0.0, "decay of the weights, relative to the learning rate", minimum=0)


def make_optimizers(
    network: nn.Module,
    options: OptimizerOptions,
    precision: str = "fp32",
    hidden_matrices: Sequence[nn.Parameter] = (),
) -> list[torch.optim.Optimizer]:
    """The optimizers of the network's trained parameters.

    A group's learning rate is `lr` times its entry "relative_lr". `precision` is the run's; `hidden_matrices` are the
    parameters that its family leaves to Muon.

    Raises:
        UsageError: Muon for a family without hidden matrices.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices: list[nn.Parameter] = []
    if options.optimizer == "muon":
        matrices = [parameter for parameter in hidden_matrices if parameter.requires_grad]
        if not matrices:
            raise UsageError("--optimizer muon is for DiT, whose blocks are made of matrices: choose --optimizer adamw")
    of_muon = {id(matrix) for matrix in matrices}
    others: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in of_muon], "relative_lr": 1.0}]
    beta1, beta2 = options.adam_betas
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, betas=(beta1, beta2), weight_decay=options.weight_decay, fused=True)
    ]
    if matrices:
        relative = options.muon_lr / options.lr if options.lr else 0.0
        optimizers.append(
            Muon(
                [{"params": matrices, "relative_lr": relative}],
                options.muon_lr,
                weight_decay=options.weight_decay,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            )
        )
    return optimizers


def load_optimizer_state(optimizer: torch.optim.Optimizer, moments: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Give an optimizer the state of its parameters, by their number; its rates stay as they are.

    Moments are brought into the order in memory that their parameter has: torch's fused AdamW takes it for granted, and would
    move each weight by the moments of another.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: arranged_like(value, parameters[number]) for name, value in values.items()}
        for number, values in moments.items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices.

    Args:
        params: parameters [rows, columns], or groups of them.
        lr: learning rate; an update has a spectral norm of about lr max(1, rows / columns)^(1/2).
        momentum: decay of the momentum, which is Nesterov's.
        weight_decay: decoupled, relative to the learning rate.
        dtype: of the iteration that orthogonalises; it needs no more than bfloat16.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; matrices of one shape go through the iteration together."""
        for group in self.param_groups:
            given = [matrix for matrix in group["params"] if matrix.grad is not None]
            for shape, alike in groupby(sorted(given, key=lambda p: p.shape), key=lambda p: p.shape):
                self._advance([*alike], shape, group)

    def _advance(self, matrices: list[torch.Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        gradient = torch.stack([matrix.grad for matrix in matrices])  # type: ignore[misc]
        good = gradient.new_ones(()) if self.found_inf is None else 1 - self.found_inf
        gradient = torch.where(good > 0, gradient, 0)
        for matrix in matrices:
            if "momentum" not in self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradient.unbind(), [(1 - group["momentum"]) * good] * len(averages))
        step = gradient.lerp(torch.stack(averages), group["momentum"])
        rate = group["lr"] * good
        if group["weight_decay"]:
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        update = orthogonalise(step.to(self.dtype)).to(step.dtype) * (rate * max(1, shape[0] / shape[1]) ** 0.5)
        torch._foreach_sub_(matrices, update.unbind())


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix [N, rows, columns] with singular value decomposition U S V^T, nearly: S becomes 0.7 to 1.2.

    A Newton-Schulz iteration, in the matrices' precision.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
