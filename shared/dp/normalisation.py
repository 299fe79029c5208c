"""Book-keeping for GroupNorm, LayerNorm and InstanceNorm with affine parameters.

The parameters' gradients are small (one value a channel), so each patient's is formed.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, square_norm, weighted_sum

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
    """With x̂ = (x - μ)·ρ per group and output γ·x̂ + β; S = Σ g and D = Σ g·x over one record's channel give

        ∂β = S,   ∂γ = ρ·(D - μ·S),   ∂x = γ·ρ·g + u·x + v,   u = ρ³·(μ·ΣγS - ΣγD)/m,   v = -u·μ - ρ·ΣγS/m

    with sums over the group's channels and m values in a group: what torch's kernel works out, but kept per record.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float, tape: Tape
    ) -> Tensor:
        shape = inputs.shape[0], inputs.shape[1], inputs[0, 0].numel()
        output, mean, scale = _aten.native_group_norm(inputs, weight, bias, *shape, groups, epsilon)
        ctx.tape, ctx.parameters, ctx.groups = tape, (weight, bias), groups
        ctx.save_for_backward(inputs, weight, mean, scale)
        return cast(Tensor, output)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, scale = ctx.saved_tensors
        records, channels, groups = len(inputs), int(inputs.shape[1]), int(ctx.groups)
        positions = tuple(range(2, inputs.dim()))
        total, product = output_gradient.sum(positions), (output_gradient * inputs).sum(positions)
        of_channel = (records, groups, channels // groups)
        m, r = mean.view(records, groups, 1), scale.view(records, groups, 1)
        s, d, gamma = total.view(of_channel), product.view(of_channel), weight.view(groups, -1)
        ctx.tape.add(_affine(ctx.parameters, (((d - m * s) * r).flatten(1), total), ctx.tape.patients))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None
        size = inputs[0].numel() // groups
        group_s, group_d = (gamma * s).sum(2, keepdim=True), (gamma * d).sum(2, keepdim=True)
        u = r.pow(3) * (m * group_s - group_d) / size
        v = -u * m - r * group_s / size
        each = (records, channels, *[1] * len(positions))
        u, v = (term.expand(of_channel).reshape(each) for term in (u, v))
        gradient = torch.addcmul(v, inputs, u).addcmul_(output_gradient, (gamma * r).reshape(each))
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
        lambda c: tuple(weighted_sum(gradient, c).view_as(parameter) for parameter, gradient in used),
        lambda: tuple(gradient for _, gradient in used),
    )
