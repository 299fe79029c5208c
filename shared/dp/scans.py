"""The scans of LSTM and GRU, forwards and backwards, over ``(T, N, ...)``.

Their backward pass emits the gates' gradients only; the weights' follow from them in :mod:`shared.dp.recurrent`. The
scans write into buffers made once and use torch's fused derivative kernels; sequences are short and states small, so
the number of operations is what costs. torch's own fused layers (oneDNN, cuDNN) keep the gates' gradients to
themselves, on CUDA too, so there is no faster way to them than a scan.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Memory = Callable[[str, tuple[int, ...]], Tensor]
"""Gives memory of a name and shape, holding anything: the same in every pass, so that it costs no page faults."""
_aten = torch.ops.aten
_sigmoid_backward = _aten.sigmoid_backward.grad_input
_tanh_backward = _aten.tanh_backward.grad_input
_NEGLIGIBLE = 1e-20


def lstm_forward(
    gates: Tensor, weight: Tensor, mask: Tensor | None, memory: Memory
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 4H)`` input-side gates.

    Returns:
        Hidden states, cell states, tanh of the new cell states (all ``(T, N, H)``), and the activations i, f, g, o,
        which overwrite ``gates``.
    """
    size, transposed = weight.shape[1], weight.t()
    hiddens = gates.new_empty((*gates.shape[:2], size))
    cells, squashed = memory("cells", hiddens.shape), memory("squashed", hiddens.shape)
    hidden = cell = gates.new_zeros(gates.shape[1], size)
    views = gates, gates[..., : 2 * size], *gates.chunk(4, -1), cells, squashed, hiddens
    for t, (a, i_and_f, i, f, g, o, new_cell, new_squashed, new_hidden) in enumerate(_steps_of(*views)):
        a.addmm_(hidden, transposed)
        i_and_f.sigmoid_()
        _tanh(g, out=g)
        o.sigmoid_()
        torch.mul(f, cell, out=new_cell).addcmul_(i, g)
        _tanh(new_cell, out=new_squashed)
        torch.mul(o, new_squashed, out=new_hidden)
        if mask is not None:
            torch.lerp(cell, new_cell, mask[t], out=new_cell)
            torch.lerp(hidden, new_hidden, mask[t], out=new_hidden)
        hidden, cell = new_hidden, new_cell
    return hiddens, cells, squashed, gates


def lstm_backward(
    output_gradient: Tensor,
    cells: Tensor,
    squashed: Tensor,
    activations: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    memory: Memory,
) -> Tensor:
    """Return the gates' gradients ``(T, N, 4H)`` from the outputs' ``(T, N, H)``."""
    result = memory("gradients", activations.shape)
    of_hidden, of_cell, start = (torch.zeros_like(cells[0]) for _ in range(3))
    views = output_gradient, squashed, *activations.chunk(4, -1), result, *result.chunk(4, -1)
    for t, (of_output, tanh_cell, i, f, g, o, out, of_i, of_f, of_g, of_o) in _backwards(*views):
        of_hidden = of_hidden + of_output
        kept = None
        if mask is not None:
            kept = of_hidden * (1 - mask[t]), of_cell * (1 - mask[t])
            of_hidden, of_cell = of_hidden * mask[t], of_cell * mask[t]
        of_cell = of_cell + _aten.tanh_backward(of_hidden * o, tanh_cell)
        _sigmoid_backward(of_cell * g, i, grad_input=of_i)
        _sigmoid_backward(of_cell * (cells[t - 1] if t else start), f, grad_input=of_f)
        _tanh_backward(of_cell * i, g, grad_input=of_g)
        _sigmoid_backward(of_hidden * tanh_cell, o, grad_input=of_o)
        if t:
            of_hidden, of_cell = out @ weight, of_cell * f
        if kept is not None:
            of_hidden, of_cell = of_hidden + kept[0], of_cell + kept[1]
    return result


def gru_forward(
    gates: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, memory: Memory
) -> tuple[Tensor, Tensor, Tensor]:
    """Scan ``(T, N, 3H)`` input-side gates.

    Returns:
        Hidden states ``(T, N, H)``, the activations r, z, n, which overwrite ``gates``, and the hidden side of n.
    """
    size, transposed = weight.shape[1], weight.t()
    hiddens, own = gates.new_empty((*gates.shape[:2], size)), memory("own", gates.shape)
    offset = gates.new_zeros(3 * size) if bias is None else bias
    hidden = gates.new_zeros(gates.shape[1], size)
    candidates = own[..., 2 * size :]
    views = gates[..., : 2 * size], *gates.chunk(3, -1), own, own[..., : 2 * size], candidates, hiddens
    for t, (r_and_z, r, z, n, mine, own_r_and_z, candidate, new_hidden) in enumerate(_steps_of(*views)):
        torch.addmm(offset, hidden, transposed, out=mine)
        r_and_z.add_(own_r_and_z).sigmoid_()
        _tanh(n.addcmul_(r, candidate), out=n)
        torch.lerp(n, hidden, z, out=new_hidden)
        if mask is not None:
            torch.lerp(hidden, new_hidden, mask[t], out=new_hidden)
        hidden = new_hidden
    return hiddens, gates, candidates


def gru_backward(
    output_gradient: Tensor,
    hiddens: Tensor,
    activations: Tensor,
    candidates: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """Return the gates' gradients on the hidden side ``(T, N, 3H)``, and n's on the input side ``(T, N, H)``.

    Those of r and z are the same on both sides.
    """
    hidden_side, of_candidates = memory("hidden side", activations.shape), memory("candidates", hiddens.shape)
    gradient, start = torch.zeros_like(hiddens[0]), torch.zeros_like(hiddens[0])
    views = (
        output_gradient,
        *activations.chunk(3, -1),
        candidates,
        of_candidates,
        hidden_side,
        *hidden_side.chunk(3, -1),
    )
    for t, (of_output, r, z, n, candidate, of_candidate, out, of_r, of_z, of_n) in _backwards(*views):
        gradient = gradient + of_output
        kept = None
        if mask is not None:
            kept, gradient = gradient * (1 - mask[t]), gradient * mask[t]
        through = gradient * z
        _tanh_backward(gradient - through, n, grad_input=of_candidate)
        torch.mul(of_candidate, r, out=of_n)
        _sigmoid_backward(of_candidate * candidate, r, grad_input=of_r)
        _sigmoid_backward(gradient * ((hiddens[t - 1] if t else start) - n), z, grad_input=of_z)
        gradient = through.addmm_(out, weight) if t else through
        if kept is not None:
            gradient = gradient + kept
    return hidden_side, of_candidates


def _tanh(values: Tensor, *, out: Tensor) -> None:
    """Write tanh of ``values``, with what is below 1e-20 taken as 0.

    The library behind torch's tanh takes ten times as long below 1e-30 or so. A server can choose weights that bring
    one patient's values there, and the time of a step must not depend on a patient.
    """
    _aten.hardshrink.out(values, _NEGLIGIBLE, out=out)
    out.tanh_()


def _steps_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield every tensor's part of each step, cut out beforehand: the scans are many small operations."""
    return zip(*(tensor.unbind(0) for tensor in tensors), strict=True)


def _backwards(*tensors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the steps with their numbers, the last first."""
    return reversed(list(enumerate(_steps_of(*tensors))))
