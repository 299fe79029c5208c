"""The round loop against sites that refuse, fail, lie or stay silent."""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from server.checkpoints import latest_checkpoint, load_weights
from server.cohort import Member
from server.exchange import Timing
from server.registry import ASKED, FAILED, LATE, OK, VANISHED, Registry
from server.rounds import Job, initial_model, run_federation
from shared.errors import ErrorCode, FederationError, PlanError, ProtocolError, StorageError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest, error_reply
from shared.plan import STRATEGIES, RunPlan
from shared.provenance.sidecar import read_sidecar
from shared.provenance.signing import is_signed_by
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
QUICK = Timing(grace_s=0.1, look_s=0.01, again_s=0.02, retry_s=0.0)
Answer = Callable[[TrainRequest, Message], Message | None]


class ScriptedGrid(LocalGrid):
    """A grid whose nodes answer as a test says. Site n adds n to every weight and declares 10 n patients."""

    def __init__(self, answers: dict[int, Answer | None], sites: int = 3) -> None:
        super().__init__([Path()] * sites, seed=0)
        self.nodes = {node: number for number, node in enumerate(self._folders, start=1)}
        self.answers = answers
        self.requests: list[TrainRequest] = []
        self.gone: set[int] = set()

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, number in self.nodes.items() if number not in self.gone]

    @property
    def members(self) -> dict[int, Member]:
        return {node: Member(f"site-{number}", 10 * number) for node, number in self.nodes.items()}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in list(message_ids):
            message = self._pending.get(identifier)
            if isinstance(message, Message) and self.nodes[message.metadata.dst_node_id] not in self.gone:
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


def garbage(_request: TrainRequest, message: Message) -> Message:
    content = RecordDict(
        {"arrays": ArrayRecord({"weights": Array("float32", (3,), "numpy.ndarray", b"\x93NUMPYgarbage")})}
    )
    content["config"] = ConfigRecord({"round": 1, "plan-digest": PLAN.digest})
    return Message(content, reply_to=message)


def with_other_names(request: TrainRequest, message: Message) -> Message:
    content = TrainReply(request.round, request.plan.digest, request.weights).to_content()
    return Message(RecordDict({f"my-{name}": record for name, record in content.items()}), reply_to=message)


TWISTS: list[tuple[Answer, str]] = [
    (lambda _request, message: Message(RecordDict(), reply_to=message), "malformed"),
    (garbage, "malformed"),
    (with_other_names, "malformed"),
    (twisted(lambda reply: replace(reply, round=reply.round + 1)), "stale-round"),
    (twisted(lambda reply: replace(reply, round=-1)), "stale-round"),
    (twisted(lambda reply: replace(reply, plan_digest="another")), "foreign-plan"),
    (twisted(lambda reply: replace(reply, weights=reply.weights[:-1])), "wrong-size"),
    (twisted(lambda reply: replace(reply, weights=reply.weights[:0])), "wrong-size"),
    (twisted(lambda reply: replace(reply, weights=np.append(reply.weights, np.float32(0)))), "wrong-size"),
    (twisted(lambda reply: replace(reply, weights=reply.weights * np.float32("nan"))), "not-finite"),
    (twisted(lambda reply: replace(reply, weights=reply.weights + np.float32("inf"))), "not-finite"),
    (twisted(lambda reply: replace(reply, weights=with_one(reply.weights, np.nan))), "not-finite"),
    (twisted(lambda reply: replace(reply, weights=reply.weights * np.float32(1e4))), "update-too-large"),
    (twisted(lambda reply: replace(reply, weights=with_one(reply.weights, 1e30))), "update-too-large"),
]
"""What a hostile site may send instead of weights, and the word under which the server drops it."""


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
        *TWISTS,
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


def outcomes(folder: Path) -> list[dict[str, str]]:
    rounds = Registry(folder / "registry.sqlite").read("r").rounds
    return [dict(row.replies) for row in rounds if row.round]


