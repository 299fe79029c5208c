"""A server that asks for what it must not have: a code is all it gets, the ledger stays, the audit log tells."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, RecordDict

import client.site
from client.app import SERVER_FINGERPRINT, SITE_FOLDER, app
from client.audit_check import verify
from client.config import SitePolicy
from client.folder import open_books
from client.site import Site
from shared.errors import ErrorCode
from shared.messages import PlanQuery, TrainRequest, error_code
from shared.plan import RunPlan
from shared.tasks.registry import find_task
from shared.weights import pack

PLAN = RunPlan(
    task="nodule-classification",
    rounds=3,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=2.0,
    delta=1e-3,
    learning_rate=0.5,
)
SERVER = "0123456789abcdef"
WEIGHTS = np.zeros_like(pack(find_task(PLAN.task).build()))


@pytest.fixture
def site(tmp_path: Path, make_nodule_store: Any) -> Site:
    make_nodule_store(tmp_path / "store")
    policy(tmp_path)
    open_books(tmp_path)
    return Site(tmp_path, server=SERVER)


def policy(folder: Path, **changes: Any) -> None:
    values = {
        "name": "st-elsewhere",
        "declared_patients": 10,
        "tasks": ("nodule-classification",),
        "max_epsilon": PLAN.epsilon(),
        "max_delta": PLAN.delta,
        "max_sample_rate": 0.6,
        "min_noise_multiplier": 0.5,
    }
    SitePolicy(**{**values, **changes}).write(folder / "site.toml")


def send(site: Site, kind: str, content: RecordDict) -> Message:
    config = {SITE_FOLDER: str(site.folder), SERVER_FINGERPRINT: site.server}
    message = Message(content, reply_to=_envelope())
    message.metadata.__dict__["_message_type"] = kind
    return app(message, Context(1, 5, config, RecordDict(), {}))


def _envelope() -> Message:
    return Message(content=RecordDict(), metadata=Metadata(1, "m", 1, 5, "", "g", 0.0, 3600.0, "query"))  # type: ignore[call-overload]


def train(number: int = 1, plan: RunPlan = PLAN, weights: Any = WEIGHTS, run: str = "run") -> RecordDict:
    return TrainRequest(run, number, plan, weights).to_content()


def lines(site: Site) -> list[dict[str, Any]]:
    return [{"event": entry.event, **entry.fields} for entry in site.audit.read()[0].entries]


def assert_refused(site: Site, kind: str, content: RecordDict, *codes: ErrorCode) -> None:
    """Nothing but a code leaves, the ledger does not move, and the log has a line for it."""
    before, length = site.ledger.releases(), len(lines(site))
    reply = send(site, kind, content)
    assert reply.has_error()
    assert error_code(reply) in codes
    assert reply.error.reason == error_code(reply).value
    assert site.ledger.releases() == before
    new = lines(site)[length:]
    assert [line["event"] for line in new] in (["refused"], ["asked", "refused"])
    assert new[-1]["code"] == reply.error.reason
    assert verify(site.audit).problems == ()


def _raw_plan(**changes: Any) -> RecordDict:
    text = json.dumps({**asdict(PLAN), **changes})
    content = train()
    content["config"]["plan"] = text
    return content


@pytest.mark.parametrize("kind", ["query", "train"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"noise_multiplier": 0.0}, ErrorCode.POLICY_REFUSED),
        ({"noise_multiplier": 0.45}, ErrorCode.POLICY_REFUSED),
        ({"noise_multiplier": 0.2}, ErrorCode.BAD_PLAN),  # its epsilon would be in the hundreds
        ({"noise_multiplier": float("nan")}, ErrorCode.BAD_PLAN),
        ({"noise_multiplier": -1.0}, ErrorCode.BAD_PLAN),
        ({"max_grad_norm": 900.0}, ErrorCode.POLICY_REFUSED),
        ({"max_grad_norm": 1e30}, ErrorCode.BAD_PLAN),
        ({"sample_rate": 1.0}, ErrorCode.POLICY_REFUSED),
        ({"delta": 0.5}, ErrorCode.POLICY_REFUSED),
        ({"task": "another-task"}, ErrorCode.UNKNOWN_TASK),
        ({"task": "__import__('os').system('id')"}, ErrorCode.UNKNOWN_TASK),
        ({"task": "../../etc/passwd"}, ErrorCode.UNKNOWN_TASK),
        ({"loss": "lambda model, batch: batch"}, ErrorCode.BAD_PLAN),
        ({"optimizer": "os.system"}, ErrorCode.BAD_PLAN),
        ({"engine": "torch.load"}, ErrorCode.BAD_PLAN),
        ({"local_steps": 1_000}, ErrorCode.BUDGET_EXCEEDED),
        ({"local_steps": 10_000}, ErrorCode.BAD_PLAN),
        ({"local_steps": 10_000, "rounds": 100_000, "sample_rate": 1e-4, "noise_multiplier": 64.0}, ErrorCode.BAD_PLAN),
    ],
)
def test_a_greedy_plan(site: Site, kind: str, changes: dict[str, Any], code: ErrorCode) -> None:
    assert_refused(site, kind, _raw_plan(**changes), code)
    assert "system" not in (site.folder / "audit.jsonl").read_text()


def test_a_thousand_extra_rounds(site: Site) -> None:
    long = replace(PLAN, rounds=1003)
    assert_refused(site, "query", PlanQuery("run", long).to_content(), ErrorCode.BUDGET_EXCEEDED)
    for number in (1, 2):  # as many as the filter admits of a plan that does not fit
        assert not send(site, "train", train(number, long)).has_error()
    for number in (3, 4, 1003):
        assert_refused(site, "train", train(number, long), ErrorCode.BUDGET_EXCEEDED)
    assert_refused(site, "train", train(1, run="a-fresh-run"), ErrorCode.BUDGET_EXCEEDED)
    assert site.ledger.spending().epsilon(site.policy.cap) <= site.policy.max_epsilon


def test_a_server_that_stops_a_first_run_early_gets_no_second(site: Site) -> None:
    """The run was admitted as a plan fixed beforehand; where it stops may depend on what it gave."""
    assert not send(site, "train", train(1)).has_error()
    assert lines(site)[-2]["admitted"] == "pld"
    assert_refused(site, "query", PlanQuery("a-fresh-run", PLAN).to_content(), ErrorCode.BUDGET_EXCEEDED)
    assert_refused(site, "train", train(1, run="a-fresh-run"), ErrorCode.BUDGET_EXCEEDED)
    assert not send(site, "train", train(2)).has_error()


def test_a_plan_changed_in_mid_run(site: Site) -> None:
    send(site, "train", train(1))
    for change in ({"noise_multiplier": 2.5}, {"seed": 1}, {"learning_rate": 0.4}):
        assert_refused(site, "train", train(2, replace(PLAN, **change)), ErrorCode.PLAN_CHANGED)  # type: ignore[arg-type]
        assert_refused(site, "query", PlanQuery("run", replace(PLAN, **change)).to_content(), ErrorCode.PLAN_CHANGED)  # type: ignore[arg-type]


def test_a_replay_with_other_weights_and_of_an_older_round(site: Site) -> None:
    first = send(site, "train", train(1))
    assert_refused(site, "train", train(1, weights=WEIGHTS + np.float32(0.5)), ErrorCode.REPLAY_MISMATCH)
    again = send(site, "train", train(1))
    assert again.content["config"]["weights"] == first.content["config"]["weights"]
    assert lines(site)[-1]["event"] == "replayed"
    send(site, "train", train(2))
    assert_refused(site, "train", train(1), ErrorCode.REPLAY_MISMATCH)


@pytest.mark.parametrize("kind", ["evaluate", "train.other", "query.patients", "train." + "x" * 9000])
def test_a_message_of_another_type(site: Site, kind: str) -> None:
    assert_refused(site, kind, train(), ErrorCode.BAD_MESSAGE)
    assert lines(site)[-1]["kind"] == "unknown"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"what": "patients"},
        {"run": "run", "plan": "SELECT * FROM patients"},
        {"run": "run", "plan": "[" * 10_000},
        {"run": "run", "plan": 7},
        {"run": ["run"], "plan": PLAN.to_json()},
        {"run": "../../store", "plan": PLAN.to_json()},
        {"run": "run\n\x1b[2Jforged", "plan": PLAN.to_json()},
        {"run": f"{SERVER}/run", "plan": PLAN.to_json()},
    ],
)
def test_a_query_for_anything_else(site: Site, config: dict[str, Any]) -> None:
    assert_refused(
        site, "query", RecordDict({"config": ConfigRecord(config)}), ErrorCode.BAD_MESSAGE, ErrorCode.BAD_PLAN
    )
    assert "forged" not in (site.folder / "audit.jsonl").read_text()


PICKLE = b"cos\nsystem\n(S'id'\ntR."


def _loose(weights: bytes | str | list[float] | None) -> RecordDict:
    content = train()
    del content["config"]["weights"]
    if weights is not None:
        content["config"]["weights"] = weights
    return content


def _arrays() -> RecordDict:
    """Weights as Flower would send them, and as no site takes them."""
    content = _loose(None)
    content["arrays"] = ArrayRecord({"weights": Array(WEIGHTS)})
    return content


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: train(weights=WEIGHTS + np.float32(np.nan)), ErrorCode.BAD_MESSAGE),
        (lambda: train(weights=WEIGHTS + np.float32(np.inf)), ErrorCode.BAD_MESSAGE),
        (lambda: train(weights=WEIGHTS + np.float32(1e30)), ErrorCode.POLICY_REFUSED),
        (lambda: train(weights=WEIGHTS + np.float32(100.0)), ErrorCode.POLICY_REFUSED),
        (lambda: train(weights=WEIGHTS[:-1]), ErrorCode.BAD_MESSAGE),
        (lambda: train(weights=np.zeros(0, np.float32)), ErrorCode.BAD_MESSAGE),
        (lambda: train(weights=np.zeros(70 * 2**20, np.float32)), ErrorCode.POLICY_REFUSED),
        (lambda: _loose(WEIGHTS.tobytes()[:-1]), ErrorCode.BAD_MESSAGE),
        (lambda: _loose(WEIGHTS.astype(np.float64).tobytes()), ErrorCode.BAD_MESSAGE),
        (lambda: _loose("0.0"), ErrorCode.BAD_MESSAGE),
        (lambda: _loose([0.0]), ErrorCode.BAD_MESSAGE),
        (lambda: _loose(PICKLE), ErrorCode.BAD_MESSAGE),
        (lambda: _loose(None), ErrorCode.BAD_MESSAGE),
        (_arrays, ErrorCode.BAD_MESSAGE),
    ],
)
def test_bad_weights(
    site: Site, make: Callable[[], RecordDict], code: ErrorCode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.site, "train_round", None)  # never reached
    assert_refused(site, "train", make(), code)


def test_two_servers_may_have_a_run_of_one_name(site: Site) -> None:
    policy(site.folder, max_epsilon=4 * PLAN.epsilon())
    send(site, "train", train(1))
    other = Site(site.folder, server="f" * 16)
    assert not send(other, "train", train(1, replace(PLAN, seed=3))).has_error()
    assert [row.run for row in site.ledger.releases()] == [f"{SERVER}/run", f"{'f' * 16}/run"]
    assert {line["run"] for line in lines(site) if "run" in line} == {f"{SERVER}/run", f"{'f' * 16}/run"}


def test_outside_its_hours_a_site_begins_nothing_new_but_repeats_what_it_gave(site: Site) -> None:
    first = send(site, "train", train(1))
    weekday = datetime.now(UTC).weekday()
    days = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    # Days that are far from today in every time zone: no clock is faked.
    policy(site.folder, days=(days[(weekday + 3) % 7],))
    assert_refused(site, "train", train(2), ErrorCode.OUTSIDE_HOURS)
    assert send(site, "train", train(1)).content["config"]["weights"] == first.content["config"]["weights"]
    assert not send(site, "query", PlanQuery("run", PLAN).to_content()).has_error()


def test_what_is_announced_is_what_the_ledger_holds(site: Site) -> None:
    for number in (1, 2):
        send(site, "train", train(number))
    said = [line for line in lines(site) if line["event"] in ("reserved", "released")]
    assert [line["round"] for line in said] == [1, 1, 2, 2]
    assert said[-1]["epsilon"] == site.ledger.spending().epsilon(site.policy.cap)
    assert said[-2]["steps"] == PLAN.local_steps
    assert all(line["plan"] == PLAN.digest for line in said)


def test_a_broken_log_stops_everything(site: Site) -> None:
    send(site, "train", train(1))
    path = site.folder / "audit.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    for kind, content in (("train", train(2)), ("train", train(1)), ("query", PlanQuery("run", PLAN).to_content())):
        reply = send(site, kind, content)
        assert error_code(reply) is ErrorCode.STORAGE_FAILED
    assert len(site.ledger.releases()) == 1
