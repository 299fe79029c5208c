"""Book-keeping for convolutions in one, two and three dimensions, and the transposed one in two.

A convolution is a linear layer over its unfolding: one position per output pixel, whose input is the receptive
field. The unfolding is a strided view of the padded, channels-last input, copied in chunks that fit the cache; so
memory is bounded whatever the image's size. Where the Gram product is cheaper (small maps, many channels) each
patient's norm comes from it, and the clipped sum from torch's own weight gradient of the scaled output gradient;
else each patient's gradient is formed, and the clipped sum is one vector-matrix product.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, gram_is_cheaper, gram_norm, square_norm

_aten = torch.ops.aten
_IMAGE_DIMENSIONS = 4
_CHUNK_FLOATS = 1 << 18
"""Floats of an unfolding handled at once: one MiB, which stays in the second-level cache."""
Scratch = Callable[[str, tuple[int, ...]], Tensor]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves.

    Attributes:
        kernel, stride, padding, dilation: One number per spatial dimension.
        output_padding: Of a transposed convolution.
        groups: Channel groups.
        transposed: Whether it is a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, module: Convolution) -> "Geometry":
        """Read a module's geometry; padding given as a word is worked out."""
        padding = module.padding
        if padding == "valid":
            padding = (0,) * len(module.kernel_size)
        elif padding == "same":
            padding = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(int(p) for p in padding),
            tuple(module.dilation),
            tuple(module.output_padding),
            module.groups,
            isinstance(module, nn.ConvTranspose2d),
        )


def supports(module: Convolution) -> bool:
    """Whether the geometry is one of those handled: zero padding, the same on both sides."""
    same = module.padding == "same"
    uneven = same and any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding_mode == "zeros" and not uneven


