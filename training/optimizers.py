"""Optimizers by name. Where their `found_inf` is 1, they skip the step: weights and optimizer state do not change.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) is torch's fused implementation, which supports `found_inf`. Muon (Jordan
et al. 2024, https://kellerjordan.github.io/posts/muon) updates a hidden matrix by the orthogonal matrix nearest to its
momentum, which learns more from each image. AdamW trains all other parameters: embeddings, biases, first and last layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from options import UsageError, option
from runtime.processes.parallel import arranged_like

__all__ = [
    "MUON_MATRICES",
    "Muon",
    "OptimizerOptions",
    "load_optimizer_state",
    "make_optimizers",
    "muon_matrices",
    "orthogonalize",
]

# Parts of parameter names whose hidden matrices AdamW trains, by the choice of matrices for Muon.
MUON_MATRICES: dict[str, tuple[str, ...]] = {"blocks": (), "attention_mlp": ("adaLN_modulation", "shared_adaLN")}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of a quintic that drives singular values toward 1
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer."""

    optimizer: str = option(
        "adamw",
        "adamw, or muon: Muon for the matrices in DiT blocks, AdamW for the rest",
        choices=("adamw", "muon"),
        common=True,
    )
    lr: float = option(5e-4, "learning rate", minimum=0, on_resume="on_request", common=True)
    muon_lr: float = option(
        0.02, "learning rate of Muon's matrices; follows the schedule of lr", minimum=0, on_resume="on_request"
    )
    muon_matrices: str = option(
        "blocks",
        "Muon's matrices: all of the blocks, or those of attention and MLP, which leaves the modulation (adaLN) to AdamW",
        choices=MUON_MATRICES,
    )
    adam_betas: tuple[float, ...] = option((0.9, 0.999), "beta1 and beta2 of AdamW", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay, multiplied by the learning rate", minimum=0)


def make_optimizers(
    network: nn.Module,
    options: OptimizerOptions,
    precision: str = "fp32",
    hidden_matrices: Sequence[nn.Parameter] = (),
) -> list[torch.optim.Optimizer]:
    """Create the optimizers of the network's trainable parameters.

    The learning rate of a parameter group is `lr` times its entry "relative_lr".

    Args:
        network: the velocity network.
        options: the optimizer and its settings.
        precision: the run's precision.
        hidden_matrices: the parameters that Muon may train.

    Raises:
        UsageError: Muon is chosen, but the network has no hidden matrices.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    matrices: list[nn.Parameter] = []
    if options.optimizer == "muon":
        matrices = muon_matrices(network, options, hidden_matrices)
        if not matrices:
            raise UsageError(
                "--optimizer muon needs a network with hidden matrices, such as DiT: choose --optimizer adamw"
            )
    muon_ids = {id(matrix) for matrix in matrices}
    others: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in muon_ids], "relative_lr": 1.0}]
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


def muon_matrices(
    network: nn.Module, options: OptimizerOptions, hidden_matrices: Sequence[nn.Parameter]
) -> list[nn.Parameter]:
    """The trainable ones of `hidden_matrices` that Muon trains, according to the options."""
    excluded = MUON_MATRICES[options.muon_matrices]
    others = {id(p) for name, p in network.named_parameters() if set(excluded) & set(name.split("."))}
    return [matrix for matrix in hidden_matrices if matrix.requires_grad and id(matrix) not in others]


def load_optimizer_state(optimizer: torch.optim.Optimizer, states: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Load the state of an optimizer's parameters, by parameter number. Learning rates do not change.

    Each state gets the memory format of its parameter. torch's fused AdamW assumes that they match, and would otherwise
    update weights with the state of other weights.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: arranged_like(value, parameters[number]) for name, value in values.items()}
        for number, values in states.items()
    }
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalized updates, for matrices.

    The kernel of a convolution counts as a matrix with one row per output channel.

    Args:
        params: parameters [rows, columns] or [rows, ...], or groups of them.
        lr: learning rate. The spectral norm of an update is about lr max(1, rows / columns)^(1/2).
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay, multiplied by the learning rate.
        dtype: dtype of the orthogonalization; bfloat16 suffices.
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
        """Take one step. Matrices of equal shape are orthogonalized as one batch."""
        for group in self.param_groups:
            given = [matrix for matrix in group["params"] if matrix.grad is not None]
            for shape, alike in groupby(sorted(given, key=lambda p: p.shape), key=lambda p: p.shape):
                self._update([*alike], shape, group)

    def _update(self, matrices: list[torch.Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
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
        columns = shape.numel() // shape[0]
        direction = orthogonalize(step.to(self.dtype).flatten(2)).to(step.dtype)
        update = direction * (rate * max(1, shape[0] / columns) ** 0.5)
        torch._foreach_sub_(matrices, update.view_as(step).unbind())


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of matrices [N, rows, columns] by values between about 0.7 and 1.2.

    The result approximates U V^T for the singular value decomposition U S V^T. A Newton-Schulz iteration computes it in the
    matrices' dtype.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
