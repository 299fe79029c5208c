"""Book-keeping for linear layers and embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.dp.tape import (
    Contribution,
    Tape,
    by_patient,
    counted,
    gram,
    gram_is_cheaper,
    gram_norm,
    norm_of_grams,
    scaled,
    square_norm,
    weighted_sum,
)


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
    if gradients is None:
        norms = gram_norm(x, g, int(bias is not None))
        return Contribution(
            _present(weight, bias), norms, lambda c: _weighted(x, g, c)[: 1 + (bias is not None)], lambda: (x, g)
        )
    norms = square_norm(gradients)
    if bias is None:
        return Contribution((weight,), norms, lambda c: (weighted_sum(gradients, c),), lambda: (gradients,))
    # Norm and sum of the bias come from the same numbers, as the weight's do: positions may cancel.
    of_bias = g.sum(1)
    return Contribution(
        (weight, bias),
        norms + square_norm(of_bias),
        lambda c: (weighted_sum(gradients, c), weighted_sum(of_bias, c)),
        lambda: (gradients, of_bias),
    )


def _present(weight: nn.Parameter, bias: nn.Parameter | None) -> tuple[nn.Parameter, ...]:
    return (weight,) if bias is None else (weight, bias)


def _weighted(x: Tensor, g: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    of_outputs, of_inputs = scaled(g, coefficients).flatten(0, 1), counted(x, coefficients).flatten(0, 1)
    return of_outputs.T @ of_inputs, of_outputs.sum(0)


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
        norms = norm_of_grams(same, gram(g))

        def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
            of_outputs = scaled(g, coefficients).flatten(0, 1)
            return (torch.zeros_like(weight).index_add_(0, t.flatten(), of_outputs),)

        tape.add(Contribution((weight,), norms, weighted, lambda: (t, g)))
        return None, None, None, None
