"""Book-keeping: every patient's clipped gradient summed in one backward pass.

    Bu, Wang, Zha, Karypis, "Differentially Private Optimization on Large Model at Small Cost", 2022.

Formal guarantee: after ``clipped_sum`` each parameter's ``grad`` is Σ_p g_p · min(1, C / ‖g_p‖), where g_p is the
gradient of patient p's loss over *all* trainable parameters and its norm is computed from the same numbers. A
patient whose norm is not finite adds nothing; the work is the same whichever patients those are. The
model must not mix patients (no BatchNorm); a layer that is not known is refused by name, never left unclipped.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shared.dp import convolution, fallback, linear, normalisation, recurrent
from shared.dp.clipping import clip_coefficients
from shared.dp.tape import Tape
from shared.errors import FederationError

Rule = Callable[..., Any]
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear.linear,
    nn.Embedding: linear.embedding,
    nn.Conv1d: convolution.convolution,
    nn.Conv2d: convolution.convolution,
    nn.Conv3d: convolution.convolution,
    nn.ConvTranspose2d: convolution.convolution,
    nn.GroupNorm: normalisation.group_norm,
    nn.LayerNorm: normalisation.layer_norm,
    nn.InstanceNorm1d: normalisation.instance_norm,
    nn.InstanceNorm2d: normalisation.instance_norm,
    nn.InstanceNorm3d: normalisation.instance_norm,
    nn.LSTM: recurrent.lstm,
    nn.GRU: recurrent.gru,
}


class BookKeeping:
    """Attaches to a model and clips what its backward pass leaves.

    Args:
        model: Its layers' forward is replaced until ``close``.

    Raises:
        FederationError: If a layer with trainable parameters is not supported, or parameters are shared.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tape = Tape()
        self._attached: list[nn.Module] = []
        self._hooks: list[fallback.Sampled | RemovableHandle] = []
        self._parameters = {p for p in model.parameters() if p.requires_grad}
        _refuse_shared(model)
        for kernel in _image_kernels(model):
            kernel.data = convolution.channels_last(kernel.data)
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                self._attach(name, module)
            elif isinstance(module, nn.Flatten):
                self._hooks.append(module.register_forward_pre_hook(_keep_layout))

    def clipped_sum(self, losses: Tensor, bound: float, real: int) -> Tensor:
        """Run the backward pass of ``losses`` ``(B,)`` and set ``grad`` to the first ``real`` patients' clipped sum.

        Returns:
            ``(B,)`` the norms before clipping. A row whose norm is not finite adds nothing to the sum.
        """
        losses.sum().backward()
        with torch.no_grad():
            contributions = list(self._tape.complete(self._parameters))
            norms = torch.stack([c.square_norms for c in contributions]).sum(0).sqrt()
            coefficients = clip_coefficients(norms, bound, real)
            for contribution in contributions:
                gradients = contribution.weighted(coefficients)
                for parameter, gradient in zip(contribution.parameters, gradients, strict=True):
                    parameter.grad = gradient
        self._tape.forget()
        return norms

    def rows(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Run the backward pass; return what a patient's row gives, tensors ``(B, ...)``.

        They are every layer's squared norms, and what each patient puts into the clipped sum. The next pass may
        overwrite them.
        """
        losses.sum().backward()
        with torch.no_grad():
            contributions = list(self._tape.complete(self._parameters))
            norms = torch.stack([c.square_norms for c in contributions], dim=1)
            return (norms, *(tensor for c in contributions for tensor in c.of_patients()))

    def start(self, patients: int) -> None:
        """Expect a forward and backward pass over ``patients`` patients."""
        self._tape.start(patients)

    def close(self) -> None:
        """Give the model its own forward and layout back."""
        self._tape.forget()
        for kernel in _image_kernels(self._model):
            kernel.data = kernel.data.clone(memory_format=torch.contiguous_format)
        for module in self._attached:
            del module.forward
        for hook in self._hooks:
            hook.remove()

    def _attach(self, name: str, module: nn.Module) -> None:
        rule = _RULES.get(type(module))
        if rule is convolution.convolution and not convolution.supports(module):  # type: ignore[arg-type]
            rule = None
        if rule is not None:
            module.forward = partial(rule, module, self._tape)
            self._attached.append(module)
        elif fallback.is_known(module):
            self._hooks.append(fallback.Sampled(module, self._tape))
        else:
            raise FederationError(
                f"Layer {name!r} ({type(module).__name__}) has parameters whose per-patient gradient is not "
                "known; replace it by a supported layer."
            )


def _image_kernels(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the kernels over images, whose layout torch's convolutions keep to."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            yield cast(nn.Parameter, module.weight)


def _keep_layout(_flatten: nn.Module, inputs: tuple[Tensor]) -> None:
    """Have the gradient of flattened images come back as these lie: mixed layouts slow every layer before."""
    (images,) = inputs
    if images.requires_grad and images.dim() == convolution.IMAGE_DIMENSIONS:
        images.register_hook(convolution.channels_last)


def _refuse_shared(model: nn.Module) -> None:
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter in owners:
                raise FederationError(
                    f"Layers {owners[parameter]!r} and {name!r} share parameters; use engine='opacus'."
                )
            owners[parameter] = name