def test_a_site_that_vanishes_is_dropped_from_the_round_and_back_in_the_next(tmp_path: Path) -> None:
    grid = ScriptedGrid({})

    def dies_in_round_two(request: TrainRequest, message: Message) -> Message | None:
        if request.round == 2:
            grid.gone.add(3)
            return None
        return honest(3)(request, message)

    def outlives(request: TrainRequest, message: Message) -> Message:
        if request.round == 3:
            grid.gone.clear()
        return honest(1)(request, message)

    grid.answers = {1: outlives, 3: dies_in_round_two}
    plan = replace(PLAN, rounds=4, deadline_s=60.0)
    run_federation(grid, Job("r", plan, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP, timing=QUICK))
    everybody = {"site-1": OK, "site-2": OK, "site-3": OK}
    assert outcomes(tmp_path) == [
        everybody,
        {**everybody, "site-3": VANISHED},
        {"site-1": OK, "site-2": OK},
        everybody,
    ]
    record = Registry(tmp_path / "registry.sqlite").read("r")
    assert [record.rounds_of(f"site-{number}") for number in (1, 2, 3)] == [4, 4, 3]  # asked in vain counts as spent


def test_a_lost_quorum_is_tried_again_with_the_same_request(tmp_path: Path) -> None:
    broken = iter([ErrorCode.STORAGE_FAILED, ErrorCode.INTERNAL])

    def recovers(request: TrainRequest, message: Message) -> Message:
        code = next(broken, None)
        return error_reply(code, message) if code else honest(1)(request, message)

    grid = ScriptedGrid({1: recovers})
    plan = replace(PLAN, rounds=1, min_sites=3)
    run_federation(grid, Job("r", plan, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP, timing=QUICK))
    assert outcomes(tmp_path) == [{"site-1": OK, "site-2": OK, "site-3": OK}]
    assert len({request.digest for request in grid.requests}) == 1
    assert len(grid.requests) == 9


@pytest.mark.parametrize(("code", "attempts"), [(ErrorCode.BUDGET_EXCEEDED, 1), (ErrorCode.STORAGE_FAILED, 3)])
def test_a_round_is_tried_again_only_while_there_is_hope(tmp_path: Path, code: ErrorCode, attempts: int) -> None:
    grid = ScriptedGrid({1: lambda _request, message: error_reply(code, message)})
    plan = replace(PLAN, min_sites=3)
    with pytest.raises(FederationError) as caught:
        run_federation(
            grid, Job("r", plan, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP, timing=QUICK)
        )
    assert caught.value.code is ErrorCode.QUORUM_LOST
    assert len(grid.requests) == 3 * attempts


def test_a_round_waits_for_the_hours_of_a_site_without_counting_attempts(tmp_path: Path) -> None:
    closed = iter([ErrorCode.OUTSIDE_HOURS] * (QUICK.attempts + 2))

    def opens(request: TrainRequest, message: Message) -> Message:
        code = next(closed, None)
        return error_reply(code, message) if code else honest(1)(request, message)

    grid = ScriptedGrid({1: opens})
    plan, timing = replace(PLAN, rounds=1, min_sites=3), replace(QUICK, reconsider_s=0.0)
    run_federation(grid, Job("r", plan, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP, timing=timing))
    assert outcomes(tmp_path) == [{"site-1": OK, "site-2": OK, "site-3": OK}]


def test_a_round_does_not_wait_for_hours_for_ever(tmp_path: Path) -> None:
    grid = ScriptedGrid({1: lambda _request, message: error_reply(ErrorCode.OUTSIDE_HOURS, message)})
    plan, timing = replace(PLAN, min_sites=3), replace(QUICK, reconsider_s=0.0, closed_s=0.0)
    job = Job("r", plan, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP, timing=timing)
    with pytest.raises(FederationError, match="Round 1"):
        run_federation(grid, job)


def test_a_site_that_was_asked_before_a_crash_and_then_stays_away_counts_as_spent(tmp_path: Path) -> None:
    grid = ScriptedGrid({})

    def crashes(_request: TrainRequest, _message: Message) -> Message:
        raise KeyboardInterrupt

    grid.answers = {2: crashes}
    with pytest.raises(KeyboardInterrupt):
        run_federation(grid, Job("r", PLAN, tmp_path, None, members=grid.members, max_update_norm=NORM_CAP))
    assert outcomes(tmp_path) == [dict.fromkeys(("site-1", "site-2", "site-3"), ASKED)]
    again = ScriptedGrid({})
    again.gone = {3}
    run_federation(again, Job("r", PLAN, tmp_path, None, members=again.members, max_update_norm=NORM_CAP, timing=QUICK))
    assert outcomes(tmp_path)[0] == {"site-1": OK, "site-2": OK, "site-3": VANISHED}
    assert Registry(tmp_path / "registry.sqlite").read("r").rounds_of("site-3") == 1


