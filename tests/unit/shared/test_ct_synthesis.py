"""The GAN's privacy argument, held to by tests: whom a patient moves, and what the generator sees."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from client.training import Randomness, train_round
from shared.dp.engine import BookKeeping
from shared.drafting import draft_plan
from shared.models.gan import ConditionalGan, Discriminator, Smoothing
from shared.models.gan import Generator as ImageMaker
from shared.records import RecordStore
from shared.tasks import ct_synthesis
from shared.tasks.ct_synthesis import TASK
from shared.weights import pack, unpack

PLAN = draft_plan(TASK.name, epsilon=10.0, delta=1e-3, overrides={"rounds": 2, "local_steps": 2, "generator_steps": 2})


class Silence:
    """A noise source that adds nothing."""

    def add(self, total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        assert standard_deviation > 0
        return total


@pytest.fixture(autouse=True)
def _quick_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the classifier learns is not tested here."""
    monkeypatch.setattr("shared.synthesis.STEPS", 5)


@pytest.fixture
def store(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> RecordStore:
    return make_nodule_store(tmp_path / "store", patients=12)


@pytest.fixture
def model() -> ConditionalGan:
    torch.manual_seed(0)
    return ct_synthesis.build()


def train(store: RecordStore, model: ConditionalGan, plan: Any = PLAN, key: int = 1) -> ConditionalGan:
    randomness = replace(Randomness.secure(key.to_bytes(32, "big")), noise=Silence())
    weights = train_round(TASK, TASK.load(store), plan, 1, pack(model), declared_patients=30, randomness=randomness)
    trained = ct_synthesis.build()
    unpack(weights, trained)
    return trained


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_patients_move_the_discriminator_alone(store: RecordStore, model: ConditionalGan) -> None:
    trained = train(store, model, replace(PLAN, generator_steps=0))
    assert not same(trained.discriminator, model.discriminator)
    assert same(trained.generator, model.generator)
    assert same(trained.average, model.average)


def test_the_generator_is_the_same_whoever_the_patients_are(
    tmp_path: Path, store: RecordStore, model: ConditionalGan, make_nodule_store: Callable[..., RecordStore]
) -> None:
    """It learns before the private steps, from what was released and from numbers that no patient touches."""
    others = make_nodule_store(tmp_path / "others", patients=30, seed=9)
    first, second = train(store, model), train(others, model)
    assert same(first.generator, second.generator)
    assert not same(first.generator, model.generator)
    assert not same(first.discriminator, second.discriminator)


def test_a_patients_clipped_gradient_with_its_generated_images_keeps_to_the_bound(
    store: RecordStore, model: ConditionalGan
) -> None:
    bound = 0.3
    batch = TASK.load(store).draw(torch.arange(4), 2, Generator().manual_seed(0))
    model.generator.requires_grad_(False)
    engine = BookKeeping(model)

    def total(rows: list[int]) -> torch.Tensor:
        part = type(batch)({name: tensor[rows] for name, tensor in batch.fields.items()})
        engine.start(len(rows))
        norms = engine.clipped_sum(TASK.loss(model, part), bound, len(rows))
        assert (norms > bound).all(), "the bound must bind for this test to say anything"
        return torch.cat([p.grad.flatten() for p in model.discriminator.parameters() if p.grad is not None])

    without, everybody = total([0, 1, 2]), total([0, 1, 2, 3])
    assert (everybody - without).norm() == pytest.approx(bound, rel=1e-3)


def test_generated_companions_depend_on_their_own_row_only(store: RecordStore, model: ConditionalGan) -> None:
    batch = TASK.load(store).draw(torch.arange(3), 1, Generator().manual_seed(0))
    changed = type(batch)({name: tensor.clone() for name, tensor in batch.fields.items()})
    changed.fields["latent"][1] += 1.0
    before, after = TASK.loss(model, batch), TASK.loss(model, changed)
    assert before[1] != after[1]
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-5, atol=1e-6)


def test_the_generator_pauses_while_the_discriminator_is_fooled(model: ConditionalGan) -> None:
    fooled = ct_synthesis.build()
    fooled.load_state_dict(model.state_dict())
    last = fooled.discriminator.layers[-1]
    last.bias.data.fill_(100.0)  # everything looks real to it
    ct_synthesis.teach_generator(fooled, replace(PLAN, generator_pause=0.5), 1, Generator().manual_seed(0))
    assert same(fooled.generator, model.generator)
    last.bias.data.fill_(-100.0)
    ct_synthesis.teach_generator(fooled, replace(PLAN, generator_pause=0.5), 1, Generator().manual_seed(0))
    assert not same(fooled.generator, model.generator)


def test_a_generator_that_breaks_is_put_back(model: ConditionalGan) -> None:
    broken = ct_synthesis.build()
    broken.load_state_dict(model.state_dict())
    broken.discriminator.layers[0].weight.data.fill_(float("inf"))
    ct_synthesis.teach_generator(broken, replace(PLAN, generator_pause=0.0), 1, Generator().manual_seed(0))
    assert same(broken.generator, model.generator)


def test_the_average_follows_the_generator(model: ConditionalGan) -> None:
    moved = model.generator.layers[0].bias.data.clone()
    model.generator.layers[0].bias.data += 1.0
    ct_synthesis.settle(model)
    torch.testing.assert_close(model.average.layers[0].bias, moved + 1.0 - ct_synthesis.AVERAGE_DECAY)


@pytest.mark.parametrize("side", [32, 64])
def test_both_networks_fit_images_of_either_side(side: int) -> None:
    model = ConditionalGan(8, 4, side=side)
    labels = torch.tensor([0, 1, 1])
    images = model.sample(labels, Generator().manual_seed(0))
    assert images.shape == (3, 1, side, side)
    assert (images >= 0).all()
    assert (images <= 1).all()
    assert model.judge(images, labels).shape == (3,)


def test_the_class_is_heard() -> None:
    torch.manual_seed(1)
    maker, latent = ImageMaker(8), torch.randn(4, 64)
    benign, malignant = (maker(latent, torch.full((4,), label)) for label in (0, 1))
    assert (benign - malignant).abs().mean() > 1e-3
    judge = Discriminator(4, 32, classes=2)
    assert judge(benign).shape == (4, 2)


def test_a_collapsed_generator_is_named(store: RecordStore, model: ConditionalGan) -> None:
    model.average.layers[0].weight.data[:, :64] = 0.0  # deaf to the latent vector
    assert "mode-collapse" in TASK.evaluate(model, store).details["warnings"]


def test_a_vanished_discriminator_and_a_broken_generator_are_named(store: RecordStore, model: ConditionalGan) -> None:
    model.discriminator.layers[-1].weight.data.zero_()
    model.average.layers[0].bias.data.fill_(float("nan"))
    evaluation = TASK.evaluate(model, store)
    assert {"not-finite", "vanishing-discriminator"} <= set(evaluation.details["warnings"])
    assert np.isfinite(evaluation.value("tstr_auroc"))


def test_smoothing_takes_the_chequerboard_and_leaves_the_even() -> None:
    smoothing = Smoothing()
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    chequers = ((rows + columns) % 2).float()[None, None]
    torch.testing.assert_close(smoothing(chequers)[..., 1:-1, 1:-1], torch.full((1, 1, 6, 6), 0.5))
    torch.testing.assert_close(smoothing(torch.full((1, 1, 8, 8), 0.3)), torch.full((1, 1, 8, 8), 0.3))
    assert not list(smoothing.parameters())
    assert not smoothing.state_dict()
