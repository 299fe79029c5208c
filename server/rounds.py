"""The server's round loop over Flower's ``Grid`` and ``Strategy``: ask, train, aggregate, judge, save, repeat.

Crash safety: a round is registered first and checkpointed second, so after a crash the run goes on from the
last checkpoint, asks the sites for the unfinished round again, and gets their stored replies. A round that loses its
quorum is asked for again in the same way.

:mod:`server.cohort` says who is asked, :mod:`server.exchange` how, :mod:`server.replies` what is accepted, and
:mod:`server.strategies` what is made of it.
"""

import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, MessageType
from flwr.serverapp.strategy import Strategy
from torch import nn

from server.checkpoints import Checkpoint, latest_checkpoint, load_strategy, load_weights, save_checkpoint
from server.cohort import Cohort, Member
from server.exchange import SIMULATED, Grid, Question, Timing, exchange
from server.lineage import descent
from server.registry import (
    ASKED,
    COMPLETED,
    FAILED,
    LATE,
    NOTHING_SPENT,
    OK,
    VANISHED,
    Registry,
    RoundRow,
)
from server.replies import FAULTY, check_reply
from server.strategies import Replies, collect, make_strategy, moments, restore_moments
from shared.errors import ErrorCode, FederationError, PlanError, ProtocolError, StorageError
from shared.evaluation import Evaluation
from shared.messages import TrainRequest
from shared.operating_point import check_sensitivity
from shared.plan import RunPlan
from shared.provenance.card import card_of
from shared.records import RecordStore
from shared.tasks.base import Task
from shared.tasks.registry import find_task
from shared.weights import pack, unpack

_LOG = logging.getLogger(__name__)
_MAY_RECOVER = frozenset({OK, LATE, VANISHED, ErrorCode.STORAGE_FAILED, ErrorCode.INTERNAL})
"""Outcomes after which it makes sense to ask the same site for the same round again."""


@dataclass(frozen=True)
class Job:
    """What the ServerApp is to do.

    Attributes:
        run: Name of the run; the same name goes on with the same run.
        plan: The agreed plan.
        folder: Where registry and checkpoints lie.
        heldout: The server's reference patients, if it has any.
        start: A public checkpoint to start from, if the plan names one.
        members: Who is enrolled, by node; ``None`` in a simulation, where everybody may take part.
        max_share: No site's share of an average passes it, or an equal share if that is more; in (0, 1].
        max_update_norm: Cap on the L2 norm of a site's update; ``None`` takes what the plan implies.
        timing: How patient the server is; by default as suits a federation, or a simulation.
        sensitivity: The share of positives that the model's threshold must find; by default balanced accuracy chooses.
            A task without decisions has no threshold and takes no notice.
        signer: Signs the checkpoints; ``None`` leaves them unsigned.
        keys: SHA-256 of the sites' public keys by name, where the server knows them.

    Raises:
        PlanError: If a limit is impossible.
    """

    run: str
    plan: RunPlan
    folder: Path
    heldout: RecordStore | None
    start: Path | None = None
    members: Mapping[int, Member] | None = None
    max_share: float = 1.0
    max_update_norm: float | None = None
    timing: Timing | None = None
    sensitivity: float | None = None
    signer: Ed25519PrivateKey | None = None
    keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sensitivity(self.sensitivity)
        if not 0.0 < self.max_share <= 1.0:
            raise PlanError(f"max-share must lie in (0, 1], not {self.max_share:g}.")
        if self.max_update_norm is not None and not self.max_update_norm > 0.0:
            raise PlanError(f"max-update-norm must be positive, not {self.max_update_norm:g}.")


