"""One private step against plain autograd, patient by patient."""

import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Generator, Tensor, nn
from torch.optim import SGD

from shared.accounting import OVERFLOW_PROBABILITY
from shared.dp.noise import KeyStream, NoiseSource, SecureNoise, SeededNoise
from shared.dp.optimizer import noise_deviation
from shared.dp.passes import Passes, most_patients, most_sampled
from shared.dp.step import ENGINES, OrdinaryStep, PrivateStep
from shared.models.cnn import LungCTNet
from shared.tasks.base import Batch
from shared.tasks.registry import find_task

FEATURES = 6
BOUND = 0.5
NORMALISER = 7.0


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * (FEATURES - 2), 2)).double()


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["x"].flatten(0, 1))
    labels = batch["y"]
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape).mean(1)


def make_batch(patients: int, records: int, seed: int = 0) -> Batch:
    generator = Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, max(patients, 1), dtype=torch.float64)[:patients, None, None, None]
    return Batch(
        {
            "x": torch.randn(patients, records, 1, FEATURES, generator=generator, dtype=torch.float64) * scale,
            "y": torch.randint(2, (patients, records), generator=generator),
        }
    )


def update(
    batch: Batch,
    noise: float = 1e-12,
    bound: float = BOUND,
    source: NoiseSource | None = None,
    engine: str = "bookkeeping",
    size: int = 16,
    model: nn.Module | None = None,
) -> Tensor:
    """The flat change of the weights by one step of plain SGD at rate 1, times the normaliser: the noised sum."""
    model = model or make_model()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    step = PrivateStep(
        model,
        SGD(model.parameters(), lr=1.0),
        loss,
        noise_multiplier=noise,
        max_grad_norm=bound,
        expected_patients=NORMALISER,
        noise=source or SeededNoise(Generator().manual_seed(0)),
        engine=engine,
    )
    patients = torch.arange(len(batch))
    parts = patients.split(size - 1) if len(patients) else (patients,)
    step([Batch({name: t[part] for name, t in batch.fields.items()}).padded(size) for part in parts])
    step.close()
    return (before - nn.utils.parameters_to_vector(model.parameters()).detach()) * NORMALISER


def patient(batch: Batch, index: int) -> Batch:
    return Batch({name: tensor[index : index + 1] for name, tensor in batch.fields.items()})


def clipped_by_hand(batch: Batch, bound: float = BOUND) -> Tensor:
    """The oracle: one backward pass of ordinary autograd per patient."""
    model = make_model()
    total = torch.zeros_like(nn.utils.parameters_to_vector(model.parameters()))
    for index in range(len(batch)):
        model.zero_grad()
        loss(model, patient(batch, index)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += gradient * min(1.0, bound / (gradient.norm().item() + 1e-6))
    return total.detach()


@pytest.mark.parametrize("patients", [1, 2, 9])
@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("bound", [0.01, 0.5, 1e6])
@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_agrees_with_a_loop_over_patients(patients: int, records: int, bound: float, engine: str) -> None:
    batch = make_batch(patients, records)
    found = update(batch, bound=bound, engine=engine, noise=1e-18)
    torch.testing.assert_close(found, clipped_by_hand(batch, bound), rtol=1e-9, atol=1e-10)


def noise_of(key: int) -> SecureNoise:
    return SecureNoise(KeyStream(key.to_bytes(32, "big"), b"noise"))


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_step_leaves_no_tensor_behind(engine: str) -> None:
    """A circle through autograd is out of the collector's sight: a daemon would grow by it in every round."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    update(make_batch(3, 2), engine=engine)  # whatever is kept once for all
    before = tensors()
    for _ in range(3):
        update(make_batch(3, 2), engine=engine)
    assert tensors() == before


def test_an_empty_batch_is_a_noise_only_step() -> None:
    assert update(make_batch(0, 3)).abs().max() < 1e-9
    noised = update(make_batch(0, 3), noise=2.0, source=noise_of(5))
    assert noised.abs().min() > 0.0
    assert noised.std().item() == pytest.approx(2.0 * BOUND, rel=0.4)


@given(patients=st.integers(1, 6), records=st.integers(1, 3), changed=st.integers(0, 5), seed=st.integers(0, 10_000))
def test_one_patient_moves_the_sum_by_at_most_the_bound(patients: int, records: int, changed: int, seed: int) -> None:
    with_patient = make_batch(patients, records, seed)
    keep = torch.arange(patients) != changed % patients
    without = Batch({name: tensor[keep] for name, tensor in with_patient.fields.items()})
    moved = (update(with_patient) - update(without)).norm().item()
    assert moved <= BOUND * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
def test_a_patient_without_a_finite_gradient_contributes_nothing(poison: float, engine: str) -> None:
    clean = make_batch(4, 2)
    poisoned = Batch({**clean.fields, "x": clean["x"].clone()})
    poisoned["x"][1, 0, 0, 0] = poison
    rest = Batch({name: tensor[[0, 2, 3]] for name, tensor in clean.fields.items()})
    moved = update(poisoned, engine=engine) - update(rest, engine=engine)
    assert moved.isfinite().all()
    if poison == 1e300:  # the layer's tanh may bound it: then the patient counts as any other
        assert moved.norm().item() <= BOUND * (1 + 1e-6)
    else:
        assert moved.abs().max().item() < 1e-10


@pytest.mark.parametrize("patients", [0, 3, 40])
def test_weights_under_which_nothing_is_finite_give_noise_only(patients: int) -> None:
    """What is not finite adds nothing, here everybody's gradient."""
    model = make_model()
    nn.init.constant_(model[3].bias, math.nan)
    noised = update(make_batch(patients, 2), noise=1.0, model=model, source=noise_of(1))
    finite = noised[noised.isfinite()]
    assert len(finite) == len(noised) - 2  # all but the two weights that were no numbers before
    assert finite.std().item() == pytest.approx(BOUND, rel=0.3)


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_parts_add_up_to_the_whole_and_noise_is_added_once(engine: str) -> None:
    batch = make_batch(9, 2)
    whole = update(batch, noise=1.0, engine=engine, source=noise_of(1))
    parts = update(batch, noise=1.0, engine=engine, source=noise_of(1), size=3)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)  # the grid's step, not the noise's


