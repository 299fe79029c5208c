"""Book-keeping for LSTM and GRU: a scan whose backward pass emits only the gates' gradients.

The scans write into buffers made once and use torch's fused derivative kernels; sequences are short and states
small, so the number of operations is what costs.

With gate gradients b_t, inputs x_t and previous states h_t a patient's squared norm is, biases included,

    Σ_{s,t} (b_s·b_t)(x_s·x_t + 1) + Σ_{s,t} (b_s·b_t)(h_s·h_t + 1)

and the clipped sum is one matrix product per weight. The GRU's reset gate acts on the hidden side before the sum,
so its hidden side has gate gradients of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, gram_norm, square_norm
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


_aten = torch.ops.aten
_sigmoid_backward = _aten.sigmoid_backward.grad_input
_tanh_backward = _aten.tanh_backward.grad_input


def lstm_forward(gates: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 4H)`` input-side gates.

    Returns:
        Hidden states, cell states, tanh of the new cell states (all ``(T, N, H)``), and the activations i, f, g, o,
        which overwrite ``gates``.
    """
    size, transposed = weight.shape[1], weight.t()
    hiddens = gates.new_empty((*gates.shape[:2], size))
    cells, squashed = torch.empty_like(hiddens), torch.empty_like(hiddens)
    hidden = cell = gates.new_zeros(gates.shape[1], size)
    for t in range(len(gates)):
        a = gates[t].addmm_(hidden, transposed)
        a[:, : 2 * size].sigmoid_()
        a[:, 2 * size : 3 * size].tanh_()
        a[:, 3 * size :].sigmoid_()
        i, f, g, o = a.chunk(4, 1)
        torch.mul(f, cell, out=cells[t]).addcmul_(i, g)
        torch.tanh(cells[t], out=squashed[t])
        torch.mul(o, squashed[t], out=hiddens[t])
        if mask is not None:
            torch.lerp(cell, cells[t], mask[t], out=cells[t])
            torch.lerp(hidden, hiddens[t], mask[t], out=hiddens[t])
        hidden, cell = hiddens[t], cells[t]
    return hiddens, cells, squashed, gates