def test_a_late_site_is_ignored_and_takes_part_in_the_next_round(tmp_path: Path) -> None:
    def slow_once(request: TrainRequest, message: Message) -> Message | None:
        return None if request.round == 1 else honest(3)(request, message)

    run(tmp_path, {3: slow_once}, replace(PLAN, deadline_s=0.5))
    assert [row["site-3"] for row in outcomes(tmp_path)] == [LATE, OK]
    assert moved(tmp_path) == pytest.approx(5 / 3 + 7 / 3, rel=1e-5)


def test_no_site_passes_the_share_that_the_operator_sets(tmp_path: Path) -> None:
    run_federation(ScriptedGrid({}), Job("r", PLAN, tmp_path, None, max_share=0.4, max_update_norm=NORM_CAP))
    assert moved(tmp_path) == pytest.approx(2 * (0.2 * 1 + 0.4 * 2 + 0.4 * 3), rel=1e-5)


@pytest.mark.parametrize("limits", [{"max_share": 0.0}, {"max_share": 1.5}, {"max_update_norm": -1.0}])
def test_impossible_limits_are_refused(tmp_path: Path, limits: dict[str, float]) -> None:
    with pytest.raises(FederationError):
        Job("r", PLAN, tmp_path, None, **limits)


def test_without_a_cap_of_the_operator_the_plan_bounds_an_update(tmp_path: Path) -> None:
    tiny = {number: twisted(lambda reply: reply) for number in (1, 2)}
    grid = ScriptedGrid({**tiny, 3: twisted(lambda reply: replace(reply, weights=reply.weights * np.float32(1000)))})
    run_federation(grid, Job("r", PLAN, tmp_path, None))
    assert outcomes(tmp_path) == [{"site-1": OK, "site-2": OK, "site-3": "update-too-large"}] * 2
    assert moved(tmp_path) == 0.0


def towards(number: int) -> Answer:
    """Answer with weights halfway to the site's own, which depend on the round."""

    def answer(request: TrainRequest, message: Message) -> Message:
        own = np.random.default_rng([number, request.round]).normal(0.0, 0.1, len(request.weights))
        weights = (0.5 * request.weights + 0.5 * own).astype(np.float32)
        return Message(TrainReply(request.round, request.plan.digest, weights).to_content(), reply_to=message)

    return answer


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_ends_as_an_uninterrupted_one_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    plan = replace(PLAN, rounds=3, strategy=strategy, min_sites=5)
    steady = {number: towards(number) for number in range(1, 6)}

    def interrupts(request: TrainRequest, message: Message) -> Message:
        return towards(3)(request, message) if request.round < 3 else error_reply(ErrorCode.INTERNAL, message)

    for folder, answers in (("whole", steady), ("parts", {**steady, 3: interrupts})):
        job = Job("r", plan, tmp_path / folder, None, max_update_norm=NORM_CAP)
        job.folder.mkdir()
        if folder == "parts":
            with pytest.raises(FederationError):
                run_federation(ScriptedGrid(answers, sites=5), job)
        run_federation(ScriptedGrid(steady, sites=5), job)
        assert Registry(job.folder / "registry.sqlite").read("r").rounds_completed == 3
    whole, parts = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert whole.tobytes() == parts.tobytes()
    assert np.isfinite(whole).all()


@pytest.mark.parametrize("room", [0, 8_192, 40_000, 1_000_000, 1_700_000, 1_900_000])
def test_after_a_full_disk_a_run_goes_on_bit_for_bit(
    tmp_path: Path, room: int, disk_full_after: Callable[[int], AbstractContextManager[None]]
) -> None:
    """The registry is some 50 kB, the weights 1.7 MB, and the strategy's state twice that."""
    plan = replace(PLAN, rounds=3, strategy="fedadam", min_sites=5)
    folder, reference = tmp_path / "parts", tmp_path / "whole"
    for path in (folder, reference):
        path.mkdir()
    steady = {number: towards(number) for number in range(1, 6)}

    def fills_the_disk(request: TrainRequest, message: Message) -> Message:
        if request.round == 2:
            full.enter_context(disk_full_after(room))
        return towards(1)(request, message)

    with ExitStack() as full, pytest.raises(StorageError):
        run_federation(ScriptedGrid({**steady, 1: fills_the_disk}, sites=5), job(folder, plan))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.round == 1
    assert not list(folder.rglob("*.tmp")), "what could not be written takes no space"
    run_federation(ScriptedGrid(steady, sites=5), job(folder, plan))
    run_federation(ScriptedGrid(steady, sites=5), job(reference, plan))
    assert [row.round for row in Registry(folder / "registry.sqlite").read("r").rounds] == [0, 1, 2, 3]
    assert final_weights(folder).tobytes() == final_weights(reference).tobytes()


