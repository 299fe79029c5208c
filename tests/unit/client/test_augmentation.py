"""Synthetic patients beside real ones: the promise to a real patient stays as it is, and so does the ledger."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file

import client.site
from client import cli
from client.augmentation import Augmented, Synthetic, load_synthetic
from client.config import SitePolicy
from client.folder import open_books
from client.site import Site
from client.training import Randomness, train_round
from shared.errors import PolicyError, StorageError
from shared.messages import PlanQuery, TrainRequest
from shared.personal import save_personal
from shared.plan import RunPlan
from shared.provenance.ancestry import UNKNOWN, Ancestry, PastRun, Share
from shared.provenance.keys import SIGNING_PUB, public_line
from shared.provenance.sidecar import Sidecar, write_sidecar
from shared.provenance.signing import signed
from shared.records import RecordStore, write_store
from shared.tasks.base import Task
from shared.tasks.ct_nodules import UPRIGHT, is_upright
from shared.tasks.registry import find_task
from shared.weights import pack

TASK, GENERATOR = find_task("nodule-classification"), find_task("ct-synthesis")
PLAN = RunPlan(
    task=TASK.name,
    rounds=2,
    local_steps=1,
    sample_rate=1.0,
    records_per_patient=2,
    max_grad_norm=0.2,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)
COUNT = 8


class Silence:
    """Remembers the clipped sums and adds nothing."""

    def __init__(self) -> None:
        self.totals: list[torch.Tensor] = []

    def add(self, total: torch.Tensor, standard_deviation: float) -> torch.Tensor:
        assert standard_deviation > 0
        self.totals.append(total.clone().flatten())
        return total


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "generator.safetensors"
    save_file(GENERATOR.build().state_dict(), path)
    describe(path)
    return path


ANCESTRY = Ancestry(
    runs=(
        PastRun(run="r", plan_digest="p", sample_rate=0.5, noise_multiplier=2.0, delta=1e-3, sites=(Share("h1", 20),)),
    )
)


@pytest.fixture
def make_site(tmp_path: Path, checkpoint: Path, make_nodule_store: Callable[..., RecordStore]) -> Callable[..., Site]:
    def make(name: str, augment_with: str = str(checkpoint), tasks: tuple[str, ...] = (TASK.name,)) -> Site:
        folder = tmp_path / name
        make_nodule_store(folder / "store", patients=6)
        replace(policy(), tasks=tasks, augment_with=augment_with).write(folder / "site.toml")
        (folder / SIGNING_PUB).write_bytes(public_line(SIGNER.public_key()))
        open_books(folder)
        return Site(folder, simulation_seed=1)

    return make


def policy(count: int = COUNT) -> SitePolicy:
    return SitePolicy(name="h1", declared_patients=10, tasks=(TASK.name,), max_epsilon=100.0, augment_patients=count)


SIGNER = Ed25519PrivateKey.generate()
TRUSTED = (SIGNER.public_key(),)


def describe(path: Path, signer: Ed25519PrivateKey = SIGNER, **changes: Any) -> None:
    """Write a description that ``signer`` signed."""
    described = {"task": GENERATOR.name, "run": "r", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    sidecar = Sidecar(**{**described, "epsilon": 9.9, "delta": 1e-3, "ancestry": ANCESTRY, **changes})
    write_sidecar(path.with_suffix(".json"), signed(sidecar, signer))


def drawn_from(checkpoint: Path, count: int = COUNT) -> Synthetic:
    return load_synthetic(checkpoint, TASK, policy(count), TRUSTED)


def request() -> TrainRequest:
    torch.manual_seed(0)
    return TrainRequest("run", 1, PLAN, pack(TASK.build()))


def clipped_sum(synthetic: Synthetic, own: RecordStore, plan: RunPlan = PLAN) -> torch.Tensor:
    noise = Silence()
    torch.manual_seed(0)
    train_round(
        TASK,
        Augmented(TASK.load(synthetic.patients), TASK.load(own)),
        plan,
        1,
        pack(TASK.build()),
        declared_patients=10 + COUNT,
        randomness=replace(Randomness.secure(bytes(32)), noise=noise),
    )
    return torch.cat(noise.totals)


@pytest.mark.parametrize("gone", [0, 3, 6])
def test_one_real_patient_moves_the_sum_by_the_bound_and_no_synthetic_one(
    gone: int, checkpoint: Path, tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    """Were a synthetic patient's draw to hang on who else is there, the sums would differ by more than the bound."""
    synthetic = drawn_from(checkpoint)
    everybody = make_nodule_store(tmp_path / "all", patients=7)
    fewer = everybody.subset(np.delete(np.arange(7), gone))
    difference = float((clipped_sum(synthetic, everybody) - clipped_sum(synthetic, fewer)).norm())
    assert difference == pytest.approx(PLAN.max_grad_norm, rel=1e-3)  # the bound binds, or it would say nothing


