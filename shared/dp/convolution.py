"""Book-keeping for convolutions in one, two and three dimensions, and the transposed one in two.

A convolution is a linear layer over its unfolding: one position per output pixel, whose input is the receptive
field. Where the Gram product is cheaper (small maps, many channels) each patient's norm comes from it
(:mod:`shared.dp.field_grams`), and the clipped sum from torch's own weight gradient of the scaled output gradient;
else each patient's gradient is formed from the unfolding (:mod:`shared.dp.unfolding`), and the clipped sum is one
vector-matrix product. Both come in chunks that fit the cache, so memory is bounded whatever the image's size.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shared.dp.field_grams import axes, field_norms
from shared.dp.tape import Contribution, Tape, counted, counted_, gram_is_cheaper, scaled, square_norm, weighted_sum
from shared.dp.unfolding import Convolution, Geometry, Layout, Unfolding, padded, unfold

_aten = torch.ops.aten
IMAGE_DIMENSIONS = 4
_FEW_CHANNELS = 8
_Parameters = tuple[nn.Parameter, nn.Parameter | None]


def supports(module: Convolution) -> bool:
    """Whether the geometry is one of those handled: zero padding, the same on both sides."""
    same = module.padding == "same"
    uneven = same and any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.padding_mode == "zeros" and not uneven


def convolution(module: Convolution, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.Conv1d/2d/3d`` and ``nn.ConvTranspose2d`` on ``(N, C, ...)``.

    Images go on in channels-last layout: the unfolding copies long runs then, and torch's kernels are faster too.
    """
    if inputs.dim() == IMAGE_DIMENSIONS:
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
    parameters: _Parameters, geometry: Geometry, inputs: Tensor, output_gradient: Tensor, tape: Tape
) -> Contribution:
    weight = parameters[0]
    # Transposed, the roles swap: the weight gradient correlates the output gradient with the input.
    wide, narrow = (output_gradient, inputs) if geometry.transposed else (inputs, output_gradient)
    positions = narrow[0, 0].numel() * (len(inputs) // tape.patients)
    if geometry.groups == 1 and gram_is_cheaper(positions, weight[0].numel(), weight.shape[0]):
        norms = _norms_by_grams(parameters, geometry, wide, narrow, tape)
        gradient_of_sum = partial(_gradient_of_sum, parameters, geometry, inputs, output_gradient)

        def of_patients() -> tuple[Tensor, ...]:
            return inputs.reshape(tape.patients, -1), output_gradient.reshape(tape.patients, -1)

        return Contribution(tuple(p for p in parameters if p is not None), norms, gradient_of_sum, of_patients)
    return _formed(parameters, geometry, wide, narrow, tape)


def _norms_by_grams(parameters: _Parameters, geometry: Geometry, wide: Tensor, narrow: Tensor, tape: Tape) -> Tensor:
    out, biased = narrow.shape[2:], parameters[1] is not None
    of_outputs = narrow.movedim(1, -1).reshape(tape.patients, -1, narrow.shape[1])
    fields, bias = padded(wide, out, geometry, tape), biased and not geometry.transposed
    norms = field_norms(fields, of_outputs, axes(geometry, out), bias=bias)
    return norms + square_norm(_summed_positions(wide, tape)) if biased and geometry.transposed else norms


def _gradient_of_sum(
    parameters: _Parameters, geometry: Geometry, inputs: Tensor, output_gradient: Tensor, coefficients: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of the coefficients' sum, by torch's own kernel."""
    weight, bias = parameters
    by_record = coefficients.repeat_interleave(len(inputs) // len(coefficients))
    of_outputs, of_inputs = scaled(output_gradient, by_record), counted(inputs, by_record)
    wanted = [False, True, bias is not None]
    sizes = None if bias is None else list(bias.shape)
    gradients = _aten.convolution_backward(of_outputs, of_inputs, weight, sizes, *_arguments(geometry), wanted)
    return tuple(gradients[1:] if bias is not None else gradients[1:2])


def _formed(parameters: _Parameters, geometry: Geometry, wide: Tensor, narrow: Tensor, tape: Tape) -> Contribution:
    (weight, bias), patients, groups = parameters, tape.patients, geometry.groups
    layout = _layout(geometry, wide.shape[1] // groups)
    ones = bias is not None and not geometry.transposed and layout is not Layout.LINES
    unfolding = unfold(wide, narrow.shape[2:], geometry, patients, tape, layout, ones)
    outputs = weight.shape[0] // groups
    g = narrow.movedim(1, -1).reshape(patients, -1, unfolding.positions, groups, outputs).movedim(3, 1)
    gradients = patient_gradients(unfolding, g, tape, weight)
    norms = torch.linalg.vector_norm(gradients.flatten(2), dim=2).square().sum(0)
    weighted = partial(_summed, gradients, unfolding.fields_first(outputs), weight)
    if bias is None:
        return Contribution((weight,), norms, lambda c: weighted(c)[:1], lambda: (gradients.movedim(1, 0),))
    if ones:
        return Contribution((weight, bias), norms, weighted, lambda: (gradients.movedim(1, 0),))
    of_bias = _summed_positions(wide if geometry.transposed else narrow, tape)
    return Contribution(
        (weight, bias),
        norms + square_norm(of_bias),
        lambda c: (weighted(c)[0], weighted_sum(of_bias, c)),
        lambda: (gradients.movedim(1, 0), of_bias),
    )


def _summed_positions(output_gradient: Tensor, tape: Tape) -> Tensor:
    """Return each patient's gradient of the bias, ``(B, C)``."""
    return output_gradient.movedim(1, -1).reshape(tape.patients, -1, output_gradient.shape[1]).sum(1)


def _layout(geometry: Geometry, channels: int) -> Layout:
    if channels < _FEW_CHANNELS:
        return Layout.FIELDS
    return Layout.LINES if geometry.stride[0] == 1 and geometry.kernel[0] > 1 else Layout.POSITIONS


def patient_gradients(unfolding: Unfolding, g: Tensor, tape: Tape, weight: Tensor) -> Tensor:
    """Return each patient's gradient ``(lines, B, groups, outputs, fields)``, or with the last two swapped.

    Args:
        unfolding: Of what the kernel sees.
        g: ``(B, groups, K, positions, outputs)``.
        tape: Gives memory.
        weight: Whose memory it is.
    """
    patients, groups, records, positions, outputs = g.shape
    swapped = unfolding.fields_first(outputs)
    shape = (unfolding.fields, outputs) if swapped else (outputs, unfolding.fields)
    result = tape.scratch(("gradients", id(weight)), (len(unfolding.shifts), patients, groups, *shape), g)
    size = unfolding.patients_at_once
    for x, part, into in zip(unfolding.chunks(), g.split(size), result.split(size, dim=1), strict=True):
        for record in range(records):
            gradient, fields = part[:, :, record].flatten(0, 1), x[:, :, record].flatten(0, 1)
            for shift, out in zip(unfolding.shifts, into, strict=True):
                if unfolding.layout is Layout.FIELDS:
                    left, right = fields, gradient
                else:
                    seen = fields[:, shift : shift + positions]
                    left, right = (seen.transpose(1, 2), gradient) if swapped else (gradient.transpose(1, 2), seen)
                _add_product(out.flatten(0, 1), left, right, first=record == 0)
    return result


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Set ``total`` to the matrices' product, or add it."""
    if first:
        torch.bmm(left, right, out=total)
    else:
        total.baddbmm_(left, right)


def _summed(gradients: Tensor, swapped: bool, weight: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the patients' sum in the weight's shape, and what belongs to the last field: the bias's if that is one."""
    counted_(gradients, coefficients[:, None, None, None])
    summed = (coefficients @ gradients.flatten(2)).view(len(gradients), *gradients.shape[2:])
    by_output = (summed.transpose(2, 3) if swapped else summed).movedim(0, 2).flatten(0, 1)
    outputs, channels, *kernel = weight.shape
    taps = weight[0].numel() // len(gradients)
    of_weight = by_output[..., :taps].reshape(outputs, *kernel, channels).movedim(-1, 1)
    return of_weight, by_output[:, -1, -1].contiguous()