def job(folder: Path, plan: RunPlan) -> Job:
    return Job("r", plan, folder, None, max_update_norm=NORM_CAP)


@pytest.mark.parametrize("strategy", ["median", "trimmed-mean", "krum", "multi-krum"])
@pytest.mark.parametrize("attack", [lambda w: w * np.float32(1000), lambda w: -w])
def test_one_hostile_site_of_five_hardly_moves_a_robust_run(tmp_path: Path, strategy: str, attack: Any) -> None:
    plan = replace(PLAN, strategy=strategy)
    hostile = twisted(lambda reply: replace(reply, weights=attack(reply.weights)))
    ends = []
    for folder, fifth in (("clean", towards(5)), ("attacked", hostile)):
        grid = ScriptedGrid({**{number: towards(number) for number in range(1, 5)}, 5: fifth}, sites=5)
        (tmp_path / folder).mkdir()
        run_federation(grid, Job("r", plan, tmp_path / folder, None, max_update_norm=1e9))
        assert outcomes(tmp_path / folder) == [{f"site-{number}": OK for number in range(1, 6)}] * 2
        ends.append(final_weights(tmp_path / folder))
    assert np.abs(ends[0] - ends[1]).mean() < 0.07  # as far apart as two honest sites after two rounds


@pytest.mark.parametrize("sites", [3, 4])
@pytest.mark.parametrize("strategy", ["krum", "multi-krum"])
def test_a_krum_run_of_too_few_sites_does_not_begin(tmp_path: Path, strategy: str, sites: int) -> None:
    with pytest.raises(FederationError, match="sites that the plan requires"):
        run_federation(ScriptedGrid({}, sites), job(tmp_path, replace(PLAN, strategy=strategy)))


@pytest.mark.parametrize(
    ("strategy", "hostile", "word"),
    [("krum", *twist) for twist in TWISTS] + [(name, *TWISTS[5]) for name in ("median", "trimmed-mean", "multi-krum")],
)
def test_a_hostile_site_whose_replies_are_dropped_neither_ends_nor_moves_a_robust_run(
    tmp_path: Path, strategy: str, hostile: Answer, word: str
) -> None:
    plan = replace(PLAN, strategy=strategy)
    sites = plan.quorum  # the fewest that withstand one hostile site
    answers = {number: towards(number) for number in range(1, sites)} | {sites: hostile}
    run_federation(ScriptedGrid(answers, sites), job(tmp_path, plan))
    assert outcomes(tmp_path) == [{**{f"site-{n}": OK for n in range(1, sites)}, f"site-{sites}": word}] * 2
    assert np.abs(final_weights(tmp_path)).max() < 1.0  # what halfway to honest sites' weights of deviation 0.1 is


@pytest.mark.parametrize("faulty", [2, 3])
def test_more_faulty_sites_than_the_plan_withstands_lower_no_quorum(tmp_path: Path, faulty: int) -> None:
    plan = replace(PLAN, strategy="krum", min_sites=2)
    answers = {number: TWISTS[number][0] for number in range(1, faulty + 1)}
    with pytest.raises(FederationError, match="5 are required"):
        run_federation(ScriptedGrid(answers, sites=5), job(tmp_path, plan))


@pytest.mark.parametrize("code", [ErrorCode.BAD_MESSAGE, ErrorCode.PLAN_CHANGED, ErrorCode.INTERNAL])
def test_a_site_that_says_it_failed_may_be_honest_and_lowers_no_quorum(tmp_path: Path, code: ErrorCode) -> None:
    says_so: Answer = lambda _request, message: error_reply(code, message)  # noqa: E731
    with pytest.raises(FederationError, match="5 are required"):
        run_federation(ScriptedGrid({1: says_so}, sites=5), job(tmp_path, replace(PLAN, strategy="krum")))


