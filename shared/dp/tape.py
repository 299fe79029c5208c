"""What a backward pass leaves behind for clipping: per layer, patients' squared norms and a weighted sum.

Each supported layer's backward returns its input's gradient only. In place of the weights' gradient it writes a
:class:`Contribution` here, from (input, output gradient), while both are still in the cache.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shared.errors import FederationError

Weighted = Callable[[Tensor], tuple[Tensor, ...]]
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer of each size of number, in bytes."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """One layer's part of every patient's gradient.

    Attributes:
        parameters: The parameters it concerns.
        square_norms: ``(B,)`` squared L2 norm of each patient's gradient of them.
        weighted: Maps coefficients ``(B,)`` to Σ_b coefficient_b · gradient_b, one tensor per parameter. A patient
            whose coefficient is 0 adds nothing, whatever that gradient is: see :func:`counted`.
        of_patients: Returns what each patient puts into that sum, tensors ``(B, ...)``: the formed gradient, or the
            inputs and output gradients that a product over all patients takes. Only the self-test asks.
    """

    parameters: tuple[nn.Parameter, ...]
    square_norms: Tensor
    weighted: Weighted
    of_patients: Callable[[], tuple[Tensor, ...]]


@dataclass
class Tape:
    """The contributions of one forward and backward pass over ``patients`` patients."""

    patients: int = 0
    contributions: list[Contribution] = field(default_factory=list)
    _kept: dict[object, Tensor] = field(default_factory=dict)
    _workspace: Tensor | None = None

    def start(self, patients: int) -> None:
        """Forget the last pass and expect one over ``patients`` patients."""
        self.patients = patients
        self.forget()

    def forget(self) -> None:
        """Let go of the contributions.

        They hold activations, whose autograd graph holds this tape: a circle that leads through torch's own memory,
        where Python's collector cannot see it. A tape that is dropped with contributions on it is never freed.
        """
        self.contributions = []

    def add(self, contribution: Contribution) -> None:
        """Note a layer's contribution."""
        self.contributions.append(contribution)

    def scratch(self, key: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory made of zeros once and kept between passes under ``key``, with what was last written to it.

        Megabytes made afresh in every pass would cost more in page faults than what is done in them.
        """
        kept = self._kept.get(key)
        if kept is None or kept.shape != shape or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[key] = like.new_zeros(shape)
        return kept

    def workspace(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory that all layers share: the next call may hand out the same."""
        kept, size = self._workspace, math.prod(shape)
        if kept is None or kept.numel() < size or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._workspace = like.new_zeros(size)
        return kept[:size].view(shape)

    def complete(self, parameters: set[nn.Parameter]) -> Iterator[Contribution]:
        """Yield the contributions, once it is sure that each parameter occurs in exactly one.

        Raises:
            FederationError: If a parameter was used twice, or used where no contribution is written: its
                gradient would be clipped wrongly or not at all.
        """
        seen: set[nn.Parameter] = set()
        for contribution in self.contributions:
            if seen & set(contribution.parameters):
                raise FederationError(
                    "A layer was called twice in one forward pass; use engine='opacus' for such a model."
                )
            seen |= set(contribution.parameters)
            yield contribution
        if missing := parameters - seen:
            shapes = ", ".join(str(tuple(parameter.shape)) for parameter in missing)
            raise FederationError(f"Parameters of shape {shapes} got no gradient in the forward pass.")


def counted(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``rows`` with zeros where the coefficient is 0, in place of whatever is there.

    0 times infinity is NaN, so a row that counts zero must be zero before it enters a sum over patients. The bits of
    every number are and-ed with ones or with zeros: the work is the same whichever rows those are, and the time too.
    ``masked_fill`` writes only where the mask says so, and ``torch.where`` takes five times as long.

    Args:
        rows: ``(B, ...)``, or of any shape that ``coefficients`` has fewer dimensions or sizes of 1 of.
        coefficients: ``(B,)``, or in a shape that can be broadcast to ``rows``.
    """
    return _masked(rows, coefficients, in_place=False)


def counted_(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Do the same as :func:`counted` in place, and return ``rows``."""
    return _masked(rows, coefficients, in_place=True)


def _masked(rows: Tensor, coefficients: Tensor, *, in_place: bool) -> Tensor:
    bits = rows.view(_BITS[rows.element_size()])
    mask = -(_along(coefficients, rows) != 0).to(bits.dtype)
    return (bits.bitwise_and_(mask) if in_place else bits.bitwise_and(mask)).view(rows.dtype)


def scaled(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Return ``rows`` times their coefficients; 0 times anything is 0 here, infinity and NaN included."""
    return counted_(rows * _along(coefficients, rows), coefficients)


def weighted_sum(gradients: Tensor, coefficients: Tensor) -> Tensor:
    """Return Σ_b coefficient_b · gradient_b of formed gradients ``(B, ...)``, which are overwritten."""
    total: Tensor = coefficients @ counted_(gradients, coefficients).flatten(1)
    return total.view(gradients.shape[1:])


def _along(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return ``(B,)`` so that it can be broadcast to ``(B, ...)``; other shapes as they are."""
    if coefficients.dim() > 1:
        return coefficients
    return coefficients.view(-1, *[1] * (rows.dim() - 1))


def by_patient(tensor: Tensor, patients: int) -> Tensor:
    """Return ``(N, T, d)`` as ``(B, N/B·T, d)``: a patient's records are further positions of the same layer."""
    return tensor.reshape(patients, -1, tensor.shape[-1])


def square_norm(gradients: Tensor) -> Tensor:
    """Return ``(B,)`` squared norms of ``(B, ...)``."""
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms.square()


def gram_norm(inputs: Tensor, outputs: Tensor, biases: int = 0) -> Tensor:
    """Return ``(B,)`` squared norms of Σ_t g_t x_tᵀ from ``(B, T, d)`` and ``(B, T, p)`` without forming them.

    ‖Σ_t g_t x_tᵀ‖² = Σ_{s,t} (x_s·x_t)(g_s·g_t); Bu et al. 2022, equation 3. A bias is an input that is always 1, so
    each of the ``biases`` adds 1 to x_s·x_t. See :func:`norm_of_grams` for what is returned where positions cancel.
    """
    if inputs.shape[1] == 1:
        lost = _lost(inputs.dtype)
        return (square_norm(outputs) + lost) * (square_norm(inputs) + lost + biases)
    return norm_of_grams(gram(inputs).add_(biases), gram(outputs))


def gram(positions: Tensor) -> Tensor:
    """Return the Gram matrices ``(B, T, T)`` of ``(B, T, d)``."""
    return positions @ positions.transpose(1, 2)


def norm_of_grams(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return ``(B,)`` squared norms Σ a_st b_st of Gram matrices ``(B, T, T)``, never too small by rounding.

    Here norm and clipped sum come from different numbers. Where a patient's positions cancel, which hostile weights can
    bring about, the sum of products may round to nothing while the sum of gradients does not, and the patient would
    pass unclipped. With M = Σ_t ‖x_t‖‖g_t‖, to which both errors are proportional, the result is at least
    S + 8εM² (ε of the number format: what rounding takes off S), and at least 2¹⁸εM²/T, so that a coefficient of
    the clipped sum never magnifies rounding. The second takes effect only where positions cancel to about a sixth
    of what independent ones would: such a patient is clipped harder than need be, which costs no privacy.

    Tiny values squared vanish altogether, though their product with huge ones on the other side does not: what an
    entry of one matrix may lack is made up for by the trace of the other.
    """
    of_inputs, of_outputs = (grams.diagonal(dim1=1, dim2=2).clamp(min=0.0) for grams in (inputs, outputs))
    magnitude = (of_inputs * of_outputs).sqrt().sum(1).square()
    epsilon, positions = torch.finfo(inputs.dtype).eps, inputs.shape[1]
    vanished = positions * _lost(inputs.dtype) * (of_inputs.sum(1) + of_outputs.sum(1))
    products = (inputs * outputs).sum((1, 2)) + 8.0 * epsilon * magnitude + vanished
    return torch.maximum(products, 2.0**18 * epsilon / positions * magnitude)


def _lost(dtype: torch.dtype) -> float:
    """Return what a sum of squares may lack because they were too small for the number format: a million of them."""
    return 2.0**20 * torch.finfo(dtype).tiny


def gram_is_cheaper(positions: int, inputs: int, outputs: int) -> bool:
    """Whether 2T² < p·d: two Gram matrices then cost less than each patient's gradient (Bu et al. 2022)."""
    return 2 * positions * positions < inputs * outputs
