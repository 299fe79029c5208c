"""How much of each patient's gradient counts."""

import torch
from torch import Tensor

CLIP_SLACK = 1e-6
"""Added to every norm, so that rounding never lets a contribution pass the bound."""
_ROUNDINGS = 32.0
"""And so many roundings of the norm itself, relative to it: long sums in single precision err to one side."""


def clip_coefficients(norms: Tensor, bound: float, real: int) -> Tensor:
    """Return ``(B,)`` factors min(1, bound / (norm·(1 + 32ε) + slack)); 0 for padding and norms that are not finite.

    Args:
        norms: ``(B,)``.
        bound: ``max_grad_norm``.
        real: How many of the rows are patients; the rest are padding.
    """
    relative = 1.0 + _ROUNDINGS * torch.finfo(norms.dtype).eps
    factors = (bound / (norms * relative + CLIP_SLACK)).clamp(max=1.0)
    counted = norms.isfinite() & (torch.arange(len(norms), device=norms.device) < real)
    return torch.where(counted, factors, torch.zeros_like(factors))
