"""Book-keeping for GroupNorm, LayerNorm and InstanceNorm with affine parameters.

The parameters' gradients are small (one value a channel), so each patient's is formed.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, square_norm

_aten = torch.ops.aten


def group_norm(module: nn.GroupNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.GroupNorm`` on ``(N, C, ...)``."""
    output: Tensor = _GroupNorm.apply(inputs, module.weight, module.bias, module.num_groups, module.eps, tape)  # type: ignore[no-untyped-call]
    return output


def instance_norm(module: nn.InstanceNorm2d, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.InstanceNorm1d/2d/3d`` on ``(N, C, ...)``: a group norm with a group per channel."""
    channels = inputs.shape[1]
    output: Tensor = _GroupNorm.apply(inputs, module.weight, module.bias, channels, module.eps, tape)  # type: ignore[no-untyped-call]
    return output


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, tape: Tape
    ) -> Tensor:
        shape = inputs.shape[0], inputs.shape[1], inputs[0, 0].numel()
        normal, mean, scale = _aten.native_group_norm(inputs, None, None, *shape, groups, epsilon)
        ctx.tape, ctx.parameters, ctx.shape, ctx.groups = tape, (weight, bias), shape, groups
        ctx.save_for_backward(inputs, weight, normal, mean, scale)
        broadcast = (1, -1, *[1] * (inputs.dim() - 2))
        return torch.addcmul(bias.view(broadcast), normal, weight.view(broadcast))

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, normal, mean, scale = ctx.saved_tensors
        positions = tuple(range(2, normal.dim()))
        by_record = (output_gradient * normal).sum(positions), output_gradient.sum(positions)
        ctx.tape.add(_affine(ctx.parameters, by_record, ctx.tape.patients))
        layout = torch.channels_last if _is_channels_last(inputs) else torch.contiguous_format
        gradient = _aten.native_group_norm_backward(
            output_gradient.contiguous(memory_format=layout),
            inputs, mean, scale, weight, *ctx.shape, ctx.groups, [True, False, False],
        )[0]  # fmt: skip
        return gradient, None, None, None, None, None


def layer_norm(module: nn.LayerNorm, tape: Tape, inputs: Tensor) -> Tensor:
    """``nn.LayerNorm`` over the last dimensions."""
    output: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
        inputs, module.weight, module.bias, list(module.normalized_shape), module.eps, tape
    )
    return output


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, shape: list[int], epsilon: float, tape: Tape
    ) -> Tensor:
        normal, mean, scale = _aten.native_layer_norm(inputs, shape, None, None, epsilon)
        ctx.tape, ctx.parameters, ctx.shape = tape, (weight, bias), shape
        ctx.save_for_backward(inputs, weight, normal, mean, scale)
        output: Tensor = normal * weight
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, normal, mean, scale = ctx.saved_tensors
        kept = len(ctx.shape)

        def summed(tensor: Tensor) -> Tensor:
            return tensor.reshape(tensor.shape[0], -1, *tensor.shape[-kept:]).sum(1).flatten(1)

        by_record = summed(output_gradient * normal), summed(output_gradient)
        ctx.tape.add(_affine(ctx.parameters, by_record, ctx.tape.patients))
        gradient = _aten.native_layer_norm_backward(
            output_gradient, inputs, ctx.shape, mean, scale, weight, None, [True, False, False]
        )[0]
        return gradient, None, None, None, None, None


def _affine(
    parameters: tuple[nn.Parameter, nn.Parameter | None], by_record: tuple[Tensor, Tensor], patients: int
) -> Contribution:
    """The contribution of scale and shift, from each record's gradients ``(N, C)``."""
    used = [
        (parameter, gradient.view(patients, -1, gradient.shape[1]).sum(1))
        for parameter, gradient in zip(parameters, by_record, strict=True)
        if parameter is not None
    ]
    norms = torch.stack([square_norm(gradient) for _, gradient in used]).sum(0)
    return Contribution(
        tuple(parameter for parameter, _ in used),
        norms,
        lambda c: tuple((c @ gradient).view_as(parameter) for parameter, gradient in used),
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
