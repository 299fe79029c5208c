"""Book-keeping for LSTM and GRU: a scan whose backward pass emits only the gates' gradients.

With gate gradients b_t, inputs x_t and previous states h_t a patient's squared norm is, biases included,

    Σ_{s,t} (b_s·b_t)(x_s·x_t + 1) + Σ_{s,t} (b_s·b_t)(h_s·h_t + 1)

and the clipped sum is one matrix product per weight. The GRU's reset gate acts on the hidden side before the sum,
so its hidden side has gate gradients of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.dp.compiled import compiled
from shared.dp.tape import Contribution, Tape, by_patient, gram_norm, square_norm
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


@compiled
def lstm_forward(gates: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 4H)`` input-side gates; return hidden and cell states ``(T, N, H)`` and activations."""
    hidden = gates.new_zeros(gates.shape[1], weight.shape[1])
    cell = torch.zeros_like(hidden)
    transposed = weight.t()
    hiddens, cells, activations = [], [], []
    for t in range(gates.shape[0]):
        i, f, g, o = torch.addmm(gates[t], hidden, transposed).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new_cell = f * cell + i * g
        new_hidden = o * new_cell.tanh()
        if mask is not None:
            keep = mask[t][:, None]
            new_cell = keep * new_cell + (1 - keep) * cell
            new_hidden = keep * new_hidden + (1 - keep) * hidden
        hidden, cell = new_hidden, new_cell
        hiddens.append(hidden)
        cells.append(cell)
        activations.append(torch.cat([i, f, g, o], 1))
    return torch.stack(hiddens), torch.stack(cells), torch.stack(activations)