def convolution(module: Convolution, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.Conv1d/2d/3d`` and ``nn.ConvTranspose2d`` on ``(N, C, ...)``.

    Images go on in channels-last layout: the unfolding copies long runs then, and torch's kernels are faster too.
    """
    if inputs.dim() == _IMAGE_DIMENSIONS:
        inputs = channels_last(inputs)
    output: Tensor = _Convolution.apply(inputs, module.weight, module.bias, Geometry.of(module), tape)  # type: ignore[no-untyped-call]
    return output


def channels_last(images: Tensor) -> Tensor:
    """Return ``(N, C, H, W)`` laid out with the channels last, and with strides that say so even where C is 1."""
    laid_out = images.contiguous(memory_format=torch.channels_last)
    count, channels, height, width = images.shape
    if channels > 1 or not count:
        return laid_out
    return laid_out.as_strided(images.shape, (height * width, 1, width, 1))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, tape: Tape
    ) -> Tensor:
        ctx.tape, ctx.parameters, ctx.geometry = tape, (weight, bias), geometry
        ctx.save_for_backward(inputs, weight)
        output: Tensor = _aten.convolution(inputs, weight, bias, *_arguments(geometry))
        return output

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = _aten.convolution_backward(
                output_gradient, inputs, weight, None, *_arguments(ctx.geometry), [True, False, False]
            )[0]
        ctx.tape.add(_contribution(ctx.parameters, ctx.geometry, inputs, output_gradient, ctx.tape))
        return gradient, None, None, None, None


def _arguments(geometry: Geometry) -> tuple[Any, ...]:
    return (
        geometry.stride, geometry.padding, geometry.dilation,
        geometry.transposed, geometry.output_padding, geometry.groups,
    )  # fmt: skip


def _contribution(
    parameters: tuple[nn.Parameter, nn.Parameter | None],
    geometry: Geometry,
    inputs: Tensor,
    output_gradient: Tensor,
    tape: Tape,
) -> Contribution:
    (weight, bias), patients = parameters, tape.patients
    scratch = partial(tape.scratch, weight, like=inputs)
    # Transposed, the roles swap: the weight gradient correlates the output gradient with the input.
    wide, narrow = (output_gradient, inputs) if geometry.transposed else (inputs, output_gradient)
    positions = narrow[0, 0].numel() * (len(inputs) // patients)
    if gram_is_cheaper(positions, weight[0].numel(), weight.shape[0] // geometry.groups) and geometry.groups == 1:
        norms, of_weight = _by_gram(weight, geometry, inputs, output_gradient, patients, scratch)
    else:
        gradients = patient_gradients(wide, narrow, geometry, patients, scratch)
        norms = square_norm(gradients)

        def of_weight(coefficients: Tensor) -> Tensor:
            return _as_weight((coefficients @ gradients.flatten(1)).view(gradients.shape[1:]), weight)

    if bias is None:
        return Contribution((weight,), norms, lambda c: (of_weight(c),))
    of_bias = output_gradient.movedim(1, -1).reshape(patients, -1, output_gradient.shape[1]).sum(1)
    return Contribution((weight, bias), norms + square_norm(of_bias), lambda c: (of_weight(c), c @ of_bias))


def _by_gram(
    weight: Tensor, geometry: Geometry, inputs: Tensor, output_gradient: Tensor, patients: int, scratch: Scratch
) -> tuple[Tensor, Any]:
    wide, narrow = (output_gradient, inputs) if geometry.transposed else (inputs, output_gradient)
    records, width = len(inputs) // patients, weight[0].numel()
    g = narrow.movedim(1, -1).reshape(patients, -1, narrow.shape[1])
    norms = torch.cat(
        [
            gram_norm(fields.view(len(fields) // records, -1, width), g[start : start + len(fields) // records])
            for start, fields in _chunks(_unfolding(wide, narrow.shape[2:], geometry, scratch), records, scratch)
        ]
    )

    def of_weight(coefficients: Tensor) -> Tensor:
        shape = (-1, *[1] * (inputs.dim() - 1))
        scaled = output_gradient * coefficients.repeat_interleave(records).view(shape)
        gradient: Tensor = _aten.convolution_backward(
            scaled, inputs, weight, None, *_arguments(geometry), [False, True, False]
        )[1]
        return gradient

    return norms, of_weight


def patient_gradients(wide: Tensor, narrow: Tensor, geometry: Geometry, patients: int, scratch: Scratch) -> Tensor:
    """Return each patient's gradient ``(B, groups, fields, outputs)``, or with the last two swapped.

    The wider of the two comes last, so that the products' rows are long.

    Args:
        wide: What is unfolded, ``(N, C, ...)``.
        narrow: One value per position, ``(N, O, ...)``.
        geometry: Of the kernel.
        patients: B; a patient's records are consecutive rows.
        scratch: Gives memory by purpose and shape.
    """
    view = _unfolding(wide, narrow.shape[2:], geometry, scratch)
    groups, outputs = geometry.groups, narrow.shape[1] // geometry.groups
    records, positions, taps = len(wide) // patients, narrow[0, 0].numel(), math.prod(geometry.kernel)
    width = view[0].numel() // (positions * groups)
    g = narrow.movedim(1, -1).reshape(patients, records * positions, groups, outputs)
    shape = (width, outputs) if width < outputs else (outputs, width)
    result = scratch("gradients", (patients, groups, *shape))
    for start, chunk in _chunks(view, records, scratch):
        stop = start + len(chunk) // records
        x = chunk.view(stop - start, records * positions, taps, groups, width // taps)
        for group in range(groups):
            fields = x[..., group, :].reshape(stop - start, records * positions, width)
            left, right = (fields, g[start:stop, :, group]) if width < outputs else (g[start:stop, :, group], fields)
            torch.bmm(left.transpose(1, 2), right, out=result[start:stop, group])
    return result


def _chunks(view: Tensor, records: int, scratch: Scratch) -> Iterator[tuple[int, Tensor]]:
    """Yield an unfolding's copy a few patients at a time, each with its first patient's number, in one buffer."""
    at_once = max(1, _CHUNK_FLOATS // (view[0].numel() * records)) * records
    buffer = scratch("chunk", (min(at_once, len(view)), *view.shape[1:]))
    for start in range(0, len(view), at_once):
        part = view[start : start + at_once]
        yield start // records, buffer[: len(part)].copy_(part)


def _unfolding(tensor: Tensor, out: torch.Size, geometry: Geometry, scratch: Scratch) -> Tensor:
    """Return a strided view ``(N, *out, *kernel, C)`` of the padded, channels-last tensor."""
    spatial, channels = tensor.shape[2:], tensor.shape[1]
    # The last receptive field may not reach the far edge, or reach past it by output padding.
    needed = [
        max(s + 2 * p, (o - 1) * st + d * (k - 1) + 1)
        for s, p, o, st, d, k in zip(
            spatial, geometry.padding, out, geometry.stride, geometry.dilation, geometry.kernel, strict=True
        )
    ]
    moved = tensor.movedim(1, -1)
    if any(geometry.padding) or list(spatial) != needed:
        # The border is zero from the start and never written; the inside is written anew in every pass.
        padded = scratch("padded", (len(tensor), *needed, channels))
        inner = tuple(slice(p, p + s) for p, s in zip(geometry.padding, spatial, strict=True))
        padded[(slice(None), *inner)] = moved
    else:
        padded = moved.contiguous()
    record, *lines, pixel = padded.stride()
    steps = [line * st for line, st in zip(lines, geometry.stride, strict=True)]
    taps = [line * d for line, d in zip(lines, geometry.dilation, strict=True)]
    return padded.as_strided((len(tensor), *out, *geometry.kernel, channels), (record, *steps, *taps, pixel))


def _as_weight(summed: Tensor, weight: Tensor) -> Tensor:
    """Return ``(groups, fields, outputs)`` or swapped, fields ordered (kernel, channel), in the weight's shape."""
    groups = summed.shape[0]
    outputs, per_group, *kernel = weight.shape[0] // groups, weight.shape[1], *weight.shape[2:]
    width = weight[0].numel()
    if width < outputs:
        summed = summed.transpose(1, 2)
    return summed.reshape(groups * outputs, *kernel, per_group).movedim(-1, 1)
