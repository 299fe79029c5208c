"""The server's round loop over Flower's ``Grid`` and ``Strategy``: ask, train, aggregate, judge, save, repeat.

Crash safety: a round is registered first and checkpointed second, so after a crash the run goes on from the
last checkpoint, asks the sites for the unfinished round again, and gets their stored replies.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import nn

from server.checkpoints import latest_checkpoint, load_weights, save_checkpoint
from server.registry import COMPLETED, FAILED, LATE, OK, Registry, RoundRow, SiteRow
from server.strategies import make_strategy
from shared.errors import ErrorCode, FederationError, ProtocolError, StorageError
from shared.messages import PlanQuery, SiteOffer, TrainReply, TrainRequest, error_code, global_weights
from shared.plan import RunPlan
from shared.records import RecordStore
from shared.tasks.base import Evaluation, Task
from shared.tasks.registry import find_task
from shared.weights import Vector, pack, unpack

_LOG = logging.getLogger(__name__)
_POLL_S = 0.02
_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """What the ServerApp is to do.

    Attributes:
        run: Name of the run; the same name goes on with the same run.
        plan: The agreed plan.
        folder: Where registry and checkpoints lie.
        heldout: The server's reference patients, if it has any.
        start: A public checkpoint to start from, if the plan names one.
    """

    run: str
    plan: RunPlan
    folder: Path
    heldout: RecordStore | None
    start: Path | None = None


@dataclass
class Progress:
    """The state that grows from round to round."""

    model: nn.Module
    round: int = 0
    best: float = -math.inf
    best_round: int = 0

    def note(self, number: int, metric: float) -> None:
        """Take account of a round's held-out metric."""
        if metric > self.best:
            self.best, self.best_round = metric, number

    def finished(self, plan: RunPlan) -> bool:
        """Whether all rounds are done or patience has run out: rounds not run are privacy not spent."""
        stalled = bool(plan.patience) and self.round - self.best_round >= plan.patience
        return self.round >= plan.rounds or stalled


def run_federation(grid: Grid, job: Job) -> None:
    """Carry a run from its last checkpoint, or its start, to its end.

    Raises:
        FederationError: If no quorum takes part, or a file cannot be used; the registry says so too.
    """
    registry = Registry(job.folder / "registry.sqlite")
    registry.begin(job.run, job.plan)
    try:
        task = find_task(job.plan.task)
        progress = _restore(job, task, registry)
        cohort = enlist(grid, job, registry)
        strategy = make_strategy()
        while not progress.finished(job.plan):
            _advance(grid, job, registry, task, strategy, cohort, progress)
        registry.end(job.run, COMPLETED)
    except FederationError as error:
        registry.end(job.run, FAILED, error.code.value)
        raise


def enlist(grid: Grid, job: Job, registry: Registry) -> dict[int, SiteOffer]:
    """Ask every node whether it takes part; return the offers of those that do, by node.

    Raises:
        FederationError: ``quorum-lost`` if fewer than ``min_sites`` accept.
    """
    content = PlanQuery(job.run, job.plan).to_content()
    replies = exchange(grid, dict.fromkeys(grid.get_node_ids(), content), MessageType.QUERY, "0", job.plan.deadline_s)
    offers: dict[int, SiteOffer] = {}
    refusals: list[str] = []
    for node, reply in sorted(replies.items()):
        offer = _checked(reply, lambda content: _offer(content, job.plan))
        if isinstance(offer, SiteOffer):
            offers[node] = offer
            registry.add_site(job.run, SiteRow(offer.site, offer.declared_patients, None))
        else:
            refusals.append(offer.value)
            registry.add_site(job.run, SiteRow(f"node-{node}", None, offer.value))
    if len(offers) < job.plan.min_sites:
        said = f" The others said: {', '.join(sorted(set(refusals)))}." if refusals else ""
        raise FederationError(
            f"{len(offers)} of the {job.plan.min_sites} sites that the plan requires take part.{said}",
            ErrorCode.QUORUM_LOST,
        )
    return offers


def exchange(
    grid: Grid, contents: Mapping[int, RecordDict], kind: str, group: str, deadline_s: float
) -> dict[int, Message]:
    """Send one message to each node and return the replies, by node, that come before the deadline.

    A reply is known by the message it answers: the sender's number in a failed reply is not to be trusted.
    """
    messages = [
        Message(content, dst_node_id=node, message_type=kind, group_id=group, ttl=deadline_s)
        for node, content in contents.items()
    ]
    waiting = dict(zip(grid.push_messages(messages), contents, strict=True))
    replies: dict[int, Message] = {}
    end = time.monotonic() + deadline_s
    while waiting and time.monotonic() < end:
        arrived = list(grid.pull_messages(list(waiting)))
        for reply in arrived:
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = reply
        if not arrived:
            time.sleep(_POLL_S)
    return replies