def test_noise_has_the_promised_scale() -> None:
    batch = make_batch(3, 1)
    signal = update(batch)
    draws = torch.cat([update(batch, noise=3.0, source=noise_of(key)) - signal for key in range(200)])
    assert draws.mean().item() == pytest.approx(0.0, abs=0.05)
    assert draws.std().item() == pytest.approx(3.0 * BOUND, rel=0.03)


def test_the_normaliser_is_the_public_constant_whatever_the_batch() -> None:
    """The same patient moves the weights equally in a small and in a large data set's step."""
    one, nine = make_batch(1, 1), make_batch(9, 1)
    same = Batch({name: torch.cat([one[name]] * 9) for name in nine.fields})
    torch.testing.assert_close(update(same), 9 * update(one), rtol=1e-7, atol=1e-9)


PASSES = {"of 64 records": Passes.of(4, None, 60, 0.5), "for whom there is room": Passes.of(4, 256, 60, 1.0)}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("sampled", [0, 1, 15, 16, 31, 50])
def test_every_step_has_the_same_passes_and_draws_as_many_patients(sampled: int, passes: Passes) -> None:
    """Neither time, memory nor rounding may depend on how many were sampled."""
    drawn: list[int] = []

    def draw(chosen: Tensor) -> Batch:
        drawn.append(len(chosen))
        return Batch({"x": 1.0 + chosen[:, None].double()})

    parts = list(passes.of_step(torch.arange(sampled) + 7, 60, draw))
    assert [len(part) for part in parts] == drawn == [passes.rows] * passes.count
    assert all(part.padding >= 1 for part in parts)
    patients = torch.cat([part["x"][: part.real, 0] for part in parts])
    assert torch.equal(patients, torch.arange(sampled) + 8.0)
    assert all(not part["x"][part.real :].any() for part in parts)


def test_a_store_without_patients_gives_passes_of_padding() -> None:
    passes = Passes.of(4, None, 60, 0.5)
    parts = list(passes.of_step(torch.arange(0), 0, lambda chosen: make_batch(len(chosen), 4)))
    assert [(len(part), part.real) for part in parts] == [(passes.rows, 0)] * passes.count


def test_a_sample_beyond_the_public_room_is_cut() -> None:
    passes = Passes.of(2, None, 20, 0.1)
    parts = list(passes.of_step(torch.arange(30), 30, lambda chosen: make_batch(len(chosen), 2)))
    assert sum(part.real for part in parts) == passes.room < 30
    assert len(parts) == passes.count


