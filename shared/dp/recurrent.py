"""Book-keeping for LSTM and GRU: a scan whose backward pass emits only the gates' gradients.

With gate gradients b_t, inputs x_t and previous states h_t a patient's squared norm is, biases included,

    Σ_{s,t} (b_s·b_t)(x_s·x_t + 1) + Σ_{s,t} (b_s·b_t)(h_s·h_t + 1)

and the clipped sum is one matrix product per weight. The GRU's reset gate acts on the hidden side before the sum,
so its hidden side has gate gradients of its own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.dp.scans import Memory, gru_backward, gru_forward, lstm_backward, lstm_forward
from shared.dp.tape import (
    Contribution,
    Tape,
    counted_,
    gram,
    gram_is_cheaper,
    gram_norm,
    norm_of_grams,
    scaled,
    square_norm,
    weighted_sum,
)
from shared.errors import FederationError

Output = tuple[Tensor, Tensor]


def lstm(module: nn.LSTM, tape: Tape, inputs: Tensor, mask: Tensor | None = None) -> Output:
    """``nn.LSTM`` (batch first) on ``(N, T, d)``; returns the outputs ``(N, T, D·H)`` and the last states.

    ``mask`` ``(N, T)`` is 1 where a sequence goes on; where it is 0 the state is carried over unchanged.
    """
    return _stack(module, tape, inputs, mask, _LSTM)


def gru(module: nn.GRU, tape: Tape, inputs: Tensor, mask: Tensor | None = None) -> Output:
    """``nn.GRU``; see :func:`lstm`."""
    return _stack(module, tape, inputs, mask, _GRU)


def _stack(
    module: nn.RNNBase, tape: Tape, inputs: Tensor, mask: Tensor | None, scan: type[torch.autograd.Function]
) -> Output:
    """Run all layers and directions. A cell state is not returned: nothing may build a loss on it unclipped."""
    if not isinstance(inputs, Tensor) or not module.batch_first or module.proj_size:
        raise FederationError("Recurrent layers take batch-first tensors, with a mask for lengths, no projections.")
    directions, finals = 2 if module.bidirectional else 1, []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + ("_reverse" if direction else "")
            weights = [getattr(module, f"{name}_{suffix}", None) for name in _WEIGHTS]
            x, m = (inputs.flip(1), None if mask is None else mask.flip(1)) if direction else (inputs, mask)
            states: Tensor = scan.apply(x, m, *weights, tape)
            finals.append(states[:, -1])
            outputs.append(states.flip(1) if direction else states)
        inputs = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        if module.dropout and layer < module.num_layers - 1:
            inputs = F.dropout(inputs, module.dropout, module.training)
    return inputs, torch.stack(finals)


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps, memory = _steps(mask, inputs), _memory(tape, w_hh)
        gates = _project(inputs, w_ih, None if b_ih is None else b_ih + b_hh, memory)
        hiddens, *rest = lstm_forward(gates, w_hh, steps, memory)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, *rest)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, cells, squashed, activations = ctx.saved_tensors
        of_outputs, memory = output_gradient.transpose(0, 1), _memory(ctx.tape, w_hh)
        gates = lstm_backward(of_outputs, cells, squashed, activations, w_hh, ctx.mask, memory)
        ctx.tape.add(_one_sided(ctx.parameters, inputs.transpose(0, 1), hiddens, gates, ctx.tape.patients, memory))
        return _input_gradient(ctx, gates, w_ih), *[None] * 6


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps, memory = _steps(mask, inputs), _memory(tape, w_hh)
        hiddens, *rest = gru_forward(_project(inputs, w_ih, b_ih, memory), w_hh, b_hh, steps, memory)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, *rest)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, activations, candidates = ctx.saved_tensors
        of_outputs, memory = output_gradient.transpose(0, 1), _memory(ctx.tape, w_hh)
        gates = gru_backward(of_outputs, hiddens, activations, candidates, w_hh, ctx.mask, memory)
        hidden_side, of_candidates = gates
        ctx.tape.add(_two_sided(ctx.parameters, inputs.transpose(0, 1), hiddens, gates, ctx.tape.patients, memory))
        if not ctx.needs_input_grad[0]:
            return None, *[None] * 6
        shared = hidden_side.shape[-1] - of_candidates.shape[-1]
        gradient = hidden_side[..., :shared] @ w_ih[:shared] + of_candidates @ w_ih[shared:]
        return gradient.transpose(0, 1), *[None] * 6


def _steps(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return a mask ``(N, T)`` as ``(T, N, 1)`` of the inputs' type."""
    return None if mask is None else mask.t().to(inputs.dtype)[..., None]