def _restore(job: Job, task: Task, registry: Registry) -> Progress:
    """Begin anew and save round 0, or take up the last checkpoint with the registered history."""
    model = initial_model(task, job.plan, job.start)
    checkpoint = latest_checkpoint(job.folder / "checkpoints")
    progress = Progress(model)
    if checkpoint is None:
        _record(job, registry, task, progress, RoundRow(0, 0.0, _judge(task, model, job), {}))
        return progress
    if (checkpoint.run, checkpoint.plan_digest) != (job.run, job.plan.digest):
        raise ProtocolError("The checkpoints here belong to another run or plan.", ErrorCode.PLAN_CHANGED)
    load_weights(checkpoint.path, model, checkpoint.sha256)
    progress.round = checkpoint.round
    rows = registry.read(job.run).rounds
    if checkpoint.round not in {row.round for row in rows}:
        raise StorageError("The run registry does not know the last checkpoint's round: it was lost or replaced.")
    for row in rows:
        if row.round <= checkpoint.round and row.evaluation:
            progress.note(row.round, row.evaluation.value(task.metric))
    return progress


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


def _advance(
    grid: Grid,
    job: Job,
    registry: Registry,
    task: Task,
    strategy: Strategy,
    cohort: Mapping[int, SiteOffer],
    progress: Progress,
) -> None:
    """Run one round and record it."""
    number, started = progress.round + 1, time.monotonic()
    request = TrainRequest(job.run, number, job.plan, pack(progress.model))
    messages = exchange(
        grid, dict.fromkeys(cohort, request.to_content()), MessageType.TRAIN, str(number), job.plan.deadline_s
    )
    accepted, outcomes = _sift(messages, cohort, request)
    if len(accepted) < job.plan.min_sites:
        seconds = time.monotonic() - started
        registry.add_round(job.run, RoundRow(number, seconds, None, outcomes, aggregated=False))
        raise FederationError(
            f"Round {number} got {len(accepted)} usable replies of the {job.plan.min_sites} required: {outcomes}.",
            ErrorCode.QUORUM_LOST,
        )
    unpack(_aggregate(strategy, number, accepted), progress.model)
    progress.round = number
    evaluation = _judge(task, progress.model, job)
    _record(job, registry, task, progress, RoundRow(number, time.monotonic() - started, evaluation, outcomes))


def _sift(
    messages: Mapping[int, Message], cohort: Mapping[int, SiteOffer], request: TrainRequest
) -> tuple[list[Message], dict[str, str]]:
    """Return the usable replies in the order of the sites' names, and what came of every site."""
    accepted: list[Message] = []
    outcomes: dict[str, str] = {}
    # By name, so that the sum of floats does not depend on who answered first.
    for node, offer in sorted(cohort.items(), key=lambda item: item[1].site):
        message = messages.get(node)
        if message is None:
            outcomes[offer.site] = LATE
            continue
        reply = _checked(message, lambda content: _reply(content, request))
        if isinstance(reply, TrainReply):
            message.content = reply.weighted(offer.declared_patients)
            accepted.append(message)
            outcomes[offer.site] = OK
        else:
            outcomes[offer.site] = reply.value
    return accepted, outcomes


def _aggregate(strategy: Strategy, number: int, accepted: list[Message]) -> Vector:
    arrays, _ = strategy.aggregate_train(number, accepted)
    if arrays is None:
        raise ProtocolError("The strategy gave no weights.")
    return global_weights(arrays)


def _record(job: Job, registry: Registry, task: Task, progress: Progress, row: RoundRow) -> None:
    if row.evaluation:
        progress.note(row.round, row.evaluation.value(task.metric))
    registry.add_round(job.run, row)
    save_checkpoint(
        job.folder / "checkpoints",
        progress.model,
        run=job.run,
        number=row.round,
        task=task.name,
        plan_digest=job.plan.digest,
    )


def _judge(task: Task, model: nn.Module, job: Job) -> Evaluation | None:
    if job.heldout is None:
        return None
    model.eval()
    return task.evaluate(model, job.heldout)


def _checked(message: Message, parse: Callable[[RecordDict], _T]) -> _T | ErrorCode:
    if message.has_error():
        return error_code(message)
    try:
        return parse(message.content)
    except FederationError as error:
        _LOG.warning("reply dropped", extra={"code": error.code.value})
        return error.code


def _offer(content: RecordDict, plan: RunPlan) -> SiteOffer:
    offer = SiteOffer.from_content(content)
    if offer.plan_digest != plan.digest:
        raise ProtocolError("The site accepted another plan.", ErrorCode.PLAN_CHANGED)
    return offer


def _reply(content: RecordDict, request: TrainRequest) -> TrainReply:
    reply = TrainReply.from_content(content)
    if (reply.round, reply.plan_digest) != (request.round, request.plan.digest):
        raise ProtocolError("The reply belongs to another round or plan.", ErrorCode.PLAN_CHANGED)
    if reply.weights.shape != request.weights.shape or not math.isfinite(float(reply.weights.sum())):
        raise ProtocolError("The reply's weights have the wrong shape or are not finite.")
    return reply