@pytest.mark.parametrize("declared", [1, 10, 37, 200, 5000])
@pytest.mark.parametrize("rate", [1e-4, 0.02, 0.5, 0.99, 1.0])
def test_the_room_is_the_least_that_hardly_any_sample_exceeds(declared: int, rate: float) -> None:
    """Against SciPy's binomial distribution, of all patients but one; fewer patients reach the room less often."""
    others, room = most_patients(declared) - 1, most_sampled(declared, rate)
    assert 1 <= room <= others + 1
    assert stats.binom.sf(room - 1, others, rate) <= OVERFLOW_PROBABILITY
    assert room == 1 or stats.binom.sf(room - 2, others, rate) > OVERFLOW_PROBABILITY
    assert stats.binom.sf(room - 1, others - 1, rate) <= stats.binom.sf(room - 1, others, rate)


@pytest.mark.parametrize(("records", "at_once"), [(1, None), (2, None), (64, None), (4, 256), (64, 10)])
@pytest.mark.parametrize("declared", [10, 40, 390, 3000])
def test_passes_have_room_for_the_sample_and_keep_to_the_records_of_a_pass(
    records: int, at_once: int | None, declared: int
) -> None:
    passes = Passes.of(records, at_once, declared, 0.5)
    assert passes.room >= most_sampled(declared, 0.5)
    assert passes.rows * records <= max(at_once or 64, 2 * records)
    assert passes.size * (passes.count - 1) < most_sampled(declared, 0.5)


def amplifier(seed: int) -> nn.Module:
    """Weights that turn a kernel's rounding into gradients: two hidden units that are equal in exact arithmetic."""
    torch.manual_seed(seed)
    model = LungCTNet()
    with torch.no_grad():
        second, hidden, last = model.features[3], model.classifier[1], model.classifier[3]
        second.weight[32:], second.bias[32:] = second.weight[:32], second.bias[:32]  # twin filters
        one, other = torch.rand(2, 32 * 49)
        hidden.weight.zero_(), hidden.bias.zero_(), last.weight.zero_()
        hidden.weight[0], hidden.weight[1] = torch.cat([one, other]), torch.cat([other, one])
        last.weight[1, 0], last.weight[1, 1], last.bias[0] = 1e9, -1e9, 10.0
    return model


def amplified_sum(patients: int, size: int, seed: int) -> Tensor:
    generator = Generator().manual_seed(1)
    images, labels = torch.rand(40, 1, 1, 28, 28, generator=generator), torch.ones(40, 1, dtype=torch.long)
    batch = Batch({"image": images[:patients], "malignant": labels[:patients]})
    recorder = Recorder()
    step = PrivateStep(
        model := amplifier(seed),
        SGD(model.parameters(), lr=1e-12),
        find_task("nodule-classification").loss,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_patients=1.0,
        noise=recorder,
    )
    step([batch.padded(size)])
    return torch.cat([total.flatten() for total in recorder.totals])


class Recorder:
    """Remembers the clipped sums exactly, and adds nothing."""

    def __init__(self) -> None:
        self.totals: list[Tensor] = []

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        self.totals.append(total.clone())
        return total


def test_one_patient_more_does_not_change_the_others_even_under_hostile_weights() -> None:
    """With one shape for every pass the bound holds.

    Passes that followed the batch's size moved the sum by up to 6.3 times the bound here (15 patients against 16:
    kernels round differently below 16 rows).
    """
    for seed in range(6):
        moved = amplified_sum(15, 32, seed) - amplified_sum(16, 32, seed)
        assert moved.norm().item() <= 1.0 + 1e-6


