"""Opacus's ``DPOptimizer`` over gradients that are clipped and summed already: it noises, scales and steps."""

from typing import Any

from opacus.optimizers import DPOptimizerFastGradientClipping
from torch.optim import Optimizer

from shared.dp.noise import NoiseSource


def noise_deviation(noise_multiplier: float, max_grad_norm: float) -> float:
    """Return the noise's standard deviation: the plan's, and a thousandth more for how the sum was rounded.

    One patient more moves the exact sum by at most C. It may also move how the others' terms are rounded as they are
    added up; the most that a reviewer could bring about was 3.6e-4 of C. So the sensitivity is taken as C·(1 + 2⁻¹⁰).
    """
    return noise_multiplier * max_grad_norm * (1.0 + 2.0**-10)


class NoisySum(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Takes ``p.grad`` as the clipped sum of one physical part; noises once the parts are added up."""

    def __init__(self, optimizer: Optimizer, noise: NoiseSource, **settings: Any) -> None:
        super().__init__(optimizer, **settings)
        self._noise = noise

    def accumulate(self) -> None:
        """Add this part's clipped sum, in double precision so that many parts lose nothing to rounding."""
        for parameter in self.params:
            earlier = parameter.summed_grad
            parameter.summed_grad = parameter.grad if earlier is None else earlier.double().add_(parameter.grad)
            parameter.grad = None

    def add_noise(self) -> None:
        """Noise the sum; Opacus's own noise is neither secret nor safe against floating-point attacks."""
        deviation = noise_deviation(self.noise_multiplier, self.max_grad_norm)
        for parameter in self.params:
            noised = self._noise.add(parameter.summed_grad, deviation)
            parameter.grad = noised.to(parameter.dtype).view_as(parameter)
