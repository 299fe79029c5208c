"""How much of each patient's gradient counts."""

import torch
from torch import Tensor

CLIP_SLACK = 1e-6
"""Added to every norm, so that rounding never lets a contribution pass the bound."""


def clip_coefficients(norms: Tensor, bound: float, real: int) -> Tensor:
    """Return ``(B,)`` factors min(1, bound / (norm + slack)); 0 for padding and for norms that are not finite.

    Args:
        norms: ``(B,)``.
        bound: ``max_grad_norm``.
        real: How many of the rows are patients; the rest are padding.
    """
    factors = (bound / (norms + CLIP_SLACK)).clamp(max=1.0)
    counted = norms.isfinite() & (torch.arange(len(norms), device=norms.device) < real)
    return torch.where(counted, factors, torch.zeros_like(factors))
