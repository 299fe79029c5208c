"""The attacks find a model that remembers, and find nothing in one that never saw a patient."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Generator

from shared.models.gan import ConditionalGan
from shared.records import RecordStore
from shared.synthesis import real_patches, train_classifier
from shared.tasks.ct_synthesis import SIDE_PX, TASK, build
from simulations.attacks import copying, membership
from simulations.sources import find_source
from simulations.synthesis import SAMPLES, examine


@pytest.fixture
def stores(tmp_path: Path, make_nodule_store: Callable[..., RecordStore]) -> tuple[RecordStore, RecordStore]:
    return tuple(make_nodule_store(tmp_path / str(seed), patients=16, seed=seed) for seed in (1, 2))


@pytest.fixture
def model() -> ConditionalGan:
    torch.manual_seed(0)
    return build()


def test_nothing_is_found_in_a_model_that_saw_nobody(
    stores: tuple[RecordStore, RecordStore], model: ConditionalGan
) -> None:
    found = membership(model, *stores)
    assert found["membership_auc"].value == max(
        found["membership_by_discriminator"].value, found["membership_by_generator"].value
    )
    assert found["membership_by_discriminator"].low < 0.5


def test_a_discriminator_that_learnt_by_heart_is_caught(
    stores: tuple[RecordStore, RecordStore], model: ConditionalGan
) -> None:
    """It is told that the training patches are real and the held-out ones are not: the strongest memory there is."""
    optimizer = torch.optim.Adam(model.discriminator.parameters(), lr=2e-3)
    training, heldout = (real_patches(store, SIDE_PX) for store in stores)
    for _ in range(200):
        optimizer.zero_grad()
        members = model.judge(training.images[:, None], training.labels)
        strangers = model.judge(heldout.images[:, None], heldout.labels)
        (torch.relu(1 - members).mean() + torch.relu(1 + strangers).mean()).backward()
        optimizer.step()
    assert membership(model, *stores)["membership_by_discriminator"].low > 0.8


def test_a_generator_that_copies_is_caught(
    stores: tuple[RecordStore, RecordStore], model: ConditionalGan, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = real_patches(stores[0], SIDE_PX)

    def copy(labels: torch.Tensor, generator: Generator) -> torch.Tensor:
        members = [torch.nonzero(training.labels == label)[:, 0] for label in (0, 1)]
        chosen = [int(members[y][torch.randint(len(members[y]), (1,), generator=generator)]) for y in labels]
        return training.images[torch.tensor(chosen)][:, None]

    honest = copying(model, classifier := train_classifier(training, 0, steps=20), *stores)
    monkeypatch.setattr(model, "sample", copy)
    assert copying(model, classifier, *stores) < 0.5 < honest
    assert membership(model, *stores)["membership_by_generator"].value > 0.6


def test_the_examination_measures_and_leaves_a_picture(
    stores: tuple[RecordStore, RecordStore], model: ConditionalGan, tmp_path: Path
) -> None:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    found = examine(tmp_path / "weights.safetensors", *stores, tmp_path)
    assert {"real_auroc", "membership_auc", "neighbour_ratio"} <= set(found)
    assert found["real_auroc"].value > 0.8
    assert found["few_real_auroc"].value > 0.6
    assert found["few_real_and_synthetic_auroc"].value > 0.6
    assert np.isfinite(found["neighbour_ratio"])
    assert (tmp_path / SAMPLES).read_bytes().startswith(b"\x89PNG")


def test_the_public_start_fits_the_task_and_treats_both_classes_exactly_alike() -> None:
    start = find_source(TASK.name).start
    assert start is not None
    model = build()
    model.load_state_dict(load_file(start))
    images, latent = torch.rand(5, 1, SIDE_PX, SIDE_PX), torch.randn(5, model.average.latent)
    benign, malignant = torch.zeros(5).long(), torch.ones(5).long()
    assert torch.equal(model.judge(images, benign), model.judge(images, malignant))
    assert torch.equal(model.average(latent, benign), model.average(latent, malignant))
