"""The round loop against sites that refuse, fail, lie or stay silent."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from server.checkpoints import latest_checkpoint, load_weights
from server.registry import FAILED, LATE, OK, Registry
from server.rounds import Job, initial_model, run_federation
from shared.errors import ErrorCode, FederationError, ProtocolError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest, error_reply
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.registry import find_task
from shared.weights import pack
from simulations.grid import LocalGrid

PLAN = RunPlan(
    task="nodule-classification",
    rounds=2,
    local_steps=1,
    sample_rate=0.5,
    records_per_patient=1,
    max_grad_norm=1.0,
    noise_multiplier=1.0,
    delta=1e-3,
    learning_rate=0.1,
    min_sites=2,
    deadline_s=5.0,
)
NORM_CAP = 1e4
Answer = Callable[[TrainRequest, Message], Message]


class ScriptedGrid(LocalGrid):
    """A grid whose nodes answer as a test says. Site n adds n to every weight and declares 10 n patients."""

    def __init__(self, answers: dict[int, Answer | None]) -> None:
        super().__init__([Path()] * 3, seed=0)
        self.nodes = dict(zip(self._folders, (1, 2, 3), strict=True))
        self.answers = answers
        self.requests: list[TrainRequest] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in list(message_ids):
            message = self._pending.get(identifier)
            if isinstance(message, Message):
                reply = self._reply(message)
                if reply is not None:
                    replies.append(reply)
                    del self._pending[identifier]
        return replies

    def _reply(self, message: Message) -> Message | None:
        number = self.nodes[message.metadata.dst_node_id]
        if message.metadata.message_type == "query":
            plan = PlanQuery.from_content(message.content).plan
            return Message(SiteOffer(f"site-{number}", 10 * number, plan.digest).to_content(), reply_to=message)
        request = TrainRequest.from_content(message.content)
        self.requests.append(request)
        answer = self.answers.get(number, honest(number))
        return answer(request, message) if answer else None


def honest(number: int) -> Answer:
    def answer(request: TrainRequest, message: Message) -> Message:
        reply = TrainReply(request.round, request.plan.digest, request.weights + np.float32(number))
        return Message(reply.to_content(), reply_to=message)

    return answer


def twisted(change: Callable[[TrainReply], TrainReply]) -> Answer:
    def answer(request: TrainRequest, message: Message) -> Message:
        reply = TrainReply(request.round, request.plan.digest, request.weights)
        return Message(change(reply).to_content(), reply_to=message)

    return answer


def with_one(weights: np.ndarray, value: float) -> np.ndarray:
    changed = weights.copy()
    changed[7] = value
    return changed


def run(folder: Path, answers: dict[int, Answer | None], plan: RunPlan = PLAN) -> ScriptedGrid:
    grid = ScriptedGrid(answers)
    run_federation(grid, Job("r", plan, folder, None, max_update_norm=NORM_CAP))
    return grid


def final_weights(folder: Path) -> np.ndarray:
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    model = find_task(PLAN.task).build()
    load_weights(checkpoint.path, model, checkpoint.sha256)
    return pack(model)


def moved(folder: Path) -> float:
    return float((final_weights(folder) - pack(initial_model(find_task(PLAN.task), PLAN, None))).mean())


def test_the_average_is_weighted_by_declared_patients(tmp_path: Path) -> None:
    run(tmp_path, {})
    # Each round adds (10·1 + 20·2 + 30·3) / 60 = 7/3.
    assert moved(tmp_path) == pytest.approx(2 * 7 / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda _request, message: error_reply(ErrorCode.BUDGET_EXCEEDED, message), "budget-exceeded"),
        (lambda _r, message: Message(Error(2, "Traceback: Mrs Jones"), reply_to=message), "internal"),
        (lambda _request, message: Message(RecordDict(), reply_to=message), "bad-message"),
        (twisted(lambda reply: replace(reply, round=reply.round + 1)), "stale-round"),
        (twisted(lambda reply: replace(reply, plan_digest="another")), "plan-changed"),
        (twisted(lambda reply: replace(reply, weights=reply.weights[:-1])), "bad-message"),
        (twisted(lambda reply: replace(reply, weights=reply.weights * np.float32("nan"))), "not-finite"),
        (twisted(lambda reply: replace(reply, weights=reply.weights + np.float32("inf"))), "not-finite"),
        (twisted(lambda reply: replace(reply, weights=with_one(reply.weights, np.nan))), "not-finite"),
        (twisted(lambda reply: replace(reply, weights=reply.weights * np.float32(1e4))), "update-too-large"),
        (twisted(lambda reply: replace(reply, weights=with_one(reply.weights, 1e30))), "update-too-large"),
    ],
)
def test_a_bad_reply_is_dropped_named_and_the_round_goes_on(tmp_path: Path, answer: Answer, outcome: str) -> None:
    run(tmp_path, {3: answer})
    record = Registry(tmp_path / "registry.sqlite").read("r")
    assert [row.replies for row in record.rounds[1:]] == [{"site-1": OK, "site-2": OK, "site-3": outcome}] * 2
    assert moved(tmp_path) == pytest.approx(2 * 5 / 3, rel=1e-5)
    assert record.rounds_of("site-3") == (0 if outcome == "budget-exceeded" else 2)


def test_a_silent_site_is_late_and_counts_as_spent(tmp_path: Path) -> None:
    run(tmp_path, {1: None}, replace(PLAN, deadline_s=0.3))
    record = Registry(tmp_path / "registry.sqlite").read("r")
    assert record.rounds[1].replies["site-1"] == LATE
    assert record.rounds_of("site-1") == 2


def test_a_lost_quorum_fails_the_run_and_still_counts_what_was_asked(tmp_path: Path) -> None:
    refuse: Answer = lambda _request, message: error_reply(ErrorCode.INTERNAL, message)  # noqa: E731
    with pytest.raises(FederationError) as caught:
        run(tmp_path, {1: refuse, 2: refuse})
    assert caught.value.code is ErrorCode.QUORUM_LOST
    record = Registry(tmp_path / "registry.sqlite").read("r")
    assert (record.status, record.failure, record.rounds_completed) == (FAILED, "quorum-lost", 0)
    assert record.rounds_of("site-1") == 1


def test_a_failed_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    def fails_in_round_two(request: TrainRequest, message: Message) -> Message:
        if request.round == 2:
            return error_reply(ErrorCode.STORAGE_FAILED, message)
        return honest(1)(request, message)

    with pytest.raises(FederationError):
        run(tmp_path, {1: fails_in_round_two}, replace(PLAN, min_sites=3))
    grid = run(tmp_path, {}, replace(PLAN, min_sites=3))
    assert {request.round for request in grid.requests} == {2}
    assert moved(tmp_path) == pytest.approx(2 * 7 / 3, rel=1e-5)


def test_a_run_never_goes_on_under_another_plan(tmp_path: Path) -> None:
    run(tmp_path, {})
    with pytest.raises(ProtocolError) as caught:
        run(tmp_path, {}, replace(PLAN, rounds=5))
    assert caught.value.code is ErrorCode.PLAN_CHANGED


def test_patience_ends_a_run_that_no_longer_gains(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore]
) -> None:
    stale = twisted(lambda reply: reply)
    plan = replace(PLAN, rounds=50, patience=3)
    heldout = make_nodule_store(tmp_path / "heldout")
    run_federation(ScriptedGrid({1: stale, 2: stale, 3: stale}), Job("r", plan, tmp_path, heldout))
    record = Registry(tmp_path / "registry.sqlite").read("r")
    assert record.rounds_completed == 3
    assert plan.epsilon(3) < plan.epsilon()


def test_the_start_must_be_the_checkpoint_that_the_plan_names(tmp_path: Path) -> None:
    run(tmp_path, {})
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    task = find_task(PLAN.task)
    started = initial_model(task, replace(PLAN, init=checkpoint.sha256), checkpoint.path)
    assert pack(started).tobytes() == final_weights(tmp_path).tobytes()
    with pytest.raises(ProtocolError):
        initial_model(task, replace(PLAN, init="0" * 64), checkpoint.path)


def test_the_same_seed_starts_from_the_same_weights() -> None:
    task = find_task(PLAN.task)
    first, second, other = (pack(initial_model(task, replace(PLAN, seed=s), None)).tobytes() for s in (1, 1, 2))
    assert first == second != other