@compiled
def lstm_backward(
    output_gradient: Tensor, cells: Tensor, activations: Tensor, weight: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the gates' gradients ``(T, N, 4H)`` from the outputs' ``(T, N, H)``."""
    hidden_gradient = torch.zeros_like(cells[0])
    cell_gradient = torch.zeros_like(cells[0])
    gradients = []
    for t in range(cells.shape[0] - 1, -1, -1):
        i, f, g, o = activations[t].chunk(4, 1)
        before = cells[t - 1] if t else torch.zeros_like(cells[0])
        now = (f * before + i * g).tanh() if mask is not None else cells[t].tanh()
        hidden_gradient = hidden_gradient + output_gradient[t]
        through, carried_hidden, carried_cell = hidden_gradient, None, None
        through_cell = cell_gradient
        if mask is not None:
            keep = mask[t][:, None]
            carried_hidden, carried_cell = (1 - keep) * hidden_gradient, (1 - keep) * cell_gradient
            through, through_cell = keep * hidden_gradient, keep * cell_gradient
        through_cell = through_cell + through * o * (1 - now * now)
        gates = torch.cat(
            [
                through_cell * g * i * (1 - i),
                through_cell * before * f * (1 - f),
                through_cell * i * (1 - g * g),
                through * now * o * (1 - o),
            ],
            1,
        )
        gradients.append(gates)
        hidden_gradient, cell_gradient = gates @ weight, through_cell * f
        if carried_hidden is not None and carried_cell is not None:
            hidden_gradient, cell_gradient = hidden_gradient + carried_hidden, cell_gradient + carried_cell
    return torch.stack(gradients[::-1])


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps = None if mask is None else mask.t().to(inputs.dtype)
        bias = None if b_ih is None else b_ih + b_hh
        hiddens, cells, activations = lstm_forward(_project(inputs, w_ih, bias), w_hh, steps)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, cells, activations)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, cells, activations = ctx.saved_tensors
        gates = lstm_backward(output_gradient.transpose(0, 1), cells, activations, w_hh, ctx.mask)
        _note(ctx, inputs, hiddens, gates, gates)
        return _input_gradient(ctx, gates, w_ih), *[None] * 6


@compiled
def gru_forward(
    gates: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 3H)`` input-side gates; return hidden states, activations r, z, n and the hidden side of n."""
    hidden = gates.new_zeros(gates.shape[1], weight.shape[1])
    size = weight.shape[1]
    hiddens, activations, candidates = [], [], []
    for t in range(gates.shape[0]):
        own = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
        r, z = (gates[t][:, : 2 * size] + own[:, : 2 * size]).sigmoid().chunk(2, 1)
        candidate = own[:, 2 * size :]
        n = (gates[t][:, 2 * size :] + r * candidate).tanh()
        new = n + z * (hidden - n)
        if mask is not None:
            keep = mask[t][:, None]
            new = keep * new + (1 - keep) * hidden
        hidden = new
        hiddens.append(hidden)
        activations.append(torch.cat([r, z, n], 1))
        candidates.append(candidate)
    return torch.stack(hiddens), torch.stack(activations), torch.stack(candidates)


@compiled
def gru_backward(
    output_gradient: Tensor,
    hiddens: Tensor,
    activations: Tensor,
    candidates: Tensor,
    weight: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gates' gradients on the input side and on the hidden side, each ``(T, N, 3H)``."""
    gradient = torch.zeros_like(hiddens[0])
    input_side, hidden_side = [], []
    for t in range(hiddens.shape[0] - 1, -1, -1):
        r, z, n = activations[t].chunk(3, 1)
        before = hiddens[t - 1] if t else torch.zeros_like(hiddens[0])
        gradient = gradient + output_gradient[t]
        through, carried = gradient, None
        if mask is not None:
            keep = mask[t][:, None]
            through, carried = keep * gradient, (1 - keep) * gradient
        of_n = through * (1 - z) * (1 - n * n)
        of_rz = torch.cat([of_n * candidates[t] * r * (1 - r), through * (before - n) * z * (1 - z)], 1)
        own = torch.cat([of_rz, of_n * r], 1)
        input_side.append(torch.cat([of_rz, of_n], 1))
        hidden_side.append(own)
        gradient = through * z + own @ weight
        if carried is not None:
            gradient = gradient + carried
    return torch.stack(input_side[::-1]), torch.stack(hidden_side[::-1])


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps = None if mask is None else mask.t().to(inputs.dtype)
        hiddens, activations, candidates = gru_forward(_project(inputs, w_ih, b_ih), w_hh, b_hh, steps)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, activations, candidates)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, activations, candidates = ctx.saved_tensors
        input_side, hidden_side = gru_backward(
            output_gradient.transpose(0, 1), hiddens, activations, candidates, w_hh, ctx.mask
        )
        _note(ctx, inputs, hiddens, input_side, hidden_side)
        return _input_gradient(ctx, input_side, w_ih), *[None] * 6


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input side of all gates ``(T, N, kH)`` at once."""
    return F.linear(inputs.transpose(0, 1), weight, bias)


def _input_gradient(ctx: Any, gates: Tensor, weight: Tensor) -> Tensor | None:
    return (gates @ weight).transpose(0, 1) if ctx.needs_input_grad[0] else None


def _note(ctx: Any, inputs: Tensor, hiddens: Tensor, input_side: Tensor, hidden_side: Tensor) -> None:
    """Write the contributions of the input and of the hidden side."""
    w_ih, w_hh, b_ih, b_hh = ctx.parameters
    before = torch.cat([torch.zeros_like(hiddens[:1]), hiddens[:-1]])
    patients = ctx.tape.patients
    ctx.tape.add(_side((w_ih, b_ih), inputs, input_side.transpose(0, 1), patients))
    ctx.tape.add(_side((w_hh, b_hh), before.transpose(0, 1), hidden_side.transpose(0, 1), patients))


def _side(
    parameters: tuple[nn.Parameter, nn.Parameter | None], positions: Tensor, gates: Tensor, patients: int
) -> Contribution:
    """The contribution of one weight and its bias, used at ``(N, T, d)`` with gate gradients ``(N, T, kH)``."""
    weight, bias = parameters
    x, g = by_patient(positions, patients), by_patient(gates, patients)
    norms = gram_norm(x, g)
    weighted_sum: Callable[[Tensor], Tensor] = lambda scaled: scaled.flatten(0, 1).T @ x.flatten(0, 1)  # noqa: E731
    if bias is None:
        return Contribution((weight,), norms, lambda c: (weighted_sum(g * c[:, None, None]),))

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        scaled = g * coefficients[:, None, None]
        return weighted_sum(scaled), scaled.sum((0, 1))

    return Contribution((weight, bias), norms + square_norm(g.sum(1)), weighted)