def _memory(tape: Tape, weight: Tensor) -> Memory:
    """Return the layer's memory. What leaves the layer must not lie there: the next pass overwrites it."""
    return lambda name, shape: tape.scratch((name, id(weight)), shape, weight)


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None, memory: Memory) -> Tensor:
    """Return the input side of all gates ``(T, N, kH)`` at once."""
    records, steps, _ = inputs.shape
    gates, offset = (
        memory("gates", (steps, records, len(weight))),
        weight.new_zeros(len(weight)) if bias is None else bias,
    )
    torch.addmm(offset, inputs.transpose(0, 1).flatten(0, 1), weight.t(), out=gates.flatten(0, 1))
    return gates


def _input_gradient(ctx: Any, gates: Tensor, weight: Tensor) -> Tensor | None:
    return (gates @ weight).transpose(0, 1) if ctx.needs_input_grad[0] else None


def _before(hiddens: Tensor) -> Tensor:
    """Return the state that each step started from, ``(T, N, H)``."""
    return torch.cat([torch.zeros_like(hiddens[:1]), hiddens[:-1]])


@dataclass(frozen=True, eq=False)
class _Product:
    """Σ_t g_t z_tᵀ of gate gradients ``(T, N, k)`` and inputs ``(T, N, D)``, of every patient or over all of them.

    Attributes:
        by_patient: Every patient's ``(B, k, D)``, where forming it is cheaper than Gram products.
    """

    gates: Tensor
    inputs: Tensor
    by_patient: Tensor | None

    @classmethod
    def of(cls, gates: Tensor, inputs: Tensor, patients: int, *, formed: bool) -> "_Product":
        """Form every patient's product if wanted."""
        products = _positions(gates, patients).transpose(1, 2) @ _positions(inputs, patients) if formed else None
        return cls(gates, inputs, products)

    def of_patients(self, patients: int) -> tuple[Tensor, ...]:
        """Return what each patient puts into the weighted sum."""
        if self.by_patient is not None:
            return (self.by_patient,)
        return _positions(self.gates, patients), _positions(self.inputs, patients)

    def weighted(self, coefficients: Tensor) -> Tensor:
        """Return the patients' weighted sum ``(k, D)``; scaling the inputs, the smaller side, is enough."""
        if self.by_patient is not None:
            return weighted_sum(self.by_patient, coefficients)
        steps, records, _ = self.gates.shape
        by_row = coefficients.repeat_interleave(records // len(coefficients)).repeat(steps)[:, None]
        return counted_(self.gates.flatten(0, 1), by_row).t() @ scaled(self.inputs.flatten(0, 1), by_row)


def _joined(*sides: Tensor, bias: bool, memory: Memory) -> Tensor:
    """Return the inputs side by side, with a one for the bias at the end."""
    one = [sides[0].new_ones(*sides[0].shape[:2], 1)] if bias else []
    whole = [*sides, *one]
    width = sum(side.shape[-1] for side in whole)
    return torch.cat(whole, dim=-1, out=memory(f"joined {len(sides)}", (*sides[0].shape[:2], width)))


def _one_sided(
    parameters: tuple[nn.Parameter | None, ...],
    x: Tensor,
    hiddens: Tensor,
    gates: Tensor,
    patients: int,
    memory: Memory,
) -> Contribution:
    """The contribution of an LSTM, whose input and hidden side have the same gate gradients ``(T, N, 4H)``.

    Both weights are one: [W_ih, W_hh] used at positions [x, h]. Both biases have one gradient, which counts twice.
    """
    bias, sizes = parameters[2] is not None, (x.shape[-1], hiddens.shape[-1])
    joined = _joined(x, _before(hiddens), bias=bias, memory=memory)
    formed = not gram_is_cheaper(_count(gates, patients), joined.shape[-1], gates.shape[-1])
    product = _Product.of(gates, joined, patients, formed=formed)
    if product.by_patient is None:
        norms = gram_norm(_positions(joined, patients), _positions(gates, patients), int(bias))
    else:
        norms = square_norm(product.by_patient)
        if bias:
            norms = norms + square_norm(product.by_patient[..., -1])

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        of_x, of_h, *of_bias = product.weighted(coefficients).split([*sizes, *[1] * bias], dim=1)
        return (of_x, of_h, *(b[:, 0].clone() for b in of_bias * 2))

    of_patients = partial(product.of_patients, patients)
    return Contribution(tuple(p for p in parameters if p is not None), norms, weighted, of_patients)


def _two_sided(
    parameters: tuple[nn.Parameter | None, ...],
    x: Tensor,
    hiddens: Tensor,
    gates: tuple[Tensor, Tensor],
    patients: int,
    memory: Memory,
) -> Contribution:
    """The contribution of a GRU, whose sides share the gradients of r and z and have their own of n.

    The hidden side's gates are multiplied with [x, h, 1] and the input side's n with [x, 1]; of the first product, n
    times x belongs to no weight, and r and z times the 1 count twice.
    """
    bias, d, size = parameters[2] is not None, x.shape[-1], hiddens.shape[-1]
    hidden_side, of_candidates = gates
    h, shared = _before(hiddens), hidden_side.shape[-1] - size
    formed = not gram_is_cheaper(_count(hidden_side, patients), d + size, hidden_side.shape[-1])
    whole = _Product.of(hidden_side, _joined(x, h, bias=bias, memory=memory), patients, formed=formed)
    candidates = _Product.of(of_candidates, _joined(x, bias=bias, memory=memory), patients, formed=formed)
    if whole.by_patient is None or candidates.by_patient is None:
        sides = x, h, hidden_side[..., :shared], of_candidates, hidden_side[..., shared:]
        of_x, of_h, of_shared, of_n, of_own = (gram(_positions(side, patients)) for side in sides)
        norms = norm_of_grams(of_x + bias, of_shared + of_n) + norm_of_grams(of_h + bias, of_shared + of_own)
    else:
        whole.by_patient[:, shared:, :d] = 0.0  # taking its square off again could leave a norm that is too small
        norms = square_norm(whole.by_patient) + square_norm(candidates.by_patient)
        if bias:
            norms = norms + square_norm(whole.by_patient[:, :shared, -1])

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        both, n = whole.weighted(coefficients), candidates.weighted(coefficients)
        weights = torch.cat([both[:shared, :d], n[:, :d]]), both[:, d : d + size]
        return (*weights, torch.cat([both[:shared, -1], n[:, -1]]), both[:, -1].clone()) if bias else weights

    def of_patients() -> tuple[Tensor, ...]:
        return whole.of_patients(patients) + candidates.of_patients(patients)

    return Contribution(tuple(p for p in parameters if p is not None), norms, weighted, of_patients)


def _count(gates: Tensor, patients: int) -> int:
    """Return how many positions each patient has."""
    return gates.shape[0] * gates.shape[1] // patients


def _positions(tensor: Tensor, patients: int) -> Tensor:
    """Return ``(T, N, d)`` as ``(B, N/B·T, d)``; without a copy where a patient has one record."""
    steps, records, width = tensor.shape
    if records == patients:
        return tensor.transpose(0, 1)
    return tensor.view(steps, patients, -1, width).permute(1, 2, 0, 3).reshape(patients, -1, width)
