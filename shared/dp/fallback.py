"""Layers that only Opacus knows: its per-sample rule for that layer alone, inside the book-keeping pass."""

from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from shared.dp.tape import Contribution, Tape, square_norm, weighted_sum


def is_known(module: nn.Module) -> bool:
    """Whether Opacus has a per-sample rule for this type of layer."""
    return type(module) in GradSampleModule.GRAD_SAMPLERS


class Sampled:
    """Hooks one layer: keeps its input, and turns its output gradient into each patient's gradient."""

    def __init__(self, module: nn.Module, tape: Tape) -> None:
        self._module, self._tape = module, tape
        self._forward = module.register_forward_hook(self._on_forward)

    def remove(self) -> None:
        """Unhook the layer."""
        self._forward.remove()

    def _on_forward(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            # Opacus's rules take no channels-last input for granted: some are wrong on it (its unfold2d).
            kept = [tensor.detach().contiguous() for tensor in inputs]
            output.register_hook(lambda gradient: self._on_gradient(kept, gradient.contiguous()))

    def _on_gradient(self, inputs: list[Tensor], output_gradient: Tensor) -> None:
        with torch.no_grad():
            rule: Any = GradSampleModule.GRAD_SAMPLERS[type(self._module)]
            by_record = rule(self._module, inputs, output_gradient)
        used = [
            (parameter, sample.reshape(self._tape.patients, -1, *parameter.shape).sum(1))
            for parameter, sample in by_record.items()
        ]
        self._tape.add(
            Contribution(
                tuple(parameter for parameter, _ in used),
                torch.stack([square_norm(gradient) for _, gradient in used]).sum(0),
                lambda c: tuple(weighted_sum(gradient, c) for _, gradient in used),
                lambda: tuple(gradient for _, gradient in used),
            )
        )