@dataclass
class Progress:
    """The state that grows from round to round."""

    model: nn.Module
    round: int = 0
    best: float = -math.inf
    best_round: int = 0
    judged_round: int = 0

    def note(self, number: int, metric: float) -> None:
        """Take account of a round's held-out metric."""
        self.judged_round = number
        if metric > self.best:
            self.best, self.best_round = metric, number

    def finished(self, plan: RunPlan) -> bool:
        """Whether all rounds are done or patience has run out."""
        stalled = bool(plan.patience) and self.judged_round - self.best_round >= plan.patience
        return self.round >= plan.rounds or stalled


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round."""

    grid: Grid
    job: Job
    registry: Registry
    task: Task
    strategy: Strategy
    cohort: Cohort
    timing: Timing

    def register(self, row: RoundRow) -> None:
        """Record a round; a site that was asked in an earlier attempt only still counts as having spent."""
        spent = {
            site: VANISHED
            for site, outcome in self.registry.replies(self.job.run, row.round).items()
            if outcome not in NOTHING_SPENT and site not in row.replies
        }
        self.registry.add_round(self.job.run, replace(row, replies={**row.replies, **spent}))


def run_federation(grid: Grid, job: Job) -> None:
    """Carry a run from its last checkpoint, or its start, to its end.

    Raises:
        FederationError: If no quorum takes part, or a file cannot be used; the registry says so too.
    """
    registry = Registry(job.folder / "registry.sqlite")
    registry.begin(job.run, job.plan)
    try:
        task, strategy = find_task(job.plan.task), make_strategy(job.plan)
        timing = job.timing or (SIMULATED if job.members is None else Timing())
        cohort = Cohort(grid, registry, job.run, job.plan, job.members, timing)
        run = _Run(grid, job, registry, task, strategy, cohort, timing)
        progress = _restore(run)
        while not progress.finished(job.plan):
            _advance(run, progress)
        registry.end(job.run, COMPLETED)
    except FederationError as error:
        registry.end(job.run, FAILED, error.code.value)
        raise


def _restore(run: _Run) -> Progress:
    """Begin anew and save round 0, or take up the last checkpoint with the registered history."""
    job = run.job
    model = initial_model(run.task, job.plan, job.start)
    checkpoint = latest_checkpoint(job.folder / "checkpoints")
    progress = Progress(model)
    if checkpoint is None:
        _record(run, progress, RoundRow(0, 0.0, _judge(run.task, model, job), {}))
        return progress
    if (checkpoint.run, checkpoint.plan_digest) != (job.run, job.plan.digest):
        raise ProtocolError("The checkpoints here belong to another run or plan.", ErrorCode.PLAN_CHANGED)
    _load(checkpoint, model, run.strategy)
    progress.round = checkpoint.round
    rows = run.registry.read(job.run).rounds
    if checkpoint.round not in {row.round for row in rows}:
        raise StorageError("The run registry does not know the last checkpoint's round: it was lost or replaced.")
    for row in rows:
        if row.round <= checkpoint.round and row.evaluation:
            progress.note(row.round, row.evaluation.value(run.task.metric))
    return progress


def _load(checkpoint: Checkpoint, model: nn.Module, strategy: Strategy) -> None:
    load_weights(checkpoint.path, model, checkpoint.sha256)
    if checkpoint.round:
        restore_moments(strategy, load_strategy(checkpoint))


def initial_model(task: Task, plan: RunPlan, start: Path | None) -> nn.Module:
    """Return the model that a run starts from: seeded weights, or a public checkpoint.

    Raises:
        ProtocolError: If the checkpoint is not the one that the plan names.
        StorageError: If it cannot be read.
    """
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        model = task.build()
    if start is not None and load_weights(start, model) != plan.init:
        raise ProtocolError("The starting checkpoint is not the one that the plan names.", ErrorCode.PLAN_CHANGED)
    return model


def _advance(run: _Run, progress: Progress) -> None:
    """Run one round and record it; a lost quorum is tried again as often as ``Timing.attempts`` says."""
    number, started = progress.round + 1, time.monotonic()
    request = TrainRequest(run.job.run, number, run.job.plan, pack(progress.model))
    attempt = 1
    while True:
        replies, outcomes = _ask(run, request)
        needed = _quorum(run.job.plan, outcomes)
        if _count(outcomes, {OK}) >= needed:
            break
        waited_s = time.monotonic() - started
        run.register(RoundRow(number, waited_s, None, outcomes, aggregated=False))
        closed = _closed(run, outcomes) and waited_s < run.timing.closed_s
        if not closed and (attempt == run.timing.attempts or _count(outcomes, _MAY_RECOVER) < needed):
            raise FederationError(
                f"Round {number} got too few usable replies; {needed} are required: {outcomes}.",
                ErrorCode.QUORUM_LOST,
            )
        _LOG.warning("quorum lost", extra={"run": run.job.run, "round": number, "attempt": attempt})
        attempt += not closed
        time.sleep(run.timing.reconsider_s if closed else run.timing.retry_s)
    unpack(replies.aggregate(run.strategy, run.job.plan, number), progress.model)
    if run.task.settle:
        run.task.settle(progress.model)
    progress.round = number
    due = number % run.task.judged_every == 0 or number == run.job.plan.rounds
    evaluation = _judge(run.task, progress.model, run.job) if due else None
    _record(run, progress, RoundRow(number, time.monotonic() - started, evaluation, outcomes))


def _count(outcomes: Mapping[str, str], among: Collection[str]) -> int:
    return sum(outcome in among for outcome in outcomes.values())


def _quorum(plan: RunPlan, outcomes: Mapping[str, str]) -> int:
    return plan.quorum_beside(_count(outcomes, FAULTY))


def _closed(run: _Run, outcomes: Mapping[str, str]) -> bool:
    """Whether there would be a quorum, were it not for sites that train at certain hours only."""
    shut = ErrorCode.OUTSIDE_HOURS
    return shut in outcomes.values() and _count(outcomes, {*_MAY_RECOVER, shut}) >= _quorum(run.job.plan, outcomes)


def _ask(run: _Run, request: TrainRequest) -> tuple[Replies, dict[str, str]]:
    """Ask the cohort to train; return the usable replies, aggregated as far as can be, and what came of each site."""
    plan, sites = request.plan, run.cohort.gather()
    outcomes = {offer.site: ASKED for offer in sites.values()}
    # Before the question goes out: whoever is asked may have spent, whatever becomes of this process.
    run.register(RoundRow(request.round, 0.0, None, outcomes, aggregated=False))
    patients = {node: offer.declared_patients for node, offer in sites.items()}
    replies = collect(plan, request.weights, sum(patients.values()), run.job.max_share)

    def take(node: int, message: Message) -> None:
        weights = check_reply(message, request, patients[node], run.job.max_update_norm)
        site = sites[node].site
        if isinstance(weights, str):
            outcomes[site] = str(weights)
            _LOG.warning("reply dropped", extra={"round": request.round, "site": site, "code": str(weights)})
        else:
            replies.add(site, patients[node], weights)
            outcomes[site] = OK

    def enough() -> bool:
        return _count(outcomes, {OK}) >= _quorum(plan, outcomes)

    question = Question(request.to_content, MessageType.TRAIN, str(request.round), plan.deadline_s)
    silent = exchange(run.grid, question, list(sites), run.cohort.presence, run.timing, take, enough)
    for node, outcome in silent.items():
        outcomes[sites[node].site] = outcome
        _LOG.warning("no reply", extra={"round": request.round, "site": sites[node].site, "code": outcome})
    return replies, outcomes


def _record(run: _Run, progress: Progress, row: RoundRow) -> None:
    if row.evaluation:
        progress.note(row.round, row.evaluation.value(run.task.metric))
    run.register(row)
    plan = run.job.plan
    spent = run.registry.rounds_by_site(run.job.run, row.round)
    ancestry = descent(run.job.folder, run.job.run, plan, spent, run.job.keys)
    card = card_of(ancestry)
    save_checkpoint(
        run.job.folder / "checkpoints",
        progress.model,
        run=run.job.run,
        number=row.round,
        task=run.task.name,
        plan_digest=plan.digest,
        strategy_state=moments(run.strategy),
        epsilon=card.epsilon if card.private else None,
        delta=card.delta,
        ancestry=ancestry,
        operating_point=row.evaluation.operating_point if row.evaluation else None,
        signer=run.job.signer,
    )


def _judge(task: Task, model: nn.Module, job: Job) -> Evaluation | None:
    if job.heldout is None:
        return None
    model.eval()
    return task.judge(model, job.heldout, job.sensitivity)
