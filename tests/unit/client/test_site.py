"""A site's answers: policy, budget, replay, and what may leave."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from torch import Tensor

import client.site
from client.app import SITE_FOLDER, SiteApp, app
from client.audit_check import verify
from client.config import SitePolicy
from client.folder import open_books
from client.policy import check_engine
from client.site import Site
from client.training import rung_of
from shared.accounting import epsilon_of
from shared.errors import BudgetExceeded, ErrorCode, FederationError, PlanError, PolicyError, ProtocolError
from shared.messages import PlanQuery, TrainReply, TrainRequest, error_code
from shared.models.cnn import LungCTNet
from shared.plan import RunPlan
from shared.tasks.registry import all_tasks, find_task
from shared.weights import pack

PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=2,
    sample_rate=0.5,
    records_per_patient=2,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)
POLICY = SitePolicy(
    name="st-elsewhere",
    declared_patients=10,
    tasks=("nodule-classification",),
    max_epsilon=PLAN.epsilon(),
    max_delta=0.01,
    max_sample_rate=0.6,
)


@pytest.fixture
def site(tmp_path: Path, make_nodule_store: Any) -> Site:
    make_nodule_store(tmp_path / "store")
    POLICY.write(tmp_path / "site.toml")
    open_books(tmp_path)
    return Site(tmp_path)


def request(number: int = 1, plan: RunPlan = PLAN, run: str = "run", shift: float = 0.0) -> TrainRequest:
    weights = np.zeros_like(pack(find_task(plan.task).build())) + np.float32(0.01 + shift)
    return TrainRequest(run, number, plan, weights)


def ask(site: Site, kind: str, content: RecordDict) -> Message:
    return _answer(app, {SITE_FOLDER: str(site.folder)}, kind, content)


def _answer(asked: SiteApp, config: dict[str, Any], kind: str, content: RecordDict) -> Message:
    message = Message(content, reply_to=_incoming(kind))
    message.metadata.__dict__["_message_type"] = kind
    return asked(message, Context(1, 5, config, RecordDict(), {}))


def _incoming(kind: str) -> Message:
    metadata = Metadata(1, "m", 1, 5, "", "g", 0.0, 3600.0, kind)
    return Message(content=RecordDict(), metadata=metadata)  # type: ignore[call-overload]


def test_policy_survives_its_file(tmp_path: Path) -> None:
    POLICY.write(tmp_path / "site.toml")
    assert SitePolicy.read(tmp_path / "site.toml") == POLICY


@pytest.mark.parametrize(
    "line",
    [
        'tasks = "nodule-classification-and-more"',
        "max-epsilon = true",
        "max-epsilon = nan",
        "max-grad-norm = nan",
        "max-sample-rate = nan",
        "min-noise-multiplier = nan",
        "max-delta = 0.9",
        "declared-patients = 0",
        "declared-patients = 10.5",
        'name = ""',
        "simulation-seed = 4",
        "surprise = 1",
    ],
)
def test_a_policy_that_would_permit_anything_is_refused(tmp_path: Path, line: str) -> None:
    POLICY.write(tmp_path / "site.toml")
    key = line.split(" = ", maxsplit=1)[0]
    kept = [old for old in (tmp_path / "site.toml").read_text().splitlines() if not old.startswith(key + " ")]
    (tmp_path / "site.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(PolicyError):
        SitePolicy.read(tmp_path / "site.toml")


def test_a_task_that_exists_but_is_not_permitted_is_refused(site: Site, tmp_path: Path) -> None:
    replace(POLICY, tasks=("glucose-forecast",)).write(tmp_path / "site.toml")
    with pytest.raises(PolicyError, match="not permitted"):
        Site(tmp_path).answer_query(PlanQuery("run", PLAN))


def test_two_hospitals_never_share_noise(site: Site, tmp_path: Path, make_nodule_store: Any) -> None:
    """Same name, same data, same request: only the secret key differs."""
    make_nodule_store(tmp_path / "twin" / "store")
    POLICY.write(tmp_path / "twin" / "site.toml")
    open_books(tmp_path / "twin")
    first, second = site.answer_train(request()), Site(tmp_path / "twin").answer_train(request())
    assert abs(np.corrcoef(first.weights, second.weights)[0, 1]) < 0.05


def test_metrics_are_refused(site: Site) -> None:
    assert error_code(ask(site, "evaluate", RecordDict())) is ErrorCode.BAD_MESSAGE


def test_an_acceptable_plan_is_accepted_and_costs_nothing(site: Site) -> None:
    offer = site.answer_query(PlanQuery("run", PLAN))
    assert (offer.site, offer.declared_patients, offer.plan_digest) == ("st-elsewhere", 10, PLAN.digest)
    assert site.ledger.mechanisms() == ()


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.1},
        {"noise_multiplier": 0.0},
        {"max_grad_norm": 100.0},
        {"delta": 0.5},
        {"sample_rate": 0.9},
        {"task": "other-task"},
    ],
)
def test_a_plan_against_the_policy_is_refused(site: Site, change: dict[str, float]) -> None:
    with pytest.raises((PolicyError, PlanError)):
        site.answer_query(PlanQuery("run", replace(PLAN, **change)))  # type: ignore[arg-type]


def test_a_plan_beyond_the_budget_is_refused_before_anything_moves(site: Site) -> None:
    with pytest.raises(BudgetExceeded):
        site.answer_query(PlanQuery("run", replace(PLAN, rounds=4)))


def test_rounds_spend_exactly_the_plan(site: Site) -> None:
    for number in (1, 2, 3):
        site.answer_train(request(number))
    assert epsilon_of(site.ledger.mechanisms(), PLAN.delta) == PLAN.epsilon()
    with pytest.raises(BudgetExceeded):
        site.answer_train(request(1, run="another"))
    assert len(site.ledger.releases()) == 3


def test_a_run_taken_up_again_is_not_counted_twice(site: Site) -> None:
    site.answer_train(request(1))
    assert site.answer_query(PlanQuery("run", PLAN)).plan_digest == PLAN.digest
    with pytest.raises(BudgetExceeded):
        site.answer_query(PlanQuery("another", PLAN))
    with pytest.raises(ProtocolError) as caught:
        site.answer_query(PlanQuery("run", replace(PLAN, seed=9)))
    assert caught.value.code is ErrorCode.PLAN_CHANGED


def test_a_replay_returns_the_same_bytes_without_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.answer_train(request())
    monkeypatch.setattr(client.site, "train_round", None)
    assert site.answer_train(request()).weights.tobytes() == first.weights.tobytes()
    assert len(site.ledger.releases()) == 1


def test_a_crash_in_training_is_repeated_to_the_same_bytes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a fresh key per release, as in a deployment: the key is kept until commit."""
    real, outputs = client.site.train_round, []

    def crash_after_training(*args: Any, **named: Any) -> Any:
        outputs.append(real(*args, **named))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(client.site, "train_round", crash_after_training)
        with pytest.raises(KeyboardInterrupt):
            Site(tmp_path).answer_train(request())
    reply = Site(tmp_path).answer_train(request())
    assert reply.weights.tobytes() == outputs[0].tobytes()
    assert Site(tmp_path).ledger.mechanisms() == (PLAN.mechanism(1),)