class Deviations(Recorder):
    """Remembers the standard deviations that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    def add(self, total: Tensor, standard_deviation: float) -> Tensor:
        self.asked.append(standard_deviation)
        return super().add(total, standard_deviation)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_source_is_asked_once_a_step_for_the_noise_of_the_bound(parts: int) -> None:
    source = Deviations()
    update(make_batch(15 * parts, 1), noise=3.0, source=source)
    assert source.asked == [noise_deviation(3.0, BOUND)] * 4, "four parameters"


def test_the_padding_of_a_part_counts_zero_even_where_it_is_not_zeros() -> None:
    batch = make_batch(4, 2)
    padded = Batch(batch.fields, padding=2)
    model = make_model()
    source = Recorder()
    step = PrivateStep(
        model, SGD(model.parameters(), lr=1.0), loss, noise_multiplier=1.0, max_grad_norm=BOUND, expected_patients=1.0,
        noise=source,
    )  # fmt: skip
    step([padded])
    first = Batch({name: tensor[:2] for name, tensor in batch.fields.items()})
    found = torch.cat([total.flatten() for total in source.totals])
    torch.testing.assert_close(found, clipped_by_hand(first), rtol=1e-9, atol=1e-10)


def test_a_step_of_no_part_at_all_is_a_mistake() -> None:
    model = make_model()
    step = PrivateStep(
        model, SGD(model.parameters(), lr=1.0), loss, noise_multiplier=1.0, max_grad_norm=BOUND, expected_patients=1.0,
        noise=noise_of(1),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^A private step needs at least one part, which may be all padding\.$"):
        step([])


def test_a_second_step_starts_from_nothing() -> None:
    """Neither the first step's sum nor its gradients may enter the second."""
    model, source = make_model(), Recorder()
    step = PrivateStep(
        model, SGD(model.parameters(), lr=0.0), loss, noise_multiplier=1.0, max_grad_norm=BOUND, expected_patients=1.0,
        noise=source,
    )  # fmt: skip
    for _ in range(2):
        step([make_batch(3, 1).padded(4)])
    assert all(torch.equal(one, two) for one, two in zip(source.totals[:4], source.totals[4:], strict=True))
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_closing_gives_back_an_ordinary_model(engine: str) -> None:
    model = make_model()
    step = PrivateStep(
        model, SGD(model.parameters(), lr=1.0), loss, noise_multiplier=1.0, max_grad_norm=BOUND, expected_patients=1.0,
        noise=noise_of(1), engine=engine,
    )  # fmt: skip
    step.close()
    loss(model, make_batch(2, 1)).sum().backward()
    ordinary = make_model()
    loss(ordinary, make_batch(2, 1)).sum().backward()
    for one, other in zip(model.parameters(), ordinary.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_an_unnamed_engine_is_bookkeeping(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for name, build in ENGINES.items():
        monkeypatch.setitem(ENGINES, name, lambda model, name=name, build=build: (made.append(name), build(model))[1])
    model = make_model()
    PrivateStep(
        model, SGD(model.parameters(), lr=1.0), loss, noise_multiplier=1.0, max_grad_norm=BOUND, expected_patients=1.0,
        noise=noise_of(1),
    ).close()  # fmt: skip
    assert made == ["bookkeeping"]


def test_an_ordinary_step_descends_the_mean_loss_and_an_empty_one_does_nothing() -> None:
    model, reference, batch = make_model(), make_model(), make_batch(3, 2)
    step = OrdinaryStep(model, SGD(model.parameters(), lr=0.5), loss)
    step(make_batch(0, 2))
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)
    for _ in range(2):  # gradients of the first must not enter the second
        step(batch)
        reference.zero_grad()
        (loss(reference, batch).sum() / 3).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.5 * parameter.grad)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_passes_are_as_few_as_the_room_asks_for_and_as_small() -> None:
    """Worked by hand: room for 63, 31 and 1 patients in a pass, for the c that the plan's numbers give."""
    most = most_sampled(400, 0.5)
    for records, at_once, in_a_pass in [
        (1, None, 63),
        (2, None, 31),
        (2, 64, 31),
        (3, None, 20),
        (4, 20, 4),
        (64, None, 1),
        (65, 10, 1),
    ]:
        passes = Passes.of(records, at_once, 400, 0.5)
        assert passes.count == math.ceil(most / in_a_pass)
        assert passes.size == math.ceil(most / passes.count)
        assert (passes.rows, passes.room) == (passes.size + 1, passes.size * passes.count)


@pytest.mark.parametrize(("declared", "most"), [(1, 6), (99, 104), (100, 105), (119, 124), (120, 126), (1000, 1050)])
def test_a_hospital_may_have_a_twentieth_more_and_at_least_five_more(declared: int, most: int) -> None:
    assert most_patients(declared) == most


def test_a_pass_draws_the_stores_first_patients_beside_the_sampled_ones() -> None:
    """Whoever was sampled: which others are drawn must not depend on it. A small store's come round again."""
    drawn: list[list[int]] = []

    def draw(chosen: Tensor) -> Batch:
        drawn.append(chosen.tolist())
        return Batch({"x": 1.0 + chosen[:, None].double()})

    passes = Passes(size=3, count=3)
    parts = list(passes.of_step(torch.tensor([5, 6, 7, 8]), 9, draw))
    assert drawn == [[5, 6, 7, 3], [8, 1, 2, 3], [0, 1, 2, 3]]
    assert [part["x"].flatten().tolist() for part in parts] == [[6, 7, 8, 0], [9, 0, 0, 0], [0, 0, 0, 0]]
    drawn.clear()
    list(passes.of_step(torch.tensor([0]), 1, draw))
    assert drawn == [[0, 0, 0, 0]] * 3
