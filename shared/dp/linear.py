"""Book-keeping for linear layers and embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, by_patient, gram_is_cheaper, gram_norm, square_norm


def linear(module: nn.Linear, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.Linear`` on ``(N, ..., d)``."""
    output: Tensor = _Linear.apply(inputs, module.weight, module.bias, tape)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, tape: Tape) -> Tensor:
        ctx.tape, ctx.parameters = tape, (weight, bias)
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        patients = ctx.tape.patients
        x, g = by_patient(inputs, patients), by_patient(output_gradient, patients)
        ctx.tape.add(dense(ctx.parameters, x, g))
        return output_gradient @ weight if ctx.needs_input_grad[0] else None, None, None, None


def dense(parameters: tuple[nn.Parameter, nn.Parameter | None], x: Tensor, g: Tensor) -> Contribution:
    """Return the contribution of weight ``(p, d)`` and bias ``(p,)``, used at ``(B, T, d)`` and ``(B, T, p)``."""
    weight, bias = parameters
    gradients = None if gram_is_cheaper(x.shape[1], x.shape[2], g.shape[2]) else g.transpose(1, 2) @ x
    norms = gram_norm(x, g, int(bias is not None)) if gradients is None else square_norm(gradients)
    if bias is None:
        return Contribution((weight,), norms, lambda c: (_weighted(gradients, x, g, c),))
    if gradients is not None:
        norms = norms + square_norm(g.sum(1))

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        return _weighted(gradients, x, g, coefficients), torch.einsum("b,btp->p", coefficients, g)

    return Contribution((weight, bias), norms, weighted)


def _weighted(gradients: Tensor | None, x: Tensor, g: Tensor, coefficients: Tensor) -> Tensor:
    if gradients is not None:
        return (coefficients @ gradients.flatten(1)).view(gradients.shape[1:])
    scaled = g * coefficients[:, None, None]
    return scaled.flatten(0, 1).T @ x.flatten(0, 1)


def embedding(module: nn.Embedding, tape: Tape, tokens: Tensor) -> Tensor:
    """``nn.Embedding`` on integer ``(N, ...)``."""
    output: Tensor = _Embedding.apply(tokens, module.weight, module.padding_idx, tape)  # type: ignore[no-untyped-call]
    return output


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int | None, tape: Tape) -> Tensor:
        ctx.tape, ctx.weight, ctx.padding = tape, weight, padding
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[None, ...]:
        (tokens,) = ctx.saved_tensors
        tape, weight, padding = ctx.tape, ctx.weight, ctx.padding
        t = tokens.reshape(tape.patients, -1)
        g = by_patient(output_gradient, tape.patients)
        if padding is not None:
            g = g * (t != padding)[..., None]
        # Rows of one token add up: the Gram matrix of one-hot inputs tells which positions share a token.
        same = (t[:, :, None] == t[:, None, :]).to(g.dtype)
        norms = (same * (g @ g.transpose(1, 2))).sum((1, 2))

        def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
            scaled = (g * coefficients[:, None, None]).flatten(0, 1)
            return (torch.zeros_like(weight).index_add_(0, t.flatten(), scaled),)

        tape.add(Contribution((weight,), norms, weighted))
        return None, None, None, None