def lstm_backward(
    output_gradient: Tensor,
    cells: Tensor,
    squashed: Tensor,
    activations: Tensor,
    weight: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Return the gates' gradients ``(T, N, 4H)`` from the outputs' ``(T, N, H)``."""
    result, size = torch.empty_like(activations), weight.shape[1]
    of_hidden = torch.zeros_like(cells[0])
    of_cell = torch.zeros_like(cells[0])
    start = torch.zeros_like(cells[0])
    for t in range(len(cells) - 1, -1, -1):
        of_hidden = of_hidden + output_gradient[t]
        kept_hidden = kept_cell = None
        if mask is not None:
            kept_hidden, kept_cell = of_hidden * (1 - mask[t]), of_cell * (1 - mask[t])
            of_hidden, of_cell = of_hidden * mask[t], of_cell * mask[t]
        i, f, g, o = activations[t].chunk(4, 1)
        of_cell = of_cell + _aten.tanh_backward(of_hidden * o, squashed[t])
        part = result[t]
        _sigmoid_backward(of_cell * g, i, grad_input=part[:, :size])
        _sigmoid_backward(of_cell * (cells[t - 1] if t else start), f, grad_input=part[:, size : 2 * size])
        _tanh_backward(of_cell * i, g, grad_input=part[:, 2 * size : 3 * size])
        _sigmoid_backward(of_hidden * squashed[t], o, grad_input=part[:, 3 * size :])
        if t:
            of_hidden, of_cell = part @ weight, of_cell * f
        if kept_hidden is not None and kept_cell is not None:
            of_hidden, of_cell = of_hidden + kept_hidden, of_cell + kept_cell
    return result


class _LSTM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps = _steps(mask, inputs)
        gates = _project(inputs, w_ih, None if b_ih is None else b_ih + b_hh)
        hiddens, *rest = lstm_forward(gates, w_hh, steps)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, *rest)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, cells, squashed, activations = ctx.saved_tensors
        gates = lstm_backward(output_gradient.transpose(0, 1), cells, squashed, activations, w_hh, ctx.mask)
        ctx.tape.add(_one_sided(ctx.parameters, inputs.transpose(0, 1), hiddens, gates, ctx.tape.patients))
        return _input_gradient(ctx, gates, w_ih), *[None] * 6


def gru_forward(
    gates: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 3H)`` input-side gates.

    Returns:
        Hidden states ``(T, N, H)``, the activations r, z, n, which overwrite ``gates``, and the hidden side of n.
    """
    size, transposed = weight.shape[1], weight.t()
    hiddens = gates.new_empty((*gates.shape[:2], size))
    candidates = torch.empty_like(hiddens)
    hidden = gates.new_zeros(gates.shape[1], size)
    for t in range(len(gates)):
        own = hidden @ transposed if bias is None else torch.addmm(bias, hidden, transposed)
        gates[t, :, : 2 * size].add_(own[:, : 2 * size]).sigmoid_()
        r, z, n = gates[t].chunk(3, 1)
        candidates[t] = own[:, 2 * size :]
        n.addcmul_(r, candidates[t]).tanh_()
        torch.lerp(n, hidden, z, out=hiddens[t])
        if mask is not None:
            torch.lerp(hidden, hiddens[t], mask[t], out=hiddens[t])
        hidden = hiddens[t]
    return hiddens, gates, candidates


def gru_backward(
    output_gradient: Tensor,
    hiddens: Tensor,
    activations: Tensor,
    candidates: Tensor,
    weight: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gates' gradients on the input side and on the hidden side, each ``(T, N, 3H)``."""
    size = weight.shape[1]
    input_side, hidden_side = torch.empty_like(activations), torch.empty_like(activations)
    gradient = torch.zeros_like(hiddens[0])
    start = torch.zeros_like(hiddens[0])
    for t in range(len(hiddens) - 1, -1, -1):
        gradient = gradient + output_gradient[t]
        kept = None
        if mask is not None:
            kept, gradient = gradient * (1 - mask[t]), gradient * mask[t]
        r, z, n = activations[t].chunk(3, 1)
        x, h = input_side[t], hidden_side[t]
        through = gradient * z
        _tanh_backward(gradient - through, n, grad_input=x[:, 2 * size :])
        torch.mul(x[:, 2 * size :], r, out=h[:, 2 * size :])
        _sigmoid_backward(x[:, 2 * size :] * candidates[t], r, grad_input=x[:, :size])
        before = hiddens[t - 1] if t else start
        _sigmoid_backward(gradient * (before - n), z, grad_input=x[:, size : 2 * size])
        h[:, : 2 * size] = x[:, : 2 * size]
        gradient = torch.addmm(through, h, weight) if t else through
        if kept is not None:
            gradient = gradient + kept
    return input_side, hidden_side


class _GRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mask: Tensor | None, *arguments: Any) -> Tensor:
        w_ih, w_hh, b_ih, b_hh, tape = arguments
        steps = _steps(mask, inputs)
        hiddens, *rest = gru_forward(_project(inputs, w_ih, b_ih), w_hh, b_hh, steps)
        ctx.tape, ctx.parameters, ctx.mask = tape, (w_ih, w_hh, b_ih, b_hh), steps
        ctx.save_for_backward(inputs, w_ih, w_hh, hiddens, *rest)
        return hiddens.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, w_ih, w_hh, hiddens, activations, candidates = ctx.saved_tensors
        of_outputs = output_gradient.transpose(0, 1)
        input_side, hidden_side = gru_backward(of_outputs, hiddens, activations, candidates, w_hh, ctx.mask)
        w, u, b, c = ctx.parameters
        patients = ctx.tape.patients
        ctx.tape.add(_side((w, b), inputs.transpose(0, 1), input_side, patients))
        ctx.tape.add(_side((u, c), _before(hiddens), hidden_side, patients))
        return _input_gradient(ctx, input_side, w_ih), *[None] * 6


def _steps(mask: Tensor | None, inputs: Tensor) -> Tensor | None:
    """Return a mask ``(N, T)`` as ``(T, N, 1)`` of the inputs' type."""
    return None if mask is None else mask.t().to(inputs.dtype)[..., None]


def _project(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the input side of all gates ``(T, N, kH)`` at once."""
    return F.linear(inputs.transpose(0, 1), weight, bias)


def _input_gradient(ctx: Any, gates: Tensor, weight: Tensor) -> Tensor | None:
    return (gates @ weight).transpose(0, 1) if ctx.needs_input_grad[0] else None


def _before(hiddens: Tensor) -> Tensor:
    """Return the state that each step started from, ``(T, N, H)``."""
    return torch.cat([torch.zeros_like(hiddens[:1]), hiddens[:-1]])


def _one_sided(
    parameters: tuple[nn.Parameter | None, ...], x: Tensor, hiddens: Tensor, gates: Tensor, patients: int
) -> Contribution:
    """The contribution of an LSTM, whose input and hidden side have the same gate gradients ``(T, N, 4H)``.

    Both weights are one: [W_ih, W_hh] used at positions [x, h]. Both biases have one gradient.
    """
    joined = torch.cat([x, _before(hiddens)], dim=-1)
    weights, biases = parameters[:2], parameters[2:]
    both = _side((weights[0], biases[0]), joined, gates, patients)
    norms = both.square_norms
    if biases[0] is not None:
        norms = norms + square_norm(_positions(gates, patients).sum(1))

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        weight, *bias = both.weighted(coefficients)
        return *weight.split([x.shape[-1], hiddens.shape[-1]], dim=1), *bias, *[b.clone() for b in bias]

    return Contribution(tuple(p for p in parameters if p is not None), norms, weighted)


def _side(
    parameters: tuple[nn.Parameter | None, nn.Parameter | None], x: Tensor, gates: Tensor, patients: int
) -> Contribution:
    """The contribution of one weight and its bias, used at ``(T, N, d)`` with gate gradients ``(T, N, kH)``."""
    g = _positions(gates, patients)
    norms = gram_norm(_positions(x, patients), g)
    has_bias = parameters[1] is not None
    if has_bias:
        norms = norms + square_norm(g.sum(1))

    def weighted(coefficients: Tensor) -> tuple[Tensor, ...]:
        by_record = coefficients.repeat_interleave(gates.shape[1] // patients)
        scaled = (gates * by_record[None, :, None]).flatten(0, 1)
        weight = scaled.T @ x.reshape(-1, x.shape[-1])
        return (weight, scaled.sum(0)) if has_bias else (weight,)

    return Contribution(tuple(p for p in parameters if p is not None), norms, weighted)


def _positions(tensor: Tensor, patients: int) -> Tensor:
    """Return ``(T, N, d)`` as ``(B, N/B·T, d)``; without a copy where a patient has one record."""
    steps, records, width = tensor.shape
    if records == patients:
        return tensor.transpose(0, 1)
    return tensor.view(steps, patients, -1, width).permute(1, 2, 0, 3).reshape(patients, -1, width)
