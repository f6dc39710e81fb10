"""What layers ask that have a form of their own for a compiler."""

import torch

__all__ = ["compiled_for_a_cpu"]


def compiled_for_a_cpu(tensor: torch.Tensor) -> bool:
    """Whether the code that handles `tensor` is being compiled, for a CPU."""
    return torch.compiler.is_compiling() and tensor.device.type == "cpu"