def test_one_patient_more_renumbers_no_synthetic_one(
    checkpoint: Path, tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    """They come first, so the same ones join a step whoever comes last among the real."""
    synthetic, everybody = (
        drawn_from(checkpoint),
        make_nodule_store(tmp_path / "all", patients=7),
    )
    half = replace(PLAN, sample_rate=0.5)
    sums = [clipped_sum(synthetic, everybody.subset(np.arange(count)), half) for count in (6, 7)]
    assert sums[0].norm() > PLAN.max_grad_norm
    assert float((sums[1] - sums[0]).norm()) <= PLAN.max_grad_norm * 1.001


def test_a_synthetic_patient_cannot_pass_the_bound_either(
    checkpoint: Path, tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    own = make_nodule_store(tmp_path / "own", patients=6)
    more, less = (
        drawn_from(checkpoint, COUNT + 1),
        drawn_from(checkpoint),
    )
    assert float((clipped_sum(more, own) - clipped_sum(less, own)).norm()) <= PLAN.max_grad_norm * 1.001


def test_every_patient_draws_from_the_data_set_it_belongs_to(
    checkpoint: Path, tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    synthetic, own = (
        drawn_from(checkpoint),
        make_nodule_store(tmp_path / "own", patients=6),
    )
    both = Augmented(TASK.load(synthetic.patients), TASK.load(own))
    assert len(both) == len(both.keys) == COUNT + 6
    assert len({key.tobytes() for key in both.keys}) == COUNT + 6
    drawn = both.draw(torch.tensor([COUNT + 2, 1]), 1, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    real = TASK.load(own).draw(torch.tensor([2]), 1, generator)
    made = TASK.load(synthetic.patients).draw(torch.tensor([1]), 1, generator)
    torch.testing.assert_close(drawn["image"], torch.cat([real["image"], made["image"]]))
    assert len(both.draw(torch.arange(0), 2, generator)) == 0


def test_the_same_checkpoint_draws_the_same_patients_of_both_classes(checkpoint: Path) -> None:
    first, again = (drawn_from(checkpoint) for _ in range(2))
    assert first.patients.digest == again.patients.digest
    assert first.patients.arrays["malignant"].tolist() == [0, 1] * (COUNT // 2)
    longer = drawn_from(checkpoint, COUNT + 4).patients
    np.testing.assert_array_equal(longer.keys[:COUNT], first.patients.keys)
    store = write_store(checkpoint.parent / "as-store", kind="ct-nodules", patients=longer.items(), attributes={})
    assert len(store) == COUNT + 4


def test_the_ledger_the_offer_and_the_mechanism_are_as_without(make_site: Callable[..., Site]) -> None:
    plain, augmented = make_site("plain", augment_with=""), make_site("augmented")
    offers = [site.answer_query(PlanQuery("run", PLAN)) for site in (plain, augmented)]
    assert offers[0] == offers[1]
    replies = [site.answer_train(request()) for site in (plain, augmented)]
    assert plain.ledger.mechanisms() == augmented.ledger.mechanisms() == (PLAN.mechanism(1),)
    assert not np.allclose(replies[0].weights, replies[1].weights)


def test_the_normaliser_counts_the_synthetic_patients_and_the_log_names_their_generator(
    make_site: Callable[..., Site], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def remember(*arguments: Any, declared_patients: int, **more: Any) -> Any:
        told.append(declared_patients)
        return train_round(*arguments, declared_patients=declared_patients, **more)

    monkeypatch.setattr(client.site, "train_round", remember)
    site = make_site("h1")
    site.answer_train(request())
    make_site("h2", augment_with="").answer_train(request())
    assert told == [10 + COUNT, 10]
    (reserved,) = [entry for entry in site.audit.read()[0].entries if entry.event == "reserved"]
    assert reserved.fields["augmented"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_synthetic_patients_are_drawn_as_the_hospitals_own(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no image of a hospital is turned, as an X-ray has an up and a down, no synthetic one may be."""
    site, seen = make_site("h1"), list[bool]()
    store, key = site.store_of("ct-nodules"), (site.folder, "ct-nodules")
    mark, _ = site.patients._stores[key]
    upright = replace(store, attributes={**store.attributes, UPRIGHT: True})
    monkeypatch.setitem(site.patients._stores, key, (mark, upright))

    def remember(task: Task, patients: Augmented, *arguments: Any, **more: Any) -> Any:
        seen.extend(is_upright(part.store) for part in (patients.synthetic, patients.own))
        return train_round(task, patients, *arguments, **more)

    monkeypatch.setattr(client.site, "train_round", remember)
    site.answer_train(request())
    assert seen == [True, True]


def test_an_interrupted_round_gives_the_same_weights(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_site("whole").answer_train(request())
    interrupted = make_site("interrupted")
    with monkeypatch.context() as patched:
        patched.setattr(client.site, "train_round", lambda *_a, **_k: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            interrupted.answer_train(request())
    np.testing.assert_array_equal(Site(interrupted.folder, 1).answer_train(request()).weights, whole.weights)


@pytest.mark.parametrize(
    "ancestry",
    [
        Ancestry(UNKNOWN, "a" * 64, runs=ANCESTRY.runs),
        Ancestry(runs=(replace(ANCESTRY.runs[0], noise_multiplier=0.5),)),
        Ancestry(runs=(replace(ANCESTRY.runs[0], noise_multiplier=0.0),)),
    ],
    ids=["unknown origin", "more than stated", "no noise"],
)
def test_a_generator_whose_epsilon_is_not_what_its_runs_compose_is_refused(
    ancestry: Ancestry, checkpoint: Path
) -> None:
    """The signature is the server's; the hospital adds up for itself."""
    describe(checkpoint, ancestry=ancestry)
    with pytest.raises(PolicyError, match="composes"):
        drawn_from(checkpoint)


@pytest.mark.parametrize("claim", [{"epsilon": None}, {"epsilon": 0.0}, {"delta": None}], ids=str)
def test_a_generator_that_was_not_private_is_refused(claim: dict[str, object], checkpoint: Path) -> None:
    describe(checkpoint, **claim)
    with pytest.raises(PolicyError, match="without privacy"):
        drawn_from(checkpoint)


@pytest.mark.parametrize("claim", ["Infinity", "NaN", '"none"', "true", "-1", "9" * 4000, "1e999"])
def test_an_epsilon_that_is_no_number_is_refused(claim: str, checkpoint: Path) -> None:
    sidecar = checkpoint.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace("9.9", claim))
    with pytest.raises(StorageError, match=r"damaged|epsilon"):
        drawn_from(checkpoint)


def test_a_generators_epsilon_counts_only_under_a_trusted_signature(checkpoint: Path, tmp_path: Path) -> None:
    """Else anybody could claim that a generator which repeats patients has epsilon 0.1."""
    with pytest.raises(PolicyError, match="no key is trusted here"):
        load_synthetic(checkpoint, TASK, policy(), ())
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(StorageError, match="not trusted here"):
        load_synthetic(checkpoint, TASK, policy(), (stranger.public_key(),))
    sidecar = checkpoint.with_suffix(".json")
    signed_text = sidecar.read_text()
    sidecar.write_text(signed_text.replace("9.9", "0.1"))
    with pytest.raises(StorageError, match="signature is wrong"):
        drawn_from(checkpoint)
    values = json.loads(signed_text)
    del values["signature"]
    sidecar.write_text(json.dumps(values))
    with pytest.raises(StorageError, match="not signed"):
        drawn_from(checkpoint)
    del values["version"]
    sidecar.write_text(json.dumps(values))
    with pytest.raises(StorageError, match="not signed"):
        drawn_from(checkpoint)


def test_a_model_that_was_fitted_in_a_hospital_augments_nothing(checkpoint: Path) -> None:
    """Its mark frees it from a signature; it must not be a way around one."""
    checkpoint.write_bytes(save_personal(GENERATOR.build().state_dict()))
    describe(checkpoint, personal=True, patient="everybody")
    with pytest.raises(StorageError, match="nobody signs such a model"):
        drawn_from(checkpoint)


@pytest.mark.parametrize("claim", [{"epsilon": 100.1}, {"epsilon": 99.0, "delta": 0.99}, {"delta": 0.011}], ids=str)
def test_a_generator_less_private_than_the_hospital_permits_is_refused(
    claim: dict[str, float], checkpoint: Path
) -> None:
    """Publishing every record with probability 0.99 has epsilon 0 at delta 0.99: one figure alone says nothing."""
    describe(checkpoint, epsilon=100.0, delta=0.01)
    drawn_from(checkpoint)
    describe(checkpoint, **claim)
    with pytest.raises(PolicyError, match="more privacy"):
        drawn_from(checkpoint)


def test_a_reply_is_sent_again_when_the_generator_is_gone(make_site: Callable[..., Site], checkpoint: Path) -> None:
    site = make_site("h1")
    first = site.answer_train(request())
    checkpoint.unlink()
    again = Site(site.folder, simulation_seed=1).answer_train(request())
    np.testing.assert_array_equal(again.weights, first.weights)
    assert len(site.ledger.mechanisms()) == 1
    with pytest.raises(StorageError):
        site.answer_query(PlanQuery("run", PLAN))


def test_no_image_is_drawn_before_a_round_needs_it(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, drawn = make_site("h1"), list[int]()
    source = find_task(TASK.augmented_by)

    def draw(model: torch.nn.Module, count: int) -> RecordStore:
        drawn.append(count)
        return GENERATOR.as_patients(model, count)

    monkeypatch.setattr("client.augmentation.find_task", lambda _name: replace(source, as_patients=draw))
    site.answer_query(PlanQuery("run", PLAN))
    site.check_augmentation()
    assert drawn == []
    for _ in range(2):
        site.answer_train(request())
    assert drawn == [COUNT]


def test_other_files_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be augmented"):
        load_synthetic(checkpoint, GENERATOR, policy(), TRUSTED)
    describe(checkpoint, task=TASK.name)
    with pytest.raises(PolicyError, match="give one of ct-synthesis"):
        drawn_from(checkpoint)
    describe(checkpoint, sha256="0" * 64)
    with pytest.raises(StorageError, match="was changed"):
        drawn_from(checkpoint)
    with pytest.raises(StorageError, match="none"):
        load_synthetic(tmp_path / "none.safetensors", TASK, policy(), TRUSTED)


def test_a_bad_checkpoint_is_said_at_the_start_and_at_the_query(
    make_site: Callable[..., Site], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_site("good").check_augmentation()
    describe(checkpoint, epsilon=None)
    site = make_site("bad")
    for attempt in (site.check_augmentation, lambda: site.answer_query(PlanQuery("run", PLAN))):
        with pytest.raises(PolicyError, match="states no epsilon"):
            attempt()
    assert site.ledger.mechanisms() == ()
    useless = make_site("useless", tasks=("glucose-forecast",))
    with pytest.raises(PolicyError, match="no task of it takes"):
        useless.check_augmentation()
    text = (site.folder / "site.toml").read_text().replace('server = ""', 'server = "localhost:1"')
    (site.folder / "site.toml").write_text(text)
    monkeypatch.setattr("sys.argv", ["fedward-site", "start", str(site.folder)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "states no epsilon" in capfd.readouterr().err


def test_tasks_that_take_no_synthetic_patients_go_on_as_they_are(make_site: Callable[..., Site]) -> None:
    assert make_site("h1").synthetic(GENERATOR) is None