def test_an_honest_site_beyond_the_operators_cap_is_not_taken_for_the_hostile_one(tmp_path: Path) -> None:
    plan, cap = replace(PLAN, strategy="krum"), 0.5
    steps = {number: moved_by(0.9 * cap) for number in range(1, 5)} | {5: moved_by(1.1 * cap)}
    with pytest.raises(FederationError, match="5 are required"):
        run_federation(ScriptedGrid(steps, sites=5), Job("r", plan, tmp_path, None, max_update_norm=cap))
    assert outcomes(tmp_path) == [{**{f"site-{number}": OK for number in range(1, 5)}, "site-5": "update-over-cap"}]


def moved_by(norm: float) -> Answer:
    """Answer with weights that are ``norm`` away from those of the request."""

    def answer(request: TrainRequest, message: Message) -> Message:
        step = np.full(len(request.weights), norm / math.sqrt(len(request.weights)), np.float32)
        reply = TrainReply(request.round, request.plan.digest, request.weights + step)
        return Message(reply.to_content(), reply_to=message)

    return answer


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


@pytest.mark.parametrize(("sensitivity", "rule"), [(None, "balanced-accuracy"), (0.9, "sensitivity 0.90")])
def test_the_checkpoint_holds_the_operating_point_that_the_reference_patients_chose(
    tmp_path: Path, make_nodule_store: Callable[..., RecordStore], sensitivity: float | None, rule: str
) -> None:
    heldout = make_nodule_store(tmp_path / "heldout", patients=30)
    stale = twisted(lambda reply: reply)
    grid = ScriptedGrid({1: stale, 2: stale, 3: stale})
    run_federation(grid, Job("r", PLAN, tmp_path, heldout, sensitivity=sensitivity))
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    point = checkpoint.operating_point
    assert point is not None
    assert point.rule == rule
    last = Registry(tmp_path / "registry.sqlite").read("r").rounds[-1].evaluation
    assert last is not None
    assert last.operating_point == point
    model = find_task(PLAN.task).build()
    load_weights(checkpoint.path, model)
    assert find_task(PLAN.task).judge(model.eval(), heldout, sensitivity).operating_point == point


def test_without_reference_patients_no_operating_point_is_claimed(tmp_path: Path) -> None:
    run(tmp_path, {})
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.operating_point is None
    with pytest.raises(PlanError, match="sensitivity"):
        Job("r", PLAN, tmp_path, None, sensitivity=2.0)


def test_a_run_of_an_earlier_version_goes_on_from_its_unsigned_checkpoint(tmp_path: Path) -> None:
    """Its sidecars have these fields and no version, and nothing says where it started."""
    run(tmp_path, {})
    expected = final_weights(tmp_path)
    for left in (tmp_path / "checkpoints").glob("round-00002.*"):
        left.unlink()
    (tmp_path / "start.json").unlink(missing_ok=True)
    sidecar = tmp_path / "checkpoints" / "round-00001.json"
    kept = ("run", "round", "task", "plan_digest", "sha256", "path", "epsilon", "delta")
    values = {name: value for name, value in json.loads(sidecar.read_text()).items() if name in kept}
    sidecar.write_text(json.dumps({**values, "strategy_sha256": None}, indent=1, sort_keys=True))
    key = Ed25519PrivateKey.generate()
    job = Job("r", PLAN, tmp_path, None, max_update_norm=NORM_CAP, signer=key, keys={"site-1": "e" * 64})
    run_federation(ScriptedGrid({}), job)
    assert final_weights(tmp_path).tobytes() == expected.tobytes()
    written = read_sidecar(tmp_path / "checkpoints" / "round-00002.json")
    assert is_signed_by(written, (key.public_key(),))
    assert written.ancestry is not None
    (only,) = written.ancestry.runs
    assert [(share.site, share.steps) for share in only.sites] == [
        (f"site-{number}", 2 * PLAN.local_steps) for number in (1, 2, 3)
    ]
    assert only.sites[0].key_sha256 == "e" * 64
    assert written.epsilon == pytest.approx(PLAN.epsilon(2))


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
