"""What a backward pass leaves behind, piece by piece: memory, completeness, masks and norms."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from shared.dp.tape import (
    Contribution,
    Tape,
    by_patient,
    counted,
    counted_,
    gram,
    gram_is_cheaper,
    gram_norm,
    norm_of_grams,
    scaled,
    square_norm,
    weighted_sum,
)
from shared.errors import FederationError

NAN, INF = math.nan, math.inf
EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def contribution(*parameters: nn.Parameter) -> Contribution:
    return Contribution(parameters, torch.zeros(1), lambda coefficients: (), tuple)


def test_a_new_tape_expects_nobody_and_a_start_forgets_the_last_pass() -> None:
    tape = Tape()
    assert (tape.patients, tape.contributions) == (0, [])
    tape.add(contribution(parameter(1)))
    tape.start(3)
    assert (tape.patients, tape.contributions) == (3, [])


def test_complete_gives_every_contribution_once_in_the_order_of_the_pass() -> None:
    tape, first, second, third = Tape(), parameter(2), parameter(3), parameter(4)
    parts = [contribution(first, second), contribution(third)]
    for part in parts:
        tape.add(part)
    assert list(tape.complete({first, second, third})) == parts


def test_a_parameter_used_twice_is_refused_even_if_another_came_between() -> None:
    tape, first, second = Tape(), parameter(2), parameter(3)
    for part in (contribution(first), contribution(second), contribution(second, first)):
        tape.add(part)
    said = "A layer was called twice in one forward pass; use engine='opacus' for such a model."
    with pytest.raises(FederationError, match=f"^{re.escape(said)}$"):
        list(tape.complete({first, second}))


def test_parameters_without_a_gradient_are_refused_by_their_shapes() -> None:
    tape, used = Tape(), parameter(2)
    tape.add(contribution(used))
    said = r"^Parameters of shape \(3, 4\), \(3, 4\) got no gradient in the forward pass\.$"
    with pytest.raises(FederationError, match=said):
        list(tape.complete({used, parameter(3, 4), parameter(3, 4)}))


def test_scratch_is_zeros_once_and_then_what_was_written() -> None:
    tape, like = Tape(), torch.ones(1)
    kept = tape.scratch("a", (2, 3), like)
    assert torch.equal(kept, torch.zeros(2, 3))
    kept.fill_(7.0)
    assert tape.scratch("a", (2, 3), like) is kept
    assert tape.scratch("b", (2, 3), like) is not kept


@pytest.mark.parametrize(
    ("shape", "like"),
    [
        ((3, 2), torch.ones(1)),
        ((2, 3), torch.ones(1, dtype=torch.float64)),
        ((2, 3), torch.ones(1, device="meta")),
    ],
    ids=["shape", "dtype", "device"],
)
def test_scratch_of_another_kind_is_made_afresh_and_kept(shape: tuple[int, ...], like: Tensor) -> None:
    tape = Tape()
    tape.scratch("a", (2, 3), torch.ones(1)).fill_(7.0)
    fresh = tape.scratch("a", shape, like)
    assert (tuple(fresh.shape), fresh.dtype, fresh.device) == (shape, like.dtype, like.device)
    assert tape.scratch("a", shape, like) is fresh


def test_the_workspace_is_shared_and_grows_only_when_it_must() -> None:
    tape, like = Tape(), torch.ones(1)
    first = tape.workspace((2, 3), like)
    assert torch.equal(first, torch.zeros(2, 3))
    same, smaller, larger = (tape.workspace(shape, like) for shape in [(3, 2), (4,), (2, 4)])
    assert same.data_ptr() == smaller.data_ptr() == first.data_ptr() != larger.data_ptr()
    assert (same.shape, smaller.shape, larger.shape) == ((3, 2), (4,), (2, 4))


@pytest.mark.parametrize("like", [torch.ones(1, dtype=torch.float64), torch.ones(1, device="meta")])
def test_a_workspace_of_another_kind_is_made_afresh(like: Tensor) -> None:
    tape = Tape()
    tape.workspace((8,), torch.ones(1))
    fresh = tape.workspace((4,), like)
    assert (fresh.dtype, fresh.device) == (like.dtype, like.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_that_count_zero_are_cleared_whatever_is_there(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1.5, -0.0], [NAN, 1.0], [INF, 2.0], [3.0, -4.0]], dtype=dtype)
    coefficients = torch.tensor([0.5, 0.0, 0.0, -2.0], dtype=dtype)
    before, wanted = rows.clone(), torch.tensor([[1.5, -0.0], [0.0, 0.0], [0.0, 0.0], [3.0, -4.0]], dtype=dtype)
    assert torch.equal(counted(rows, coefficients), wanted)
    assert torch.equal(rows.isnan(), before.isnan())
    assert counted(rows, coefficients).signbit()[0, 1]
    changed = counted_(rows, coefficients)
    assert torch.equal(changed, wanted)
    assert changed.data_ptr() == rows.data_ptr()
    assert torch.equal(rows, wanted)


def test_coefficients_may_come_in_a_shape_that_broadcasts() -> None:
    rows = torch.ones(2, 3, 2)
    assert torch.equal(counted(rows, torch.tensor([[0.0], [1.0], [2.0]])), rows * torch.tensor([[0.0], [1.0], [1.0]]))


def test_scaled_rows_leave_their_source_alone() -> None:
    rows = torch.tensor([[[1.0, 2.0]], [[INF, NAN]]])
    assert torch.equal(scaled(rows, torch.tensor([3.0, 0.0])), torch.tensor([[[3.0, 6.0]], [[0.0, 0.0]]]))
    assert rows[1, 0, 0] == INF


def test_a_weighted_sum_keeps_the_gradients_shape() -> None:
    gradients = torch.arange(12.0).view(3, 2, 2)
    gradients[1] = NAN
    assert torch.equal(
        weighted_sum(gradients, torch.tensor([2.0, 0.0, 1.0])), torch.tensor([[8.0, 11.0], [14.0, 17.0]])
    )


def test_a_patients_records_are_further_positions() -> None:
    rows = torch.arange(24.0).view(4, 2, 3)
    grouped = by_patient(rows, 2)
    assert grouped.shape == (2, 4, 3)
    assert torch.equal(grouped[1], rows[2:].reshape(4, 3))


def test_square_norms_are_a_patient_each() -> None:
    assert torch.equal(square_norm(torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])), torch.tensor([25.0, 4.0]))


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_the_gram_norm_is_that_of_the_formed_gradient(positions: int, biases: int, width: int) -> None:
    """A bias is an input that is always 1. Rounding may make the norm larger, and never smaller."""
    torch.manual_seed(positions)
    inputs, outputs = (torch.randn(3, positions, size, dtype=torch.float64) for size in (width, 6))
    ones = torch.ones(3, positions, biases, dtype=torch.float64)
    formed = outputs.transpose(1, 2) @ torch.cat([inputs, ones], 2)
    norms = gram_norm(inputs, outputs, biases)
    torch.testing.assert_close(norms, square_norm(formed), rtol=1e-9, atol=0.0)
    assert torch.equal(gram_norm(inputs, outputs), gram_norm(inputs, outputs, 0))
    torch.testing.assert_close(gram(inputs), torch.einsum("bsd,btd->bst", inputs, inputs))


def test_one_position_makes_up_for_squares_that_vanish() -> None:
    """A million squares below the format's least normal number may be missing on either side."""
    nothing, large = torch.zeros(1, 1, 2), torch.full((1, 1, 1), 1e15)
    lost = 2.0**20 * TINY
    assert gram_norm(nothing, large).item() == pytest.approx(1e30 * lost)
    assert gram_norm(large, nothing).item() == pytest.approx(1e30 * lost)
    assert gram_norm(nothing, nothing).item() == 0.0
    assert gram_norm(nothing, nothing, 3).item() == pytest.approx(3 * lost)


