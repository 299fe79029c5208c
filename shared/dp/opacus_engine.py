"""The reference engine: Opacus's hooks form every record's gradient; slow, simple, and the tests' second opinion."""

import warnings

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from shared.dp.clipping import clip_coefficients
from shared.dp.tape import square_norm, weighted_sum
from shared.errors import FederationError


class OpacusHooks:
    """See :class:`shared.dp.engine.BookKeeping` for the interface.

    Raises:
        FederationError: If the model has trainable layers that Opacus has no hooks for, such as ``nn.LSTM``.
    """

    def __init__(self, model: nn.Module) -> None:
        recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        if recurrent or GradSampleModule.validate(model, strict=False):
            raise FederationError(
                "Opacus has no hooks for some of the model's layers (recurrent ones, for instance). "
                "Use engine = 'bookkeeping'."
            )
        self._module = GradSampleModule(model, loss_reduction="sum")
        # Opacus 1.6 computes wrong gradients on channels-last convolution inputs (its unfold2d assumes NCHW).
        self._guards = [
            module.register_forward_pre_hook(_contiguous)
            for module in model.modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ]
        self._patients = 0

    def start(self, patients: int) -> None:
        """Expect a forward and backward pass over ``patients`` patients."""
        self._patients = patients

    def clipped_sum(self, losses: Tensor, bound: float, real: int) -> Tensor:
        """Set ``grad`` to the clipped sum of the first ``real`` patients; return all norms ``(B,)``."""
        by_patient = self._by_patient(losses)
        with torch.no_grad():
            norms = torch.stack([square_norm(gradient) for gradient in by_patient.values()]).sum(0).sqrt()
            coefficients = clip_coefficients(norms, bound, real)
            for parameter, gradient in by_patient.items():
                parameter.grad = weighted_sum(gradient, coefficients)
        return norms

    def rows(self, losses: Tensor) -> tuple[Tensor, ...]:
        """Run the backward pass; return every patient's gradient of each parameter, ``(B, ...)``."""
        return tuple(self._by_patient(losses).values())

    def _by_patient(self, losses: Tensor) -> dict[nn.Parameter, Tensor]:
        """Run the backward pass; return every patient's gradient ``(B, ...)`` of each parameter."""
        with warnings.catch_warnings():
            # The first layer's input is data and has no gradient; torch remarks on it at every hook.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        found: dict[nn.Parameter, Tensor] = {}
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                # The K records of a patient are consecutive rows: their sum is the gradient of the patient's mean.
                found[parameter] = parameter.grad_sample.view(self._patients, -1, *parameter.shape).sum(1)
                parameter.grad_sample = None
        return found

    def close(self) -> None:
        """Detach from the model, leaving it an ordinary one."""
        for guard in self._guards:
            guard.remove()
        self._module.to_standard_module()


def _contiguous(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)