@pytest.mark.parametrize("room", [0, 600, 1200, 20_000, 40_000, 200_000, 1_000_000, 1_650_000])
def test_a_full_disk_releases_nothing_and_the_round_is_done_once_there_is_space(
    site: Site, tmp_path: Path, room: int, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Of the files that grow, the audit log is the smallest, and the ledger with its reply of 1.7 MB the largest."""
    with disk_full_after(room):
        reply = ask(site, "train", request().to_content())
        assert reply.has_error(), "nothing leaves"
        assert error_code(reply) is ErrorCode.STORAGE_FAILED
    assert all(release.committed_at is None for release in site.ledger.releases())
    assert verify(site.audit).problems == ()
    begun = len(site.ledger.releases())
    site = Site(tmp_path)
    assert TrainReply.from_content(ask(site, "train", request().to_content()).content).round == 1
    assert [release.committed_at is not None for release in site.ledger.releases()] == [True]
    assert site.ledger.mechanisms() == (PLAN.mechanism(1),), f"spent once, {begun} times begun"
    assert (verify(site.audit).problems, verify(site.audit).remarks) == ((), ())


def test_two_releases_never_share_noise_in_a_deployment(site: Site, tmp_path: Path) -> None:
    first = Site(tmp_path).answer_train(request(1))
    second = Site(tmp_path).answer_train(request(2))
    assert np.abs(first.weights - second.weights).max() > 0.01


def test_nothing_but_code_makes_a_hospitals_noise_repeatable(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the environment nor a node's configuration passes a seed; the audit log names every release's source."""
    for name in ("FEDWARD_TEST_SEED", "FEDWARD_SEED", "SIMULATION_SEED", "PYTEST_CURRENT_TEST"):
        monkeypatch.setenv(name, "7")
    config: dict[str, str | float | int | bool] = {SITE_FOLDER: str(tmp_path), "simulation-seed": 7}
    keys = []
    with monkeypatch.context() as patched:
        patched.setattr(client.site.Randomness, "simulated", None)
        secure = client.site.Randomness.secure
        patched.setattr(client.site.Randomness, "secure", lambda key: keys.append(key) or secure(key))
        for number in (1, 2):
            assert not _answer(app, config, "train", request(number).to_content()).has_error()
    assert len(set(keys)) == 2
    assert not _answer(SiteApp(7), config, "train", request(3).to_content()).has_error()
    lines = [entry for entry in site.audit.read()[0].entries if entry.event == "reserved"]
    assert [entry.fields["noise"] for entry in lines] == ["chacha20", "chacha20", "seeded"]
    result = verify(site.audit)
    assert result.problems == ()
    assert [f"Line {lines[2].sequence} " in remark and "seeded" in remark for remark in result.remarks] == [True]


def test_the_audit_log_names_the_rung_and_the_threads_of_every_reservation(site: Site) -> None:
    site.answer_train(request())
    (line,) = [entry for entry in site.audit.read()[0].entries if entry.event == "reserved"]
    rung = rung_of(find_task(PLAN.task), PLAN, 10)
    assert (line.fields["rung"], line.fields["threads"]) == (rung.name, rung.threads)


@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_machine_whose_kernels_are_all_unsafe_refuses_before_anything_is_spent(
    site: Site, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's own forward pass rounds otherwise at every call, so that no rung can be safe."""
    task, calls = find_task(PLAN.task), itertools.count(1)
    unsafe = replace(task, build=lambda: _Restless(calls))
    monkeypatch.setattr(client.site, "find_task", lambda _: unsafe)
    content = PlanQuery("run", PLAN).to_content() if kind == "query" else request().to_content()
    with pytest.raises(FederationError) as refused:
        site.answer(kind, content)
    assert refused.value.code is ErrorCode.UNSAFE_KERNELS
    assert site.ledger.mechanisms() == ()
    assert site.audit.read()[0].entries[-1].fields["code"] == "unsafe-kernels"


class _Restless(LungCTNet):
    def __init__(self, calls: Iterator[int]) -> None:
        super().__init__()
        self._calls = calls

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * (1.0 + next(self._calls) * 2.0**-20)


def test_more_patients_than_a_step_has_room_for_are_refused_before_anything_is_spent(
    site: Site, tmp_path: Path
) -> None:
    """12 patients: ten declared ones leave room for fifteen, one leaves room for six."""
    replace(POLICY, declared_patients=1).write(tmp_path / "site.toml")
    for refused in (Site(tmp_path).check_patients, lambda: Site(tmp_path).answer_query(PlanQuery("run", PLAN))):
        with pytest.raises(PolicyError, match=r"more than 6 patients.*fedward-site declare"):
            refused()
    with pytest.raises(PolicyError, match="fedward-site declare"):
        Site(tmp_path).answer_train(request())
    assert site.ledger.releases() == ()
    replace(POLICY, declared_patients=7).write(tmp_path / "site.toml")
    Site(tmp_path).check_patients()


@pytest.mark.parametrize("name", sorted(all_tasks()))
def test_an_engine_that_cannot_clip_a_tasks_model_is_refused_as_a_plan(name: str) -> None:
    """Opacus has no hooks for torch's recurrent layers, so no plan for it may reach a reservation."""
    task = find_task(name)
    check_engine(PLAN, task)
    opacus = replace(PLAN, engine="opacus")
    if any(isinstance(module, torch.nn.RNNBase) for module in task.build().modules()):
        with pytest.raises(PolicyError, match=f"'opacus' cannot train {name}"):
            check_engine(opacus, task)
    else:
        check_engine(opacus, task)


def test_a_recurrent_task_with_opacus_is_refused_at_the_query(tmp_path: Path, make_cgm_store: Any) -> None:
    make_cgm_store(tmp_path / "store")
    replace(POLICY, tasks=("glucose-forecast",)).write(tmp_path / "site.toml")
    open_books(tmp_path)
    site, plan = Site(tmp_path), replace(PLAN, task="glucose-forecast", engine="opacus")
    with pytest.raises(PolicyError, match="Use engine = 'bookkeeping'"):
        site.answer_query(PlanQuery("run", plan))
    with pytest.raises(PolicyError, match="Use engine = 'bookkeeping'"):
        site.answer_train(request(plan=plan))
    assert site.ledger.releases() == ()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights_are_refused_before_anything_is_spent(site: Site, bad: float) -> None:
    with pytest.raises(ProtocolError):
        site.answer_train(request(shift=bad))
    assert site.ledger.mechanisms() == ()


def test_weights_of_another_model_are_refused_before_anything_is_spent(site: Site) -> None:
    with pytest.raises(ProtocolError):
        site.answer_train(TrainRequest("run", 1, PLAN, np.zeros(7, np.float32)))
    assert site.ledger.mechanisms() == ()


def test_through_the_app_only_the_agreed_fields_leave(site: Site) -> None:
    reply = ask(site, "train", request().to_content())
    assert set(reply.content) == {"config"}
    assert set(reply.content["config"]) == {"round", "plan-digest", "weights"}
    assert TrainReply.from_content(reply.content).plan_digest == PLAN.digest
    offer = ask(site, "query", PlanQuery("run", PLAN).to_content())
    assert set(offer.content) == {"config"}
    assert set(offer.content["config"]) == {"site", "declared-patients", "plan-digest"}


def test_an_exception_leaves_as_a_bare_code(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: Any, **_named: Any) -> None:
        raise RuntimeError("CANARY Mrs Jones /data/jones.dcm")

    monkeypatch.setattr(client.site, "train_round", fail)
    with caplog.at_level(logging.DEBUG):
        reply = ask(site, "train", request().to_content())
    assert (reply.error.reason, error_code(reply)) == ("internal", ErrorCode.INTERNAL)
    assert "CANARY" not in repr(reply) + caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"config": ConfigRecord({"run": "r", "round": 1, "plan": "rubbish"})}),
        RecordDict({"config": ConfigRecord({"run": "r" * 1000, "plan": PLAN.to_json()})}),
        RecordDict({"config": ConfigRecord({"run": "r", "round": 99, "plan": PLAN.to_json()})}),
    ],
)
@pytest.mark.parametrize("kind", ["train", "query"])
def test_rubbish_gets_a_code_and_costs_nothing(site: Site, kind: str, content: RecordDict) -> None:
    reply = ask(site, kind, content)
    if kind == "train" or reply.has_error():
        assert error_code(reply) in (ErrorCode.BAD_MESSAGE, ErrorCode.BAD_PLAN)
    assert site.ledger.mechanisms() == ()