def grams(*vectors: list[float]) -> Tensor:
    """The Gram matrix of one patient's positions."""
    return gram(torch.tensor([vectors]))


def test_positions_that_cancel_leave_the_floor_of_the_norm() -> None:
    """Two equal inputs with opposite outputs: the sum of products is 0, the magnitude (3·5 + 3·5)² = 900."""
    norms = norm_of_grams(grams([3.0], [3.0]), grams([5.0], [-5.0]))
    assert norms.item() == pytest.approx(2.0**18 * EPS / 2 * 900.0)


def test_positions_that_agree_have_eight_roundings_more() -> None:
    """The sum of products and the magnitude are both 900."""
    norms = norm_of_grams(grams([3.0], [3.0]).double(), grams([5.0], [5.0]).double())
    excess = norms.item() - 900.0
    assert excess == pytest.approx(8.0 * torch.finfo(torch.float64).eps * 900.0, rel=0.08)


def test_what_one_matrix_may_lack_the_trace_of_the_other_makes_up_for() -> None:
    nothing, large = torch.zeros(1, 2, 2), torch.eye(2)[None] * 1e30
    lost = 2 * 2.0**20 * TINY * 2e30
    assert norm_of_grams(nothing, large).item() == pytest.approx(lost)
    assert norm_of_grams(large, nothing).item() == pytest.approx(lost)


def test_a_diagonal_that_rounding_made_negative_counts_as_nothing() -> None:
    negative = torch.tensor([[[-1.0, 0.0], [0.0, 4.0]]])
    norms = norm_of_grams(negative, torch.eye(2)[None])
    assert norms.item() == pytest.approx(3.0 + 8 * EPS * 4.0)


@pytest.mark.parametrize(
    ("positions", "inputs", "outputs", "cheaper"),
    [(3, 3, 6, False), (3, 1, 19, True), (4, 8, 5, True), (4, 8, 4, False)],
)
def test_two_gram_matrices_are_cheaper_below_the_size_of_a_gradient(
    positions: int, inputs: int, outputs: int, cheaper: bool
) -> None:
    assert gram_is_cheaper(positions, inputs, outputs) is cheaper
